/** The selected result beside the stage: what it is, what it cost, and what can be done with it. */

import { account } from "./cost.js";
import { $ } from "./dom.js";

/** @param {import("./session.js").Result} result */
export const fileName = (result) =>
  `${result.photo.name}-${slug(result.prompt)}${result.seed === null ? "" : `-${result.seed}`}.png`;

/** @type {Blob|null} what the download link leads to; a URL keeps its blob in memory, so there is one at a time */
let linked = null;

/** @param {import("./session.js").Session} session */
export function showDetails(session) {
  const { selected: result } = session;
  $("details").hidden = !result || result.pending;
  if (!result || result.pending) return;
  $("details-prompt").textContent = result.prompt;
  $("details-facts").textContent = [
    result.seed === null ? null : `Seed ${result.seed}`,
    result.usage?.retouch?.steps && !result.filter ? `${result.usage.retouch.steps} steps` : null,
    `${result.bitmap.width} × ${result.bitmap.height}`,
  ]
    .filter(Boolean)
    .join(" · ");
  link(result.blob);
  $("download").download = fileName(result);
  $("account").replaceChildren(...account(result.usage));
}

function link(blob) {
  if (blob === linked) return;
  if (linked) URL.revokeObjectURL($("download").href);
  $("download").href = URL.createObjectURL(blob);
  linked = blob;
}

const slug = (text) =>
  text
    .toLowerCase()
    .normalize("NFKD")
    .replace(/[^a-z0-9]+/g, "-")
    .replace(/^-|-$/g, "")
    .slice(0, 40) || "edit";
