/** The server's jobs, newest first, each with a button to cancel it or to clear it away. Rows are kept, so focus stays put. */

import { $, make } from "./dom.js";
import * as format from "./format.js";

const WORDS = { queued: "Waiting", running: "Running", succeeded: "Done", failed: "Failed", cancelled: "Cancelled" };
const MOST = 50;

export class JobList {
  #rows = new Map();

  /** @param {import("./api.js").Api} api @param {() => void} changed called after a job was cancelled or cleared */
  constructor(api, changed) {
    Object.assign(this, { api, changed });
    this.body = $("job-rows");
  }

  /** @param {object[]} jobs */
  draw(jobs) {
    const shown = jobs.slice(0, MOST);
    for (const [id, row] of this.#rows) {
      if (shown.some((job) => job.id === id)) continue;
      row.remove();
      this.#rows.delete(id);
    }
    shown.forEach((job, i) => {
      if (!this.#rows.has(job.id)) this.#rows.set(job.id, this.#row(job));
      const row = this.#rows.get(job.id);
      this.#fill(row, job);
      if (this.body.children[i] !== row) this.body.insertBefore(row, this.body.children[i] ?? null);
    });
    $("jobs-none").hidden = shown.length > 0;
    $("jobs-table").hidden = shown.length === 0;
    $("jobs-more").textContent = jobs.length > MOST ? `and ${format.count(jobs.length - MOST)} more` : "";
  }

  #row(job) {
    const cells = ["Status", "Prompt", "Variations", "Size", "Took", "Age"].map((label) => make("td", { "data-label": label }));
    const button = make("button", { type: "button", class: "small", click: () => this.#end(job.id) });
    return make("tr", {}, ...cells, make("td", { class: "act" }, button));
  }

  #fill(row, job) {
    const [status, prompt, variations, size, took, age] = row.cells;
    const over = ["succeeded", "failed", "cancelled"].includes(job.status);
    set(status, WORDS[job.status] ?? job.status);
    status.className = `status status-${job.status}`;
    const name = job.filter ?? job.prompt;
    set(prompt, name || "–");
    prompt.title = job.error?.message ?? name ?? "";
    set(variations, `${job.done ?? 0} of ${job.n ?? 1}`);
    set(size, job.size?.replace("x", " × ") ?? "–");
    set(took, format.seconds(job.seconds));
    set(age, format.age(Date.now() / 1000 - job.created_at));
    const button = row.querySelector("button");
    set(button, over ? "Clear" : "Cancel");
    button.setAttribute("aria-label", `${over ? "Clear" : "Cancel"} “${name ?? job.id}”`);
  }

  async #end(id) {
    await this.api.cancel(id).catch((error) => ($("jobs-problem").textContent = error.message));
    this.changed();
  }
}

/** Leave the text alone where it has not changed, so that a selection in it survives. */
function set(element, text) {
  if (element.textContent !== text) element.textContent = text;
}
