/**
 * What the person is working on: the photo and its mask, the results so far and which of them is shown.
 * Emits "photo" (another photo or another mask object), "paint" (the mask has changed, `detail: Box`), "history" (what can be
 * undone has changed), "showing" (mask or result, and which), "results" (the list).
 */

import { Mask } from "./mask.js";

/**
 * @typedef {object} Photo
 * @property {string} name
 * @property {Blob} blob what was opened; kept so that it can be uploaded again when the server has forgotten it
 * @property {ImageBitmap} bitmap upright
 * @property {number} width
 * @property {number} height
 * @property {string|null} id the server's name for it, once uploaded
 */

/**
 * @typedef {object} Result a finished variation, or (while `pending`) the place where one will be
 * @property {Photo} photo what it was made from
 * @property {string} [filter] what made it, where that was not the model
 * @property {Uint8Array} maskBits
 * @property {import("./mask.js").Box|null} maskBox null: the whole photo
 * @property {string} prompt
 * @property {number|null} seed
 * @property {ImageBitmap|null} bitmap the picture, or the newest preview of it
 * @property {Blob|null} blob
 * @property {object|null} usage
 * @property {boolean} pending
 */

export class Session extends EventTarget {
  /** @type {Photo|null} */ photo = null;
  /** @type {Mask|null} */ mask = null;
  /** @type {Result[]} newest first */ results = [];
  /** @type {Result|null} */ selected = null;
  showing = "mask";
  #uploads = new WeakMap();
  #turn = 0;

  constructor(api) {
    super();
    this.api = api;
  }

  /**
   * Show a file at once and upload it behind. What the browser cannot decode (TIFF, say) is decoded by the server.
   * @returns {Promise<boolean>} whether it is still what was opened last: what was overtaken before it could be shown never is
   */
  async open(blob, name) {
    const turn = ++this.#turn;
    const bitmap = await decode(blob).catch(() => null);
    const photo = { name: stem(name), blob, bitmap, width: bitmap?.width ?? 0, height: bitmap?.height ?? 0, id: null };
    if (!bitmap && turn === this.#turn) await this.uploaded(photo);
    if (turn !== this.#turn) {
      photo.bitmap?.close();
      return false;
    }
    this.#use(photo);
    await this.uploaded(photo);
    if (bitmap !== photo.bitmap) bitmap?.close();
    return turn === this.#turn;
  }

  /** A result becomes the photo to work on; the mask starts empty, and undo brings the old one back. */
  async continueFrom(result) {
    this.#turn++;
    const { bitmap, blob } = result;
    const sameSize = this.mask && this.photo.width === bitmap.width && this.photo.height === bitmap.height;
    const mask = sameSize ? this.mask : null;
    mask?.clear();
    const photo = { name: result.photo.name, blob, bitmap, width: bitmap.width, height: bitmap.height, id: null };
    this.#use(photo, mask);
    await this.uploaded(photo);
  }

  /** The photo and the mask that a result was made with. */
  again(result) {
    this.#turn++;
    if (this.photo !== result.photo) this.#use(result.photo);
    this.mask.unpack(result.maskBits);
    this.show("mask");
  }

  /** The server's id of a photo, uploading it where needed: once, whoever asks and how often. @returns {Promise<string>} */
  uploaded(photo) {
    if (photo.id) return Promise.resolve(photo.id);
    if (!this.#uploads.has(photo))
      this.#uploads.set(
        photo,
        this.#upload(photo).finally(() => this.#uploads.delete(photo)),
      );
    return this.#uploads.get(photo);
  }

  show(what, result = this.selected) {
    if (result && !this.results.includes(result)) result = null;
    this.selected = result;
    this.showing = what === "result" && result ? "result" : "mask";
    this.dispatchEvent(new Event("showing"));
  }

  addResults(results) {
    this.results.unshift(...results);
    this.dispatchEvent(new Event("results"));
  }

  /** Take results out of the list; the neighbour of the selected one is selected. */
  removeResults(gone) {
    const at = this.results.indexOf(this.selected);
    this.results = this.results.filter((result) => !gone.includes(result));
    this.dispatchEvent(new Event("results"));
    if (!gone.includes(this.selected)) return;
    const next = this.results[Math.min(at, this.results.length - 1)] ?? null;
    this.show(this.showing, next);
  }

  restoreResult(result, at) {
    this.results.splice(at, 0, result);
    this.dispatchEvent(new Event("results"));
    this.show("result", result);
  }

  #use(photo, mask = null) {
    this.photo = photo;
    this.mask = mask ?? this.#newMask(photo);
    this.dispatchEvent(new Event("photo"));
    this.show("mask");
  }

  #newMask({ width, height }) {
    const mask = new Mask(width, height);
    const tell = (event) => mask === this.mask && this.dispatchEvent(event);
    mask.addEventListener("change", ({ detail }) => tell(new CustomEvent("paint", { detail })));
    mask.addEventListener("history", () => tell(new Event("history")));
    return mask;
  }

  /** The server's size is what counts: where the browser sees another one, the server's pixels are shown. */
  async #upload(photo) {
    const document = await this.api.upload(photo.blob, photo.name);
    if (document.width !== photo.width || document.height !== photo.height) {
      photo.bitmap = await decode(await this.api.content(document.id));
      Object.assign(photo, { width: document.width, height: document.height });
      if (photo === this.photo) this.#use(photo);
    }
    photo.id = document.id;
    return photo.id;
  }
}

/** Upright, whatever the file says about how the camera was held. @param {Blob} blob */
export const decode = (blob) => createImageBitmap(blob, { imageOrientation: "from-image" });

const stem = (name) => name.replace(/\.[^.]*$/, "") || "photo";
