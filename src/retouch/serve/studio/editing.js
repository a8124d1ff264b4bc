/** The form: from prompt and mask to results. Whatever goes wrong, prompt and mask stay. */

import { $ } from "./dom.js";
import * as format from "./format.js";
import { clearNotices, notice, problem, status } from "./notices.js";
import { decode } from "./session.js";

const PREVIEWS = 2;
const WORDS = { sending: "Sending…", queued: "Waiting for the device…", running: "Running", cancelling: "Cancelling…" };

export class Editing {
  #began = 0;
  /** From the press of Run until the last picture is in its place: the runner begins later and ends earlier. */
  #busy = false;
  /** @type {HTMLElement|null} the button that was pressed for what runs */
  #pressed = null;
  #clock = null;
  /** @type {import("./session.js").Result[]} by variation */
  #places = [];
  #decoding = Promise.resolve();

  /**
   * @param {{session: import("./session.js").Session, runner: import("./runner.js").Runner,
   *          gallery: import("./gallery.js").Gallery, stage: import("./stage.js").Stage,
   *          compare: import("./compare.js").Compare}} parts
   */
  constructor(parts) {
    Object.assign(this, parts);
    const { runner } = this;
    $("form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.run();
    });
    $("cancel").addEventListener("click", () => this.cancel());
    runner.addEventListener("state", () => this.#show());
    runner.addEventListener("preview", (event) => this.#inTurn(event.detail, (detail) => this.#preview(detail)));
    runner.addEventListener("variation", (event) => this.#inTurn(event.detail, (detail) => this.#finish(detail)));
  }

  /** Restore what a result was made with. */
  fill(result) {
    if (!result.filter) $("prompt").value = result.prompt;
    $("seed").value = result.seed ?? "";
  }

  async run() {
    const { session } = this;
    if (this.#busy || !this.#ready()) return;
    clearNotices();
    const edit = {
      photo: session.photo,
      prompt: $("prompt").value.trim(),
      n: Number(document.querySelector("[name=n]:checked").value),
      seed: $("seed").value,
      steps: $("steps").value,
      previews: $("previews").checked ? PREVIEWS : 0,
      fresh: $("fresh").checked,
    };
    await this.#go(edit, { prompt: edit.prompt }, () => this.run());
  }

  /** @param {string} filter takes the whole photo, and nothing of the form @param {string} label in the place of a prompt */
  async filter(filter, label) {
    const { session } = this;
    if (this.#busy) return;
    if (!session.photo) return void this.#missing("Open a photo first.", $("empty-open"));
    clearNotices();
    const edit = { photo: session.photo, model: filter, n: 1, seed: "" };
    await this.#go(edit, { prompt: label, filter }, () => this.filter(filter, label));
  }

  async #go(edit, told, again) {
    const { session, runner } = this;
    const { mask } = session;
    this.#busy = true;
    try {
      const shared = {
        photo: edit.photo,
        ...told,
        maskBits: mask.pack(),
        maskBox: edit.model ? null : mask.bounds(),
        bitmap: null,
        blob: null,
        usage: null,
        pending: true,
      };
      this.#places = Array.from({ length: edit.n }, (_, i) => ({
        ...shared,
        seed: edit.seed === "" ? null : Number(edit.seed) + i,
      }));
      session.addResults(this.#places);
      session.show("result", this.#places[0]);
      const whole = edit.model ? edit : { ...edit, mask: await mask.toPNG() };
      const end = await runner.run(whole).finally(() => this.#decoding);
      status(end === "cancelled" ? "Cancelled" : this.#summary());
      if (end === "cancelled") notice("Cancelled. Prompt and mask are as they were.", { kind: "done" });
    } catch (error) {
      problem("The edit did not work", error, error.status === 401 ? null : { label: "Run again", run: again });
      status("");
    } finally {
      this.#sweep();
      this.#busy = false;
    }
  }

  async cancel() {
    try {
      await this.runner.cancel();
    } catch (error) {
      problem("The job could not be cancelled", error);
    }
  }

  /** Says what is missing, and goes there. */
  #ready() {
    const { session } = this;
    if (!session.photo) return this.#missing("Open a photo first.", $("empty-open"));
    if ($("prompt").value.trim() === "") return this.#missing("Say what should be there.", $("prompt"));
    if (session.mask.empty) {
      const all = { label: "Select all", run: () => session.mask.invert() };
      session.show("mask");
      return this.#missing("Paint over the place to edit first.", $("above"), all);
    }
    for (const field of [$("seed"), $("steps")]) {
      if (field.validity.valid) continue;
      $("advanced").open ||= field === $("steps");
      return this.#missing(`${field === $("seed") ? "The seed" : "Steps"}: ${field.validationMessage}`, field);
    }
    return true;
  }

  #missing(text, where, action = null) {
    notice(text, { action });
    where.focus();
    return false;
  }

  /** Pictures are decoded one after the other, so that a late preview never covers what is newer. */
  #inTurn(detail, work) {
    this.#decoding = this.#decoding.then(() => work(detail)).catch((error) => problem("A picture could not be shown", error));
  }

  async #preview({ index, blob }) {
    const result = this.#places[index];
    if (!result?.pending) return;
    const old = result.bitmap;
    result.bitmap = await decode(blob);
    old?.close();
    this.gallery.refresh(result);
    if (this.session.selected === result) this.stage.redraw();
  }

  async #finish({ index, blob, seed, usage }) {
    const result = this.#places[index];
    if (!result?.pending) return;
    const preview = result.bitmap;
    const bitmap = await decode(blob);
    if (result.filter) seed = null;
    Object.assign(result, { bitmap, blob, seed, usage, pending: false });
    preview?.close();
    this.gallery.refresh(result);
    if (this.session.selected === result) {
      this.session.show(this.session.showing, result);
      if (result.filter) this.compare.set(0.5);
      else this.compare.besides(result);
    }
    this.session.dispatchEvent(new Event("results"));
    this.#show();
  }

  /** What never came is taken away again. */
  #sweep() {
    const gone = this.#places.filter((result) => result.pending);
    this.session.removeResults(gone);
    if (gone.length === this.#places.length) this.session.show("mask");
    for (const { bitmap } of gone) bitmap?.close();
    this.#places = [];
  }

  #summary() {
    const made = this.#places.filter((result) => !result.pending).length;
    return `${made} ${made === 1 ? "result" : "results"} in ${format.seconds((performance.now() - this.#began) / 1000)}`;
  }

  #show() {
    const { runner } = this;
    const working = !runner.idle;
    if (working && !this.#clock) {
      this.#began = performance.now();
      this.#pressed = null;
      this.#clock = setInterval(() => this.#tick(), 100);
    }
    if (!working) this.#clock = clearInterval(this.#clock) ?? null;
    const filters = [...$("filter-buttons").children];
    const focused = document.activeElement;
    const had = working ? focused === $("run") || filters.includes(focused) : focused === $("cancel");
    if (working && had) this.#pressed = focused;
    for (const button of filters) button.disabled = working;
    $("run").hidden = working;
    $("cancel").hidden = !working;
    $("cancel").disabled = runner.state === "cancelling";
    $("progress").hidden = !working;
    $("stage").classList.toggle("busy", working);
    if (had) (working ? $("cancel") : (this.#pressed ?? $("run"))).focus();
    if (working) {
      status(
        runner.wanted > 1 && runner.state === "running"
          ? `Running: ${runner.done} of ${runner.wanted} done`
          : WORDS[runner.state],
      );
      this.#tick();
    }
    this.stage.busy = working;
    this.stage.redraw();
  }

  #tick() {
    const { runner } = this;
    const bar = $("progress-bar");
    if (runner.done > 0 && runner.wanted > 1) Object.assign(bar, { max: runner.wanted, value: runner.done });
    else bar.removeAttribute("value");
    const done =
      runner.state === "running" && runner.wanted > 1 ? `${runner.done} of ${runner.wanted} done` : WORDS[runner.state];
    $("progress-text").textContent = `${done} · ${((performance.now() - this.#began) / 1000).toFixed(1)} s`;
  }
}
