/** Pointer, wheel and arrow keys on the stage: painting, rectangles, panning, zooming, and the divider of before and after. */

const WHEEL = 0.0016;

export class Gestures {
  #pointers = new Map();
  #doing = null;
  #last = null;
  spaceHeld = false;

  /**
   * @param {HTMLElement} surface the canvas that takes the input
   * @param {{stage: import("./stage.js").Stage, view: import("./view.js").View, tools: import("./tools.js").Tools,
   *          session: import("./session.js").Session, moveDivider: (x: number) => void, opens: () => void}} parts
   */
  constructor(surface, parts) {
    Object.assign(this, { surface, ...parts });
    surface.addEventListener("pointerdown", (event) => this.#down(event));
    surface.addEventListener("pointermove", (event) => this.#move(event));
    surface.addEventListener("pointerup", (event) => this.#up(event));
    surface.addEventListener("pointercancel", (event) => this.#up(event, true));
    surface.addEventListener("pointerleave", () => this.#hideCursor());
    surface.addEventListener("wheel", (event) => this.#wheel(event), { passive: false });
    surface.addEventListener("blur", () => surface.classList.remove("by-pointer"));
    surface.addEventListener("keydown", (event) => event.key.startsWith("Arrow") && surface.classList.remove("by-pointer"));
    surface.addEventListener("contextmenu", (event) => event.preventDefault());
    this.session.addEventListener("photo", () => (this.#last = null));
    this.tools.addEventListener("change", () => this.#dress());
    this.session.addEventListener("showing", () => this.#dress());
    this.#dress();
  }

  get drawing() {
    return this.#doing !== null;
  }

  holdSpace(held) {
    this.spaceHeld = held;
    this.#dress();
  }

  /** Drop what the pointer is doing, as if it had never begun. */
  abandon() {
    this.session.mask?.cancelStroke();
    this.#finish();
  }

  #down(event) {
    if (!this.session.photo) return this.opens();
    this.surface.classList.add("by-pointer");
    this.surface.focus({ preventScroll: true });
    this.#pointers.set(event.pointerId, this.#at(event));
    this.surface.setPointerCapture(event.pointerId);
    if (this.#pointers.size === 2) return this.#beginPinch();
    if (this.#pointers.size > 2 || this.#doing) return;
    const panning = event.button === 1 || this.spaceHeld || (this.tools.tool === "hand" && this.session.showing === "mask");
    if (event.button === 2 || (event.button > 0 && !panning)) return;
    event.preventDefault();
    if (panning) this.#doing = { kind: "pan" };
    else if (this.session.showing === "result") this.#doing = { kind: "divide" };
    else if (this.tools.tool === "rectangle") this.#doing = { kind: "rectangle", from: this.#pixel(event), add: !event.altKey };
    else if (this.tools.tool !== "hand") this.#beginStroke(event);
    if (this.#doing?.kind === "divide" && !this.session.selected?.pending) this.moveDivider(this.#at(event).x);
    this.#dress();
  }

  #beginStroke(event) {
    const add = (this.tools.tool === "brush") !== event.altKey;
    this.#doing = { kind: "stroke", add };
    this.session.mask.beginStroke(add);
    const to = this.#pixel(event);
    this.#line(event.shiftKey && this.#last ? this.#last : to, to);
  }

  #beginPinch() {
    if (this.#doing?.kind === "stroke") this.session.mask.cancelStroke();
    this.stage.rectangle = this.#restingRectangle();
    this.#doing = { kind: "pinch", ...this.#spread() };
    this.#hideCursor();
  }

  #move(event) {
    const before = this.#pointers.get(event.pointerId);
    const now = this.#at(event);
    if (before) this.#pointers.set(event.pointerId, now);
    if (event.pointerType !== "touch") this.#showCursor(event);
    switch (this.#doing?.kind) {
      case "pan":
        return before && this.view.pan(now.x - before.x, now.y - before.y);
      case "pinch":
        return this.#pinch();
      case "divide":
        return this.session.selected?.pending || this.moveDivider(now.x);
      case "rectangle":
        this.stage.rectangle = between(this.#doing.from, this.#pixel(event), event.shiftKey);
        return this.stage.redraw();
      case "stroke":
        for (const each of coalesced(event)) this.#line(this.#last ?? this.#pixel(each), this.#pixel(each));
    }
  }

  #up(event, broken = false) {
    this.#pointers.delete(event.pointerId);
    const doing = this.#doing;
    if (!doing || (doing.kind === "pinch" && this.#pointers.size > 0)) return;
    if (broken) return this.abandon();
    if (doing.kind === "stroke") this.session.mask.endStroke();
    if (doing.kind === "rectangle") {
      const box = inside(between(doing.from, this.#pixel(event), event.shiftKey), this.session.photo);
      if (box.width >= 1 && box.height >= 1) {
        this.session.mask.rectangle(box, doing.add);
        this.tools.setRectangle(box);
      }
    }
    this.#finish();
  }

  #finish() {
    this.#doing = null;
    this.#dress();
  }

  #wheel(event) {
    if (!this.session.photo) return;
    event.preventDefault();
    const delta = event.deltaMode === WheelEvent.DOM_DELTA_LINE ? event.deltaY * 32 : event.deltaY;
    if (event.shiftKey) return this.view.pan(-(event.deltaX || delta), 0);
    const at = this.#at(event);
    this.view.zoom(Math.exp(-Math.max(-240, Math.min(240, delta)) * WHEEL * (event.ctrlKey ? 5 : 1)), at.x, at.y);
    this.#showCursor(event);
  }

  #line(from, to) {
    this.session.mask.line(from.x, from.y, to.x, to.y, this.tools.size / 2);
    this.#last = to;
  }

  #spread() {
    const [a, b] = [...this.#pointers.values()];
    return { x: (a.x + b.x) / 2, y: (a.y + b.y) / 2, distance: Math.max(1, Math.hypot(a.x - b.x, a.y - b.y)) };
  }

  #pinch() {
    if (this.#pointers.size < 2) return;
    const before = this.#doing;
    const now = this.#spread();
    this.view.pan(now.x - before.x, now.y - before.y);
    this.view.zoom(now.distance / before.distance, now.x, now.y);
    this.#doing = { kind: "pinch", ...now };
  }

  #at(event) {
    const box = this.surface.getBoundingClientRect();
    return { x: event.clientX - box.left, y: event.clientY - box.top };
  }

  #pixel(event) {
    const { x, y } = this.#at(event);
    return this.view.toPicture(x, y);
  }

  #showCursor(event) {
    const brushing = this.session.photo && ["brush", "eraser"].includes(this.tools.tool) && !this.spaceHeld;
    const add = (this.tools.tool === "brush") !== event.altKey;
    this.stage.cursor = brushing ? { ...this.#pixel(event), radius: this.tools.size / 2, add } : null;
    this.stage.redraw();
  }

  #hideCursor() {
    this.stage.cursor = null;
    this.stage.redraw();
  }

  #restingRectangle() {
    return this.tools.tool === "rectangle" ? this.tools.rectangle : null;
  }

  /** The cursor's shape, and the rectangle that waits for the keyboard. */
  #dress() {
    const kind = this.#doing?.kind;
    const still = this.session.showing === "mask" ? this.tools.tool : "divide";
    this.surface.dataset.cursor = kind === "pan" ? "grabbing" : this.spaceHeld ? "hand" : still;
    if (kind !== "rectangle") this.stage.rectangle = this.#restingRectangle();
    if (this.stage.cursor) this.stage.cursor.radius = this.tools.size / 2;
    if (!["brush", "eraser"].includes(this.tools.tool)) this.stage.cursor = null;
    this.stage.redraw();
  }
}

/** The moves that the browser has put together in one event; some browsers list none. */
function coalesced(event) {
  const all = event.getCoalescedEvents?.() ?? [];
  return all.length ? all : [event];
}

/** The rectangle with these corners, in whole pixels; a square where asked. */
function between(a, b, square) {
  let [dx, dy] = [b.x - a.x, b.y - a.y];
  if (square) {
    const side = Math.max(Math.abs(dx), Math.abs(dy));
    [dx, dy] = [side * Math.sign(dx || 1), side * Math.sign(dy || 1)];
  }
  const [x, y] = [Math.round(Math.min(a.x, a.x + dx)), Math.round(Math.min(a.y, a.y + dy))];
  return { x, y, width: Math.round(Math.max(a.x, a.x + dx)) - x, height: Math.round(Math.max(a.y, a.y + dy)) - y };
}

/** The part of a box that lies in the photo. */
function inside({ x, y, width, height }, photo) {
  const [left, top] = [Math.max(0, x), Math.max(0, y)];
  return { x: left, y: top, width: Math.min(photo.width, x + width) - left, height: Math.min(photo.height, y + height) - top };
}
