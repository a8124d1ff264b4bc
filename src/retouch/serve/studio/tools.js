/** Which tool is in hand, its size, and the rectangle that can be typed. Emits "change". */

export const TOOLS = ["brush", "eraser", "rectangle", "hand"];
const SMALLEST = 1;

export class Tools extends EventTarget {
  tool = "brush";
  /** Brush width in pixels of the photo. */
  size = 40;
  largest = 400;
  /** @type {import("./mask.js").Box} */
  rectangle = { x: 0, y: 0, width: 1, height: 1 };
  #photo = { width: 1, height: 1 };

  pick(tool) {
    this.tool = tool;
    this.#changed();
  }

  /** For a new photo: a brush that suits it, and a rectangle in its middle. */
  suit({ width, height }) {
    if (width === this.#photo.width && height === this.#photo.height) return;
    this.#photo = { width, height };
    this.largest = Math.max(16, Math.round(Math.max(width, height) / 2));
    this.size = Math.max(SMALLEST, Math.round(Math.min(width, height) / 9));
    const box = { width: Math.round(width / 4), height: Math.round(height / 4) };
    this.setRectangle({ x: Math.round((width - box.width) / 2), y: Math.round((height - box.height) / 2), ...box });
  }

  setSize(size) {
    this.size = Math.min(this.largest, Math.max(SMALLEST, Math.round(size)));
    this.#changed();
  }

  /** One key press: a fifth, and at least a pixel. */
  nudgeSize(direction) {
    this.setSize(direction > 0 ? Math.max(this.size + 1, this.size * 1.2) : Math.min(this.size - 1, this.size / 1.2));
  }

  /** The slider runs from 0 to 100, by the logarithm: small brushes need finer steps. */
  get slider() {
    return (100 * Math.log(this.size / SMALLEST)) / Math.log(this.largest / SMALLEST);
  }

  set slider(value) {
    this.setSize(SMALLEST * (this.largest / SMALLEST) ** (value / 100));
  }

  setRectangle(box) {
    const fit = (value, least, most) => Math.min(most, Math.max(least, Math.round(Number(value) || 0)));
    const width = fit(box.width, 1, this.#photo.width);
    const height = fit(box.height, 1, this.#photo.height);
    this.rectangle = {
      x: fit(box.x, 0, this.#photo.width - width),
      y: fit(box.y, 0, this.#photo.height - height),
      width,
      height,
    };
    this.#changed();
  }

  moveRectangle(dx, dy) {
    const { x, y, ...size } = this.rectangle;
    this.setRectangle({ x: x + dx, y: y + dy, ...size });
  }

  growRectangle(dx, dy) {
    const { width, height, ...at } = this.rectangle;
    this.setRectangle({ ...at, width: width + dx, height: height + dy });
  }

  #changed() {
    this.dispatchEvent(new Event("change"));
  }
}
