/** The two dialogs: the list of shortcuts, and the key of a server that wants one. */

import { $ } from "./dom.js";

export const openDialog = () => document.querySelector("dialog[open]");

export function showHelp() {
  if (!openDialog()) $("help").showModal();
}

/** @param {boolean} wrong whether a key was given and refused @returns {Promise<string|null>} null where the person declines */
export function askKey(wrong) {
  const dialog = $("key-dialog");
  const field = $("key-field");
  openDialog()?.close();
  $("key-wrong").hidden = !wrong;
  field.value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((done) => {
    dialog.addEventListener("close", () => done((dialog.returnValue === "give" && field.value.trim()) || null), { once: true });
  });
}

/** A click on the backdrop closes, as Esc does. */
export function wireDialogs() {
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.addEventListener("click", (event) => outside(dialog, event) && dialog.close("dismiss"));
    for (const button of dialog.querySelectorAll("[data-close]"))
      button.addEventListener("click", () => dialog.close("dismiss"));
  }
}

/** Enter and Space on a button click at (0, 0), and are no click beside the dialog. */
function outside(dialog, { target, clientX, clientY }) {
  const { left, right, top, bottom } = dialog.getBoundingClientRect();
  return target === dialog && (clientX < left || clientX > right || clientY < top || clientY > bottom);
}
