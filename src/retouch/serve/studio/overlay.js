/** How the mask looks on the photo: a hatched tint and a black-and-white striped rim, so that it shows on any picture. */

const TINT = [255, 46, 110];
const TINT_ALPHA = 0.5;
const RIM = 1.5;
const STRIPE = 6;

export class Overlay {
  #mask = null;
  #pixels = document.createElement("canvas");
  #fill = document.createElement("canvas");
  #rim = document.createElement("canvas");
  #hatch = stripes([`rgb(${TINT.join(" ")})`, "rgb(255 120 160)"], 5);
  #ants = stripes(["#fff", "#111"], STRIPE);
  #stale = true;

  /** @param {import("./mask.js").Mask} mask */
  setMask(mask) {
    this.#mask = mask;
    Object.assign(this.#pixels, { width: mask.width, height: mask.height });
    this.update({ x: 0, y: 0, width: mask.width, height: mask.height });
  }

  /** Some of the mask's pixels have changed. @param {import("./mask.js").Box} box */
  update(box) {
    const image = new ImageData(box.width, box.height);
    const pixels = new Uint32Array(image.data.buffer);
    for (let y = 0; y < box.height; y++) {
      const from = (box.y + y) * this.#mask.width + box.x;
      for (let x = 0; x < box.width; x++) pixels[y * box.width + x] = this.#mask.data[from + x] ? 0xffffffff : 0;
    }
    this.#pixels.getContext("2d").putImageData(image, box.x, box.y);
    this.#stale = true;
  }

  /** Call when the view has moved. */
  moved() {
    this.#stale = true;
  }

  /**
   * @param {CanvasRenderingContext2D} context of the stage, in device pixels
   * @param {import("./view.js").View} view
   * @param {{ratio: number, tint: boolean, phase: number}} how phase moves the stripes of the rim
   */
  paint(context, view, { ratio, tint, phase }) {
    if (!this.#mask || this.#mask.empty) return;
    const { width, height } = context.canvas;
    if (this.#stale || this.#fill.width !== width || this.#fill.height !== height) this.#compose(width, height, view, ratio);
    if (tint) {
      context.globalAlpha = TINT_ALPHA;
      context.drawImage(this.#fill, 0, 0);
      context.globalAlpha = 1;
    }
    context.drawImage(this.#striped(phase * ratio), 0, 0);
  }

  #compose(width, height, view, ratio) {
    this.#stale = false;
    const fill = blank(this.#fill, width, height);
    this.#place(fill, view, ratio, 0, 0);
    fill.globalCompositeOperation = "source-in";
    fill.fillStyle = this.#hatch;
    fill.fillRect(0, 0, width, height);
    const rim = blank(this.#rim, width, height);
    const reach = RIM * ratio;
    for (const [dx, dy] of [
      [-1, 0],
      [1, 0],
      [0, -1],
      [0, 1],
      [-0.7, -0.7],
      [0.7, -0.7],
      [-0.7, 0.7],
      [0.7, 0.7],
    ]) {
      this.#place(rim, view, ratio, dx * reach, dy * reach);
    }
    rim.globalCompositeOperation = "destination-out";
    this.#place(rim, view, ratio, 0, 0);
  }

  #striped(phase) {
    const rim = this.#rim.getContext("2d");
    rim.globalCompositeOperation = "source-in";
    this.#ants.setTransform(new DOMMatrix().translate(phase, 0));
    rim.fillStyle = this.#ants;
    rim.fillRect(0, 0, this.#rim.width, this.#rim.height);
    return this.#rim;
  }

  #place(context, view, ratio, dx, dy) {
    context.imageSmoothingEnabled = view.scale < 1;
    const { width, height } = this.#mask;
    context.drawImage(
      this.#pixels,
      view.x * ratio + dx,
      view.y * ratio + dy,
      width * view.scale * ratio,
      height * view.scale * ratio,
    );
  }
}

function blank(canvas, width, height) {
  Object.assign(canvas, { width, height });
  return canvas.getContext("2d");
}

/** Diagonal stripes of two colours. */
function stripes([first, second], size) {
  const tile = document.createElement("canvas");
  const context = blank(tile, 2 * size, 2 * size);
  for (let y = 0; y < 2 * size; y++) {
    for (let x = 0; x < 2 * size; x++) {
      context.fillStyle = (x + y) % (2 * size) < size ? first : second;
      context.fillRect(x, y, 1, 1);
    }
  }
  return context.createPattern(tile, "repeat");
}
