/** The divider between before and after: a slider for the keyboard, a line to drag for everyone else. */

import { $ } from "./dom.js";

const STEP = 0.02;

export class Compare {
  /** @param {import("./stage.js").Stage} stage */
  constructor(stage) {
    this.stage = stage;
    this.divider = $("divider");
    this.divider.addEventListener("keydown", (event) => this.#keys(event));
    this.divider.addEventListener("pointerdown", (event) => {
      event.preventDefault();
      this.divider.focus();
      this.divider.setPointerCapture(event.pointerId);
    });
    this.divider.addEventListener("pointermove", (event) => {
      if (!this.divider.hasPointerCapture(event.pointerId)) return;
      this.moveTo(event.clientX - stage.above.getBoundingClientRect().left);
    });
    stage.view.addEventListener("change", () => this.place());
    stage.session.addEventListener("showing", () => this.place());
  }

  /** @param {number} x on the stage, in CSS pixels */
  moveTo(x) {
    const { left, right } = this.stage.view.visible();
    this.set((x - left) / Math.max(1, right - left));
  }

  /** Just left of what was edited, so that all of it shows. */
  besides({ maskBox, bitmap }) {
    const { view } = this.stage;
    this.moveTo(view.x + Math.max(bitmap.width * 0.04, maskBox.x - bitmap.width * 0.05) * view.scale);
  }

  set(share) {
    this.stage.divider = Math.min(1, Math.max(0, share));
    this.place();
    this.stage.redraw();
  }

  place() {
    const { session, view, divider: share } = this.stage;
    const shown = session.showing === "result" && session.selected !== null && !session.selected.pending;
    for (const id of ["divider", "tag-before", "tag-after"]) $(id).hidden = !shown;
    if (!shown) return;
    const { left, top, right, bottom } = view.visible();
    const at = left + (right - left) * share;
    Object.assign(this.divider.style, { left: `${at}px`, top: `${top}px`, height: `${bottom - top}px` });
    this.divider.setAttribute("aria-valuenow", String(Math.round(share * 100)));
    this.divider.setAttribute("aria-valuetext", `${Math.round(share * 100)} % before, the rest after`);
    Object.assign($("tag-before").style, { left: `${left + 10}px`, top: `${top + 10}px` });
    Object.assign($("tag-after").style, { right: `${view.room.width - right + 10}px`, top: `${top + 10}px` });
    $("tag-before").hidden = at - left < 80;
    $("tag-after").hidden = right - at < 70;
  }

  #keys(event) {
    const by = {
      ArrowRight: STEP,
      ArrowUp: STEP,
      ArrowLeft: -STEP,
      ArrowDown: -STEP,
      PageUp: 0.1,
      PageDown: -0.1,
      Home: -1,
      End: 1,
    }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    this.set(this.stage.divider + by);
  }
}
