/** Where the picture lies on the stage: one scale and one offset, in CSS pixels. Emits "change". */

const MOST = 32;
const MARGIN = 20;
/** Room for the status and the zoom buttons below the picture. */
const FOOT = 52;

export class View extends EventTarget {
  scale = 1;
  x = 0;
  y = 0;
  fitted = true;
  #picture = { width: 1, height: 1 };
  #room = { width: 1, height: 1 };

  get picture() {
    return this.#picture;
  }

  get room() {
    return this.#room;
  }

  /** A picture of another size is fitted anew; one of the same size keeps the place that is being looked at. */
  setPicture(width, height) {
    if (width === this.#picture.width && height === this.#picture.height) return;
    this.#picture = { width, height };
    this.fit();
  }

  setRoom(width, height) {
    const centre = this.toPicture(this.#room.width / 2, this.#room.height / 2);
    this.#room = { width, height };
    if (this.fitted) return this.fit();
    this.#move(width / 2 - centre.x * this.scale, height / 2 - centre.y * this.scale);
  }

  #fitScale() {
    const { width, height } = this.#room;
    const margin = this.#margin;
    return Math.min((width - 2 * margin) / this.#picture.width, (height - margin - FOOT) / this.#picture.height, 4);
  }

  fit() {
    this.scale = Math.max(this.#fitScale(), 0.001);
    this.fitted = true;
    this.#move(
      (this.#room.width - this.#picture.width * this.scale) / 2,
      (this.#room.height - FOOT + this.#margin - this.#picture.height * this.scale) / 2,
    );
  }

  get #margin() {
    return Math.min(MARGIN, this.#room.width * 0.03);
  }

  /** Zoom by a factor; the point (x, y) of the stage stays where it is. */
  zoom(factor, x = this.#room.width / 2, y = this.#room.height / 2) {
    this.zoomTo(this.scale * factor, x, y);
  }

  zoomTo(scale, x = this.#room.width / 2, y = this.#room.height / 2) {
    const at = this.toPicture(x, y);
    this.scale = Math.min(MOST, Math.max(scale, Math.min(this.#fitScale() / 2, 1)));
    this.fitted = false;
    this.#move(x - at.x * this.scale, y - at.y * this.scale);
  }

  pan(dx, dy) {
    this.fitted = false;
    this.#move(this.x + dx, this.y + dy);
  }

  toPicture(x, y) {
    return { x: (x - this.x) / this.scale, y: (y - this.y) / this.scale };
  }

  /** The picture's visible part on the stage. */
  visible() {
    const left = Math.max(0, this.x);
    const top = Math.max(0, this.y);
    const right = Math.min(this.#room.width, this.x + this.#picture.width * this.scale);
    const bottom = Math.min(this.#room.height, this.y + this.#picture.height * this.scale);
    return { left, top, right: Math.max(left, right), bottom: Math.max(top, bottom) };
  }

  /** A bit of the picture always stays in sight. */
  #move(x, y) {
    const keep = 48;
    const clamp = (at, room, size) => Math.min(room - keep, Math.max(keep - size, at));
    this.x = clamp(x, this.#room.width, this.#picture.width * this.scale);
    this.y = clamp(y, this.#room.height, this.#picture.height * this.scale);
    this.dispatchEvent(new Event("change"));
  }
}
