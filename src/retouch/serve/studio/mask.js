/**
 * The mask: one byte a pixel of the photo, 255 = edit here, 0 = keep. Always exactly what is sent, so there are no soft edges.
 * Strokes are filled row by row in exact arithmetic; nothing is read back from a canvas.
 */

const HISTORY_BYTES = 96 * 2 ** 20;

/** @typedef {{x: number, y: number, width: number, height: number}} Box whole pixels */

/** Emits "change" with `detail: Box`, the pixels that may have changed. */
export class Mask extends EventTarget {
  #undo = [];
  #redo = [];
  #stroke = null;

  constructor(width, height) {
    super();
    this.width = width;
    this.height = height;
    this.data = new Uint8Array(width * height);
    this.painted = 0;
  }

  get share() {
    return this.painted / this.data.length;
  }

  get empty() {
    return this.painted === 0;
  }

  get canUndo() {
    return this.#undo.length > 0;
  }

  get canRedo() {
    return this.#redo.length > 0;
  }

  /** A stroke is one entry of the history, however many lines it has. */
  beginStroke(add) {
    this.#stroke = { value: add ? 255 : 0, before: this.data.slice(), box: null };
  }

  /** A line with round ends from (ax, ay) to (bx, by), in pixels. A dot where both are the same. */
  line(ax, ay, bx, by, radius) {
    const stroke = this.#stroke;
    const box = this.#clip(
      Math.min(ax, bx) - radius,
      Math.min(ay, by) - radius,
      Math.max(ax, bx) + radius,
      Math.max(ay, by) + radius,
    );
    if (!stroke || !box) return;
    for (let y = box.y; y < box.y + box.height; y++) {
      const span = capsuleSpan(y + 0.5, ax, ay, bx, by, radius);
      if (span) this.#fillRow(y, Math.ceil(span[0] - 0.5), Math.floor(span[1] - 0.5) + 1, stroke.value);
    }
    stroke.box = union(stroke.box, box);
    this.#changed(box);
  }

  endStroke() {
    const stroke = this.#stroke;
    this.#stroke = null;
    if (stroke?.box) this.#remember(stroke.box, cut(stroke.before, this.width, stroke.box));
  }

  /** Take back the stroke under way, as when a second finger shows that it was a pinch. */
  cancelStroke() {
    const stroke = this.#stroke;
    this.#stroke = null;
    if (stroke?.box) this.#paste(stroke.box, cut(stroke.before, this.width, stroke.box));
  }

  rectangle({ x, y, width, height }, add) {
    const box = this.#clip(x, y, x + width, y + height);
    if (!box) return;
    this.#edit(box, (row) => row.fill(add ? 255 : 0));
  }

  clear() {
    if (!this.empty) this.#edit(this.#whole(), (row) => row.fill(0));
  }

  invert() {
    this.#edit(this.#whole(), (row) => {
      for (let i = 0; i < row.length; i++) row[i] ^= 255;
    });
  }

  undo() {
    this.#swap(this.#undo, this.#redo);
  }

  redo() {
    this.#swap(this.#redo, this.#undo);
  }

  /** The smallest box around what is painted. @returns {Box|null} */
  bounds() {
    let box = null;
    for (const [y, row] of rows(this.data, this.width, this.#whole()).entries()) {
      const x = row.indexOf(255);
      if (x >= 0) box = union(box, { x, y, width: row.lastIndexOf(255) - x + 1, height: 1 });
    }
    return box;
  }

  /** A copy in one bit a pixel, small enough to keep with every result. */
  pack() {
    const bits = new Uint8Array(Math.ceil(this.data.length / 8));
    for (let i = 0; i < this.data.length; i++) if (this.data[i]) bits[i >> 3] |= 1 << (i & 7);
    return bits;
  }

  /** Back to a packed copy of a mask of this size; can be undone. */
  unpack(bits) {
    let i = 0;
    this.#edit(this.#whole(), (row) => {
      for (let x = 0; x < row.length; x++, i++) row[x] = (bits[i >> 3] >> (i & 7)) & 1 ? 255 : 0;
    });
  }

  /** White on black, at the photo's own size. Rejects where the browser has no memory for it. @returns {Promise<Blob>} */
  async toPNG() {
    const canvas = Object.assign(document.createElement("canvas"), { width: this.width, height: this.height });
    const context = canvas.getContext("2d", { alpha: false });
    const image = context.createImageData(this.width, this.height);
    const pixels = new Uint32Array(image.data.buffer);
    for (let i = 0; i < pixels.length; i++) pixels[i] = this.data[i] ? 0xffffffff : 0xff000000;
    context.putImageData(image, 0, 0);
    const blob = await new Promise((done) => canvas.toBlob(done, "image/png"));
    if (blob) return blob;
    throw new Error("The browser ran out of memory for the mask. Close other tabs, or open a smaller photo, and run it again.");
  }

  #whole() {
    return { x: 0, y: 0, width: this.width, height: this.height };
  }

  #clip(left, top, right, bottom) {
    const x = Math.max(0, Math.floor(left));
    const y = Math.max(0, Math.floor(top));
    const width = Math.min(this.width, Math.ceil(right)) - x;
    const height = Math.min(this.height, Math.ceil(bottom)) - y;
    return width > 0 && height > 0 ? { x, y, width, height } : null;
  }

  #fillRow(y, from, to, value) {
    const row = this.data.subarray(y * this.width + Math.max(0, from), y * this.width + Math.max(0, Math.min(this.width, to)));
    this.painted += change(row, (part) => part.fill(value));
  }

  #edit(box, work) {
    this.endStroke();
    const before = cut(this.data, this.width, box);
    for (const row of rows(this.data, this.width, box)) this.painted += change(row, work);
    this.#remember(box, before);
    this.#changed(box);
  }

  #paste(box, pixels) {
    rows(this.data, this.width, box).forEach((row, i) => {
      this.painted += change(row, (part) => part.set(pixels.subarray(i * box.width, (i + 1) * box.width)));
    });
    this.#changed(box);
  }

  #remember(box, before) {
    this.#undo.push({ box, pixels: before });
    this.#redo.length = 0;
    let held = this.#undo.reduce((sum, entry) => sum + entry.pixels.length, 0);
    while (held > HISTORY_BYTES && this.#undo.length > 1) held -= this.#undo.shift().pixels.length;
    this.dispatchEvent(new Event("history"));
  }

  #swap(from, to) {
    this.endStroke();
    const entry = from.pop();
    if (!entry) return;
    to.push({ box: entry.box, pixels: cut(this.data, this.width, entry.box) });
    this.#paste(entry.box, entry.pixels);
    this.dispatchEvent(new Event("history"));
  }

  #changed(box) {
    this.dispatchEvent(new CustomEvent("change", { detail: box }));
  }
}

/** Where row y crosses a thick line with round ends: the outermost of two discs and two side edges. Convex, so one span. */
function capsuleSpan(y, ax, ay, bx, by, radius) {
  let left = Infinity;
  let right = -Infinity;
  const reach = (from, to) => {
    left = Math.min(left, from);
    right = Math.max(right, to);
  };
  for (const [cx, cy] of [
    [ax, ay],
    [bx, by],
  ]) {
    const half = radius * radius - (y - cy) ** 2;
    if (half >= 0) reach(cx - Math.sqrt(half), cx + Math.sqrt(half));
  }
  const length = Math.hypot(bx - ax, by - ay);
  if (length > 0 && ay !== by) {
    const nx = (-(by - ay) / length) * radius;
    const ny = ((bx - ax) / length) * radius;
    for (const side of [-1, 1]) {
      const t = (y - (ay + side * ny)) / (by - ay);
      const x = ax + side * nx + t * (bx - ax);
      if (t >= 0 && t <= 1) reach(x, x);
    }
  }
  if (length > 0 && ay === by && Math.abs(y - ay) <= radius) reach(Math.min(ax, bx), Math.max(ax, bx));
  return left <= right ? [left, right] : null;
}

/** Do some work on bytes of 0 and 255. @returns how many more of them are set than before */
function change(row, work) {
  const before = sum(row);
  work(row);
  return (sum(row) - before) / 255;
}

function sum(row) {
  let total = 0;
  for (let i = 0; i < row.length; i++) total += row[i];
  return total;
}

function rows(data, width, box) {
  return Array.from({ length: box.height }, (_, i) =>
    data.subarray((box.y + i) * width + box.x, (box.y + i) * width + box.x + box.width),
  );
}

function cut(data, width, box) {
  const pixels = new Uint8Array(box.width * box.height);
  rows(data, width, box).forEach((row, i) => pixels.set(row, i * box.width));
  return pixels;
}

/** @param {Box|null} a @param {Box} b @returns {Box} */
function union(a, b) {
  if (!a) return b;
  const x = Math.min(a.x, b.x);
  const y = Math.min(a.y, b.y);
  return { x, y, width: Math.max(a.x + a.width, b.x + b.width) - x, height: Math.max(a.y + a.height, b.y + b.height) - y };
}
