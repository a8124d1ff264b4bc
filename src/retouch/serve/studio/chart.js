/** Small line charts, drawn by hand: the last minutes of one figure. */

import { draw } from "./dom.js";

const WIDTH = 240;
const HEIGHT = 44;
const LENGTH = 120;
/** A young series is drawn as if it had this many values, so that it is seen at all. */
const LEAST = 24;

/** The newest values of one figure; `null` where there was none. */
export class Series {
  values = [];

  push(value) {
    this.values.push(Number.isFinite(value) ? value : null);
    if (this.values.length > LENGTH) this.values.shift();
  }
}

/**
 * Draw series into an SVG element, from zero to the largest value of all. Colour comes from the style sheet (.line-0, .line-1).
 * @param {SVGElement} svg @param {Series[]} series
 */
export function sparkline(svg, ...series) {
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  svg.setAttribute("preserveAspectRatio", "none");
  const top = Math.max(...series.flatMap(({ values }) => values.filter((value) => value !== null)), 1e-9);
  const nodes = series.flatMap(({ values }, i) => shapes(values, top, i));
  svg.replaceChildren(...nodes);
}

function shapes(values, top, index) {
  const span = Math.max(values.length, LEAST) - 1;
  const points = values.map((value, i) =>
    value === null ? null : [WIDTH - ((values.length - 1 - i) / span) * WIDTH, HEIGHT - 2 - (value / top) * (HEIGHT - 6)],
  );
  const runs = [];
  let open = null;
  for (const point of points) {
    if (!point) open = null;
    else if (open) open.push(point);
    else runs.push((open = [point]));
  }
  return runs.flatMap((run) => {
    const line = run.map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`).join(" L ");
    const shape = draw("path", {
      class: `line line-${index}`,
      d: `M ${line}${run.length === 1 ? " h 0.1" : ""}`,
      "vector-effect": "non-scaling-stroke",
    });
    if (index > 0) return [shape];
    return [
      draw("path", {
        class: "area",
        d: `M ${run[0][0].toFixed(1)} ${HEIGHT} L ${line} L ${run.at(-1)[0].toFixed(1)} ${HEIGHT} Z`,
      }),
      shape,
    ];
  });
}
