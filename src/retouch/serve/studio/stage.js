/** Draws the stage: photo, preview or result on one canvas, mask, cursor and rectangle on another above it. */

import { Overlay } from "./overlay.js";

const SMOOTH_UNTIL = 3;

export class Stage {
  overlay = new Overlay();
  /** @type {{x: number, y: number, radius: number, add: boolean}|null} the brush under the pointer, in picture pixels */
  cursor = null;
  /** @type {import("./mask.js").Box|null} the rectangle being drawn or moved */
  rectangle = null;
  /** Where before ends and after begins, as a share of the visible picture. */
  divider = 0.5;
  maskShown = true;
  busy = false;
  #asked = false;
  #still = matchMedia("(prefers-reduced-motion: reduce)");

  /**
   * @param {HTMLCanvasElement} below
   * @param {HTMLCanvasElement} above
   * @param {import("./session.js").Session} session
   * @param {import("./view.js").View} view
   */
  constructor(below, above, session, view) {
    Object.assign(this, { below, above, session, view });
    const redrawMoved = () => {
      this.overlay.moved();
      this.redraw();
    };
    view.addEventListener("change", redrawMoved);
    session.addEventListener("photo", () => this.overlay.setMask(session.mask));
    session.addEventListener("paint", (event) => {
      this.overlay.update(event.detail);
      this.redraw();
    });
    session.addEventListener("showing", () => {
      const { selected, showing } = session;
      const pending = showing === "result" && selected?.pending; // its preview is smaller than a large photo
      const picture = pending ? selected.photo : (this.#pictures().top ?? session.photo);
      if (picture) view.setPicture(picture.width, picture.height);
      this.redraw();
    });
    new ResizeObserver(() => this.#resize()).observe(below.parentElement);
  }

  /** At the next frame, once, however many things have changed. */
  redraw() {
    if (this.#asked) return;
    this.#asked = true;
    requestAnimationFrame((now) => {
      this.#asked = false;
      this.#drawBelow();
      this.#drawAbove(now);
      if (this.busy && !this.#still.matches) this.redraw();
    });
  }

  get ratio() {
    return window.devicePixelRatio || 1;
  }

  #resize() {
    const { clientWidth, clientHeight } = this.below.parentElement;
    for (const canvas of [this.below, this.above]) {
      canvas.width = Math.max(1, Math.round(clientWidth * this.ratio));
      canvas.height = Math.max(1, Math.round(clientHeight * this.ratio));
    }
    this.view.setRoom(clientWidth, clientHeight);
  }

  /** What lies under (before) and over (after); `top` alone where there is nothing to compare. */
  #pictures() {
    const { photo, selected, showing } = this.session;
    if (showing === "mask" || !selected) return { top: photo?.bitmap ?? null, under: null };
    if (selected.pending) return { top: selected.bitmap ?? selected.photo.bitmap, under: null };
    return { top: selected.bitmap, under: selected.photo.bitmap };
  }

  #drawBelow() {
    const context = this.below.getContext("2d");
    const { ratio, view } = this;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, this.below.width, this.below.height);
    const { top, under } = this.#pictures();
    if (!top) return;
    context.scale(ratio, ratio);
    context.imageSmoothingEnabled = view.scale < SMOOTH_UNTIL;
    context.imageSmoothingQuality = "high";
    const place = [view.x, view.y, view.picture.width * view.scale, view.picture.height * view.scale];
    context.drawImage(under ?? top, ...place);
    if (!under) return;
    const seen = view.visible();
    const edge = seen.left + (seen.right - seen.left) * this.divider;
    context.save();
    context.beginPath();
    context.rect(edge, seen.top, seen.right - edge, seen.bottom - seen.top);
    context.clip();
    context.clearRect(...place);
    context.drawImage(top, ...place);
    context.restore();
  }

  #drawAbove(now) {
    const context = this.above.getContext("2d");
    const { ratio, session } = this;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, this.above.width, this.above.height);
    const painting = session.showing === "mask";
    const waiting = !painting && session.selected?.pending && session.selected.photo === session.photo;
    if ((painting && this.maskShown) || waiting) {
      const phase = this.busy && !this.#still.matches ? (now / 60) % 12 : 0;
      this.overlay.paint(context, this.view, { ratio, tint: painting, phase });
    }
    context.scale(ratio, ratio);
    if (painting && this.rectangle) this.#drawRectangle(context, this.rectangle);
    if (painting && this.cursor) this.#drawCursor(context, this.cursor);
  }

  #drawRectangle(context, { x, y, width, height }) {
    const { view } = this;
    const place = [view.x + x * view.scale, view.y + y * view.scale, width * view.scale, height * view.scale];
    context.lineWidth = 1.5;
    for (const [colour, offset] of [
      ["#000", 0],
      ["#fff", 5],
    ]) {
      context.strokeStyle = colour;
      context.setLineDash([5, 5]);
      context.lineDashOffset = offset;
      context.strokeRect(...place);
    }
    context.setLineDash([]);
  }

  #drawCursor(context, { x, y, radius, add }) {
    const { view } = this;
    const at = [view.x + x * view.scale, view.y + y * view.scale];
    const reach = Math.max(radius * view.scale, 1.5);
    for (const [colour, width] of [
      ["rgb(0 0 0 / 70%)", 3],
      ["#fff", 1.25],
    ]) {
      context.strokeStyle = colour;
      context.lineWidth = width;
      context.beginPath();
      context.arc(...at, reach, 0, 2 * Math.PI);
      context.stroke();
    }
    if (add) return;
    context.fillStyle = "#fff";
    context.fillRect(at[0] - 4, at[1] - 0.75, 8, 1.5);
  }
}
