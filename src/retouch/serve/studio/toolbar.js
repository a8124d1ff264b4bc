/** The rail and the settings of the tool in hand, kept in step with `Tools`, the mask and the view. */

import { $ } from "./dom.js";
import * as format from "./format.js";

const FIELDS = ["x", "y", "width", "height"];
const ZOOM = 1.25;

/**
 * @param {{tools: import("./tools.js").Tools, session: import("./session.js").Session,
 *          view: import("./view.js").View, stage: import("./stage.js").Stage}} parts
 */
export function toolbar({ tools, session, view, stage }) {
  const paint = (work) => {
    if (!session.mask) return;
    session.show("mask");
    work(session.mask);
  };
  const actions = {
    undo: () => paint((mask) => mask.undo()),
    redo: () => paint((mask) => mask.redo()),
    invert: () => paint((mask) => mask.invert()),
    clear: () => paint((mask) => mask.clear()),
    "zoom-in": () => view.zoom(ZOOM),
    "zoom-out": () => view.zoom(1 / ZOOM),
    "zoom-fit": () => view.fit(),
    "zoom-actual": () => view.zoomTo(1),
    "mask-shown": () => {
      stage.maskShown = !stage.maskShown;
      $("mask-shown").setAttribute("aria-pressed", String(stage.maskShown));
      stage.redraw();
    },
    "rect-subtract": () => paint((mask) => mask.rectangle(tools.rectangle, false)),
  };
  for (const [id, action] of Object.entries(actions)) $(id).addEventListener("click", action);
  $("rectangle-options").addEventListener("submit", (event) => {
    event.preventDefault();
    paint((mask) => mask.rectangle(tools.rectangle, true));
  });
  for (const field of FIELDS) {
    $(`rect-${field}`).addEventListener("change", () => {
      tools.setRectangle(Object.fromEntries(FIELDS.map((name) => [name, $(`rect-${name}`).value])));
    });
  }
  for (const radio of document.querySelectorAll("[name=tool]")) {
    radio.addEventListener("change", () => tools.pick(radio.value));
    radio.addEventListener("click", () => session.photo && session.show("mask"));
  }
  $("size").addEventListener("input", () => (tools.slider = Number($("size").value)));

  tools.addEventListener("change", () => showTools(tools));
  view.addEventListener("change", () => showZoom(view));
  session.addEventListener("photo", () => {
    tools.suit(session.photo);
    showMask(session.mask, session.photo);
  });
  for (const type of ["paint", "history"]) session.addEventListener(type, () => showMask(session.mask, session.photo));
  showTools(tools);
  return actions;
}

function showTools(tools) {
  for (const radio of document.querySelectorAll("[name=tool]")) radio.checked = radio.value === tools.tool;
  $("size-options").hidden = !["brush", "eraser"].includes(tools.tool);
  $("rectangle-options").hidden = tools.tool !== "rectangle";
  $("hand-options").hidden = tools.tool !== "hand";
  $("size").value = tools.slider;
  $("size").setAttribute("aria-valuetext", `${tools.size} pixels`);
  $("size-text").textContent = `${tools.size} px`;
  for (const field of FIELDS) $(`rect-${field}`).value = tools.rectangle[field];
}

function showZoom(view) {
  const text = `${Math.round(view.scale * 100)} %`;
  $("zoom-actual").textContent = text;
  $("zoom-actual").setAttribute("aria-label", `Actual size; now ${text}`);
}

function showMask(mask, photo) {
  $("undo").disabled = !mask.canUndo;
  $("redo").disabled = !mask.canRedo;
  const masked = mask.empty ? "no mask yet" : `mask ${format.percent(mask.share)}`;
  $("facts").textContent = `${photo.width} × ${photo.height} · ${masked}`;
}
