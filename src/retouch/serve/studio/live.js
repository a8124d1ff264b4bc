/** The Live tab: the server's figures once a second, while somebody looks. */

import { Series, sparkline } from "./chart.js";
import { bar, meter, stages, total } from "./cost.js";
import { $, make } from "./dom.js";
import * as format from "./format.js";
import { JobList } from "./joblist.js";

const EVERY_MS = 1000;
const WINDOW_MS = 10_000;
const CACHES = { documents: "Photos", prompts: "Prompts", results: "Results", uploads: "Uploads", decoded: "Uploads, decoded" };

export class Live {
  #shown = false;
  #timer = null;
  #abort = null;
  #history = [];
  #series = {
    rate: new Series(),
    p50: new Series(),
    p95: new Series(),
    running: new Series(),
    waiting: new Series(),
    price: new Series(),
    step: new Series(),
    tokens: new Series(),
  };

  /** @param {import("./api.js").Api} api */
  constructor(api) {
    this.api = api;
    this.jobs = new JobList(api, () => this.#poll());
    document.addEventListener("visibilitychange", () => this.#arrange());
  }

  show(shown) {
    this.#shown = shown;
    this.#arrange();
  }

  #arrange() {
    clearTimeout(this.#timer);
    this.#abort?.abort();
    if (this.#shown && !document.hidden) this.#poll();
  }

  async #poll() {
    clearTimeout(this.#timer);
    this.#abort?.abort();
    const abort = (this.#abort = new AbortController());
    try {
      const [stats, jobs] = await Promise.all([this.api.stats(abort.signal), this.api.jobs(abort.signal)]);
      if (abort.signal.aborted) return;
      this.#draw(stats);
      this.jobs.draw(jobs.data ?? []);
      this.#say("");
    } catch (error) {
      if (abort.signal.aborted) return;
      this.#say(error.message);
      if (error.status === 401) return;
    }
    this.#timer = setTimeout(() => this.#poll(), EVERY_MS);
  }

  #say(problem) {
    if ($("live-problem").textContent !== problem) $("live-problem").textContent = problem;
    $("live-problem").hidden = problem === "";
    $("live-figures").classList.toggle("stale", problem !== "");
  }

  #draw(stats) {
    this.#remember(stats);
    this.#heads(stats);
    this.#step(stats.step ?? {});
    this.#saved(stats);
    this.#caches(stats.caches ?? {});
    $("live-server").textContent = [stats.model, stats.device, `up ${format.age(stats.uptime_seconds ?? 0)}`]
      .filter(Boolean)
      .join(" · ");
  }

  /** Finished edits a second over the last ten: two answers of the server are enough to begin with. */
  #rate() {
    const [first, last] = [this.#history[0], this.#history.at(-1)];
    return last.at > first.at ? ((last.done - first.done) / (last.at - first.at)) * 1000 : 0;
  }

  #remember(stats) {
    const now = performance.now();
    const done = stats.edits?.succeeded ?? 0;
    if (this.#history.length && done < this.#history.at(-1).done) this.#history = [];
    this.#history.push({ at: now, done });
    while (this.#history.length > 2 && now - this.#history[0].at > WINDOW_MS) this.#history.shift();
    const { rate, p50, p95, running, waiting, price, step, tokens } = this.#series;
    rate.push(this.#rate());
    p50.push(stats.latency?.p50);
    p95.push(stats.latency?.p95);
    running.push(stats.queue?.running);
    waiting.push(stats.queue?.waiting);
    price.push(stats.dollars_per_million_edits);
    step.push(stats.step?.seconds);
    tokens.push(stats.step?.tokens);
  }

  #heads({ edits = {}, latency, queue = {}, dollars, dollars_per_million_edits: million, price_per_hour: hour }) {
    const { rate, p50, p95, running, waiting, price } = this.#series;
    const ended = [
      ["failed", edits.failed],
      ["cancelled", edits.cancelled],
      ["rejected", edits.rejected],
    ].filter(([, value]) => value > 0);
    figure(
      "rate",
      format.rate(this.#rate()),
      [`${format.count(edits.succeeded)} done`, ...ended.map(([name, value]) => `${format.count(value)} ${name}`)].join(" · "),
      rate,
    );
    figure(
      "latency",
      format.seconds(latency?.p50),
      latency ? `95 % within ${format.seconds(latency.p95)} · of ${format.count(latency.n)} edits` : "no edit finished yet",
      p50,
      p95,
    );
    figure(
      "queue",
      format.count(queue.running),
      `${format.count(queue.waiting)} waiting · room for ${format.count(queue.limit)}`,
      running,
      waiting,
    );
    const priced = format.known(hour);
    figure(
      "cost",
      priced ? format.dollars(million) : "–",
      priced ? `${format.dollars(dollars)} in all · at ${format.dollars(hour)} an hour` : "this server has no price an hour",
      price,
    );
  }

  #step({ seconds, tokens, edits, budget }) {
    figure(
      "step",
      format.seconds(seconds),
      format.known(edits) ? `${format.rate(edits)} edits share a step` : "no step yet",
      this.#series.step,
    );
    const used = format.known(tokens) && budget ? tokens / budget : 0;
    const text = `${format.count(tokens)} of ${format.count(budget)}`;
    figure(
      "tokens",
      format.count(tokens),
      format.known(budget) ? `of a budget of ${format.count(budget)}` : "",
      this.#series.tokens,
    );
    $("tokens-meter").replaceChildren(meter("Tokens a step of the budget", used, text));
  }

  #saved({ tokens = {}, seconds = {} }) {
    const { computed = 0, whole = 0 } = tokens;
    const share = whole ? computed / whole : null;
    $("saved-share").textContent = share === null ? "–" : format.percent(1 - share);
    const parts = [
      ["Computed", share ?? 0, format.count(computed), "step"],
      ["Saved", share === null ? 0 : 1 - share, format.count(whole - computed), "saved"],
    ];
    $("saved-bar").replaceChildren(bar("Tokens", parts));
    $("stage-total").textContent = format.seconds(total(seconds));
    $("stage-bar").replaceChildren(stages(seconds));
  }

  #caches(caches) {
    const rows = Object.entries(caches).map(([name, cache]) => {
      const hits = total(cache.hits);
      const asked = hits + (cache.misses ?? 0) + (cache.joined ?? 0);
      const tiers = Object.keys(cache.hits ?? {}).filter((tier) => cache.hits[tier] > 0);
      const by = tiers.length > 1 ? ` (${tiers.map((tier) => `${tier} ${format.count(cache.hits[tier])}`).join(", ")})` : "";
      const room = Object.entries(cache.bytes ?? {}).map(
        ([tier, value]) => `${format.bytes(value)} of ${format.bytes(cache.budget?.[tier])}`,
      );
      const cells = [
        ["Hits", format.count(hits) + by],
        ["Misses", format.count(cache.misses)],
        ["Hit rate", asked ? format.percent((hits + (cache.joined ?? 0)) / asked) : "–"],
        ["Held", room.join(", ") || "–"],
        ["Time saved", format.seconds(cache.saved_seconds)],
      ];
      return make(
        "tr",
        {},
        make("th", { scope: "row" }, CACHES[name] ?? name),
        ...cells.map(([label, text]) => make("td", { "data-label": label }, text)),
      );
    });
    $("cache-rows").replaceChildren(...rows);
  }
}

/** One head figure: value, note and chart by their ids. */
function figure(name, value, note, ...series) {
  $(`${name}-value`).textContent = value;
  $(`${name}-note`).textContent = note;
  sparkline($(`${name}-chart`), ...series);
}
