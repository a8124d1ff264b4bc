/** The ways a photo comes in: picker, drop, paste. */

import { $ } from "./dom.js";

/** @param {(file: File) => void} open @returns {() => void} shows the file picker */
export function opening(open) {
  const picker = $("file");
  const pick = () => picker.click();
  picker.addEventListener("change", () => {
    if (picker.files[0]) open(picker.files[0]);
    picker.value = "";
  });
  for (const id of ["open", "empty-open"]) $(id).addEventListener("click", pick);
  acceptDrops(open);
  window.addEventListener("paste", (event) => {
    const file = picture(event.clipboardData);
    if (!file) return;
    event.preventDefault();
    open(file);
  });
  return pick;
}

function acceptDrops(open) {
  let depth = 0;
  const over = (change) => {
    depth = Math.max(0, depth + change);
    $("drop").hidden = depth === 0;
  };
  const files = (event) => [...event.dataTransfer.types].includes("Files");
  window.addEventListener("dragenter", (event) => files(event) && over(1));
  window.addEventListener("dragleave", (event) => files(event) && over(-1));
  window.addEventListener("dragover", (event) => files(event) && event.preventDefault());
  window.addEventListener("drop", (event) => {
    if (!files(event)) return;
    event.preventDefault();
    over(-depth);
    const file = picture(event.dataTransfer) ?? event.dataTransfer.files[0];
    if (file) open(file);
  });
}

/** @param {DataTransfer} data @returns {File|undefined} */
const picture = (data) => [...(data?.files ?? [])].find((file) => file.type.startsWith("image/"));
