/** Buttons for the filters that the server has beside its model: each takes the whole photo, and makes one result of it. */

import { $, make } from "./dom.js";

/** "Remove background", "Upscale 4×" */
function words({ id, retouch }) {
  const text = id.replace(/[-_]+/g, " ");
  return text[0].toUpperCase() + text.slice(1) + (retouch.scale > 1 ? ` ${retouch.scale}×` : "");
}

/**
 * @param {{id: string, retouch: {type?: string, scale?: number, about?: string}}[]} models all that the server has
 * @param {(filter: string, label: string) => void} run
 */
export function showFilters(models, run) {
  const filters = models.filter((model) => model.retouch?.type === "filter");
  $("filters").hidden = filters.length === 0;
  const buttons = filters.map((filter) => {
    const label = words(filter);
    const told = { type: "button", class: "small", title: filter.retouch.about || null };
    return make("button", { ...told, click: () => run(filter.id, label) }, label);
  });
  $("filter-buttons").replaceChildren(...buttons);
}
