/** Dark or light: what the system prefers, until the button says otherwise. Runs before the first paint. */

const NAME = "retouch.theme";
const light = matchMedia("(prefers-color-scheme: light)");

const current = () => localStorage.getItem(NAME) ?? (light.matches ? "light" : "dark");

function wear() {
  document.documentElement.dataset.theme = current();
  const button = document.getElementById("theme");
  if (!button) return;
  const other = current() === "dark" ? "light" : "dark";
  button.setAttribute("aria-label", `Switch to ${other} colours`);
  button.title = `Switch to ${other} colours`;
}

/** A choice that equals the system's is no choice: the page follows the system again. */
export function toggleTheme() {
  const next = current() === "dark" ? "light" : "dark";
  if (next === (light.matches ? "light" : "dark")) localStorage.removeItem(NAME);
  else localStorage.setItem(NAME, next);
  wear();
}

light.addEventListener("change", wear);
document.addEventListener("DOMContentLoaded", wear);
wear();
