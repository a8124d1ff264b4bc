/** What an edit cost, as the server measured it: seconds by stage, tokens computed of the whole, caches, dollars. */

import { make } from "./dom.js";
import * as format from "./format.js";

const STAGES = { document: "Photo", prompt: "Prompt", start: "Start", step: "Denoise", preview: "Previews", finish: "Decode" };
const LEAST_SHOWN = 0.0005;
const CACHES = { document: "photo", prompt: "prompt", result: "result", mask: "mask" };

/** @param {Record<string, number>} seconds by stage */
export const total = (seconds) => Object.values(seconds ?? {}).reduce((sum, value) => sum + value, 0);

/**
 * A bar whose parts are labelled below it.
 * @param {[string, number, string, string][]} parts name, share of 1, text, colour's name
 */
export function bar(label, parts) {
  const track = make("div", {
    class: "bar",
    role: "img",
    "aria-label": `${label}: ${parts.map(([name, , text]) => `${name} ${text}`).join(", ")}`,
  });
  const legend = make("dl", { class: "legend" });
  for (const [name, share, text, colour] of parts) {
    const part = make("span", { class: `part colour-${colour}` });
    part.style.flexGrow = Math.max(share, 0);
    part.hidden = share <= 0;
    track.append(part);
    legend.append(make("div", { class: `key colour-${colour}` }, make("dt", {}, name), make("dd", {}, text)));
  }
  return make("div", { class: "measure" }, track, legend);
}

/** One filled part of a track. */
export function meter(label, share, text) {
  const fill = make("span", { class: "part colour-step" });
  fill.style.width = `${Math.min(100, Math.max(share * 100, share > 0 ? 1 : 0))}%`;
  return make("div", { class: "bar single", role: "img", "aria-label": `${label}: ${text}` }, fill);
}

/** Seconds by stage, in the order in which they happen; other stages come last, what took no time not at all. */
export function stages(seconds) {
  const all = total(seconds);
  const names = [...Object.keys(STAGES), ...Object.keys(seconds).filter((name) => !(name in STAGES))];
  const parts = names
    .filter((name) => seconds[name] >= LEAST_SHOWN)
    .map((name) => [STAGES[name] ?? name, seconds[name] / all, format.seconds(seconds[name]), name]);
  return bar("Seconds by stage", parts);
}

/** In a few words, for a thumbnail. */
export function brief(usage) {
  const cost = usage?.retouch;
  if (!cost) return "";
  const price = cost.dollars > 0 ? ` · ${format.dollars(cost.dollars)}` : "";
  return `${format.seconds(total(cost.seconds))}${price}`;
}

/** The whole account. @returns {Node[]} */
export function account(usage) {
  const cost = usage?.retouch;
  if (!cost) return [make("p", { class: "quiet" }, "The server did not say what this edit cost.")];
  const { tokens_computed: computed, tokens_whole: whole, cache_hits: hits = [] } = cost;
  const nodes = [row("Device time", format.seconds(total(cost.seconds)), stages(cost.seconds ?? {}))];
  if (whole) {
    const share = computed / whole;
    const text = `${format.count(computed)} of ${format.count(whole)}`;
    nodes.push(
      row(
        "Tokens computed",
        `${format.percent(share)}`,
        meter("Tokens computed", share, text),
        make("p", { class: "quiet" }, `${text}; the mask spared the rest.`),
      ),
    );
  }
  const reused = hits.length
    ? hits.map((name) => make("span", { class: "chip" }, CACHES[name] ?? name))
    : [make("span", { class: "quiet" }, "nothing, all new")];
  nodes.push(row("From cache", make("span", { class: "chips" }, ...reused)));
  if (cost.dollars > 0) {
    nodes.push(
      row(
        "Cost",
        format.dollars(cost.dollars),
        make("p", { class: "quiet" }, `${format.dollars(cost.dollars * 1e6)} for a million of these`),
      ),
    );
  }
  return nodes;
}

function row(name, value, ...more) {
  return make(
    "div",
    { class: "account-row" },
    make("div", { class: "account-head" }, make("h4", {}, name), make("strong", {}, value)),
    ...more,
  );
}
