/** A drawn evening scene, for whoever has no photo at hand. Always the same picture. */

const WIDTH = 512;
const HEIGHT = 384;

/** @returns {Promise<Blob>} */
export function drawScene() {
  const canvas = Object.assign(document.createElement("canvas"), { width: WIDTH, height: HEIGHT });
  const context = canvas.getContext("2d");
  const fill = (style, path) => {
    context.fillStyle = style;
    context.fill(path);
  };
  const sky = shade(context, 0, HEIGHT, ["#274a76", "#7d8fae", "#f3c79a", "#f6e3c0"]);
  context.fillStyle = sky;
  context.fillRect(0, 0, WIDTH, HEIGHT);
  const glow = context.createRadialGradient(366, 196, 6, 366, 196, 190);
  for (const [at, colour] of [
    [0, "#fffbe8"],
    [0.13, "#fff2c4"],
    [0.16, "rgb(255 226 160 / 55%)"],
    [1, "rgb(255 220 160 / 0%)"],
  ])
    glow.addColorStop(at, colour);
  context.fillStyle = glow;
  context.fillRect(0, 0, WIDTH, HEIGHT);
  fill(
    shade(context, 150, 290, ["#6f7fa0", "#a9a6b4"]),
    ridge(225, [
      [48, 2.1, 0.4],
      [17, 5.3, 1.1],
      [5, 14, 2],
    ]),
  );
  fill(
    shade(context, 190, 330, ["#4d6b78", "#86938f"]),
    ridge(262, [
      [30, 2.9, 2.2],
      [12, 7.7, 0.3],
    ]),
  );
  fill(
    shade(context, 250, 384, ["#4c7a4e", "#7fa04f", "#9db85a"]),
    ridge(300, [
      [16, 1.7, 4],
      [5, 6.1, 0],
    ]),
  );
  grain(context);
  return new Promise((done) => canvas.toBlob(done, "image/png"));
}

function shade(context, from, to, colours) {
  const gradient = context.createLinearGradient(0, from, 0, to);
  colours.forEach((colour, i) => gradient.addColorStop(i / (colours.length - 1), colour));
  return gradient;
}

/** A line of hills: waves of a height, a number and a phase, filled to the bottom. */
function ridge(level, waves) {
  const path = new Path2D();
  path.moveTo(0, HEIGHT);
  for (let x = 0; x <= WIDTH; x += 2) {
    path.lineTo(
      x,
      level - waves.reduce((sum, [height, times, phase]) => sum + height * Math.sin((x / WIDTH) * times * Math.PI + phase), 0),
    );
  }
  path.lineTo(WIDTH, HEIGHT);
  path.closePath();
  return path;
}

/** A little noise keeps the gradients from banding. */
function grain(context) {
  const image = context.getImageData(0, 0, WIDTH, HEIGHT);
  let state = 7;
  for (let i = 0; i < image.data.length; i += 4) {
    state = (state * 1664525 + 1013904223) >>> 0;
    const noise = (state >>> 24) / 64 - 2;
    for (let c = 0; c < 3; c++) image.data[i + c] += noise;
  }
  context.putImageData(image, 0, 0);
}
