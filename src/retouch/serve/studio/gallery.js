/** The strip of results, newest first: one tab stop, arrow keys within, thumbnails that fill in while the job runs. */

import { brief } from "./cost.js";
import { $, make } from "./dom.js";

const THUMB = 176;

export class Gallery {
  #tiles = new Map();

  /** @param {import("./session.js").Session} session */
  constructor(session) {
    this.session = session;
    this.list = $("results");
    session.addEventListener("results", () => this.#arrange());
    session.addEventListener("showing", () => this.#mark());
    this.list.addEventListener("keydown", (event) => this.#keys(event));
    this.#arrange();
  }

  /** A result has a new picture, or is finished. */
  refresh(result) {
    const tile = this.#tiles.get(result);
    if (tile) this.#fill(tile, result);
  }

  #arrange() {
    const { results } = this.session;
    for (const [result, tile] of this.#tiles) {
      if (results.includes(result)) continue;
      tile.remove();
      this.#tiles.delete(result);
    }
    for (const result of results) if (!this.#tiles.has(result)) this.#tiles.set(result, this.#tile(result));
    const order = results.map((result) => this.#tiles.get(result));
    if (order.some((tile, i) => this.list.children[i] !== tile)) this.list.replaceChildren(...order);
    $("strip").hidden = results.length === 0;
    $("results-count").textContent = String(results.filter((result) => !result.pending).length);
    this.#mark();
  }

  #tile(result) {
    const canvas = make("canvas", { width: THUMB, height: THUMB, "aria-hidden": "true" });
    const picture = make("span", { class: "thumb" }, canvas, make("span", { class: "spinner", "aria-hidden": "true" }));
    const tile = make("button", {
      class: "tile",
      type: "button",
      role: "option",
      click: () => this.session.show("result", result),
    });
    tile.append(picture, make("span", { class: "tile-prompt" }), make("span", { class: "tile-facts" }));
    this.#fill(tile, result);
    return tile;
  }

  #fill(tile, result) {
    const [, prompt, facts] = tile.children;
    const seed = result.filter ? "" : result.seed === null ? "random seed" : `seed ${result.seed}`;
    tile.classList.toggle("pending", result.pending);
    tile.classList.toggle("previewed", result.pending && result.bitmap !== null);
    tile.title = result.prompt;
    prompt.textContent = result.prompt;
    facts.textContent = result.pending ? "Working…" : [seed, brief(result.usage)].filter(Boolean).join("\n");
    drawThumb(tile.querySelector("canvas"), result);
  }

  #mark() {
    const { results, selected, showing } = this.session;
    const stop = selected ?? results[0];
    for (const [result, tile] of this.#tiles) {
      tile.setAttribute("aria-selected", String(result === selected && showing === "result"));
      tile.tabIndex = result === stop ? 0 : -1;
    }
    if (selected) this.#tiles.get(selected)?.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  #keys(event) {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity }[event.key];
    const { results, selected } = this.session;
    if (!step || !results.length) return;
    event.preventDefault();
    const at = Math.max(0, results.indexOf(selected));
    const next = results[Math.min(results.length - 1, Math.max(0, at + step))];
    this.session.show("result", next);
    this.#tiles.get(next).focus();
  }
}

/** The masked part of the picture, as large as the thumbnail allows: that is where variations differ. */
function drawThumb(canvas, result) {
  const picture = result.bitmap ?? result.photo.bitmap;
  if (!picture) return;
  const { x, y, side } = square(result);
  const scale = picture.width / result.photo.width; // previews of large photos are smaller, what is upscaled is larger
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.clearRect(0, 0, THUMB, THUMB);
  context.drawImage(picture, x * scale, y * scale, side * scale, side * scale, 0, 0, THUMB, THUMB);
}

/** A square around the mask with some of its surroundings, within the photo and in its pixels. */
function square({ maskBox: box, photo }) {
  const maskBox = box ?? { x: 0, y: 0, width: photo.width, height: photo.height };
  const most = Math.min(photo.width, photo.height);
  const side = Math.min(most, Math.max(1.8 * Math.max(maskBox.width, maskBox.height), most / 3));
  const place = (start, size, room) => Math.min(room - side, Math.max(0, start + size / 2 - side / 2));
  return { x: place(maskBox.x, maskBox.width, photo.width), y: place(maskBox.y, maskBox.height, photo.height), side };
}
