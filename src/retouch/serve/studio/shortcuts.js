/** Keys. Single letters work wherever nothing is being typed, and can be switched off in the help dialog. */

import { openDialog } from "./dialogs.js";

const NAME = "retouch.shortcuts";
const TYPING = "input:not([type=range],[type=radio],[type=checkbox]), textarea, select, [contenteditable]";

export const lettersOn = () => localStorage.getItem(NAME) !== "off";
export const setLetters = (on) => (on ? localStorage.removeItem(NAME) : localStorage.setItem(NAME, "off"));

/**
 * @param {Record<string, () => void>} letters by key, as "b", "[", "shift+z"
 * @param {Record<string, () => unknown>} always by key, with "mod+" for Ctrl or Cmd; false leaves it to the browser
 * @param {{active: () => boolean, space: (held: boolean) => void, overStage: () => boolean}} more
 */
export function shortcuts(letters, always, { active, space, overStage }) {
  window.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || event.isComposing || openDialog() || !active()) return;
    const typing = event.target.closest?.(TYPING);
    if (event.key === " " && !typing && overStage()) {
      event.preventDefault();
      if (!event.repeat) space(true);
      return;
    }
    const name = spell(event);
    const action = always[name] && !(typing && name.includes("z")) && !(typing && name === "mod+y") ? always[name] : null;
    if (action) {
      if (action(event) !== false) event.preventDefault();
      return;
    }
    if (typing || event.ctrlKey || event.metaKey || event.altKey || !lettersOn()) return;
    const letter = letters[name] ?? letters[event.key.toLowerCase()];
    if (!letter) return;
    event.preventDefault();
    letter(event);
  });
  window.addEventListener("keyup", (event) => {
    if (event.key !== " ") return;
    if (overStage() && !event.target.closest?.(TYPING)) event.preventDefault();
    space(false);
  });
  window.addEventListener("blur", () => space(false));
}

function spell(event) {
  const mod = event.ctrlKey || event.metaKey ? "mod+" : "";
  const shift = event.shiftKey && /^([a-z]|Arrow\w+|Enter)$/i.test(event.key) ? "shift+" : "";
  return mod + shift + event.key.toLowerCase();
}
