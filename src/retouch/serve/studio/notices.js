/** What the person must read, over the stage and never in the way of a dialog. Problems stay until dismissed. */

import { $, icon, make } from "./dom.js";

const BRIEF_MS = 8000;

/**
 * @param {string} text
 * @param {{kind?: "problem"|"hint"|"done", title?: string, detail?: string, action?: {label: string, run: () => void}}} [more]
 */
export function notice(text, { kind = "hint", title = "", detail = "", action = null } = {}) {
  const panel = $("notices");
  const close = () => {
    box.remove();
    clearTimeout(timer);
  };
  const words = make(
    "div",
    { class: "notice-words" },
    title ? make("strong", {}, title) : null,
    make("p", {}, text),
    detail ? make("p", { class: "quiet" }, detail) : null,
  );
  const act = action
    ? make("button", { type: "button", class: "small", click: () => (close(), action.run()) }, action.label)
    : null;
  const dismiss = make("button", { type: "button", class: "bare", "aria-label": "Dismiss", click: close }, icon("close"));
  const box = make(
    "div",
    { class: `notice ${kind}`, role: kind === "problem" ? "alert" : "status" },
    icon(kind === "problem" ? "problem" : "hint"),
    words,
    act,
    dismiss,
  );
  for (const old of panel.querySelectorAll(kind === "problem" ? ".notice" : ".hint, .done")) old.remove();
  panel.append(box);
  const timer = kind === "problem" ? null : setTimeout(close, BRIEF_MS);
}

/** What went wrong, in the server's words, with what they say about mending it. */
export function problem(title, error, action = null) {
  const facts = [
    error.code,
    error.param && `field ${error.param}`,
    error.retryAfter && `try again in ${error.retryAfter} s`,
  ].filter(Boolean);
  notice(error.message, { kind: "problem", title, detail: facts.join(" · "), action });
}

/** Everything said so far is out of date. */
export const clearNotices = () => $("notices").replaceChildren();

/** One line for screen readers and for the foot of the stage. */
export function status(text) {
  if ($("status").textContent !== text) $("status").textContent = text;
}
