/**
 * One job from submission to its last event: submit, follow, cancel. Only one at a time.
 * Emits "state" (idle, sending, queued, running, cancelling), "preview" {index, blob}, "variation" {index, blob, seed, usage},
 * and rejects with what went wrong; a cancelled job resolves with "cancelled".
 */

import { ApiError, Unreachable } from "./api.js";

const FINAL = ["succeeded", "failed", "cancelled"];
const TRIES = 5;
const GIVE_UP_MS = 15_000;

export class Runner extends EventTarget {
  state = "idle";
  done = 0;
  wanted = 0;
  #job = null;
  #cancelled = false;
  #abort = null;
  #seen = new Set();

  constructor(api, session) {
    super();
    Object.assign(this, { api, session });
  }

  get idle() {
    return this.state === "idle";
  }

  /**
   * @param {{photo: import("./session.js").Photo, mask: Blob, prompt: string, n: number, seed: string, steps: string,
   *          previews: number, fresh: boolean} | {photo: import("./session.js").Photo, model: string, n: 1}} edit the latter
   *          for a filter
   * @returns {Promise<"succeeded"|"cancelled">}
   */
  async run(edit) {
    this.#cancelled = false;
    this.#abort = new AbortController();
    this.#seen.clear();
    this.done = 0;
    this.wanted = edit.n;
    this.#become("sending");
    try {
      const job = await this.#submit(edit);
      this.#job = job.id;
      this.#become("queued");
      return await this.#follow(job.id);
    } catch (error) {
      if (this.#cancelled && error.name === "AbortError") return "cancelled";
      throw error;
    } finally {
      this.#job = null;
      this.#abort.abort();
      this.#become("idle");
    }
  }

  /** Ask the server to stop, once: asked again, it forgets the job. What is still being sent is over at once. */
  async cancel() {
    if (this.idle || this.#cancelled) return;
    const { state } = this;
    const abort = this.#abort;
    this.#cancelled = true;
    this.#become("cancelling");
    if (!this.#job) return void abort.abort();
    const giveUp = setTimeout(() => abort.abort(), GIVE_UP_MS);
    try {
      await this.api.cancel(this.#job);
    } catch (error) {
      if (abort.signal.aborted || (error instanceof ApiError && error.status === 404)) return;
      clearTimeout(giveUp);
      this.#cancelled = false;
      this.#become(state);
      throw error;
    }
  }

  /** When the page goes away, nobody waits for the job any more. One that is still being sent is cancelled once it has an id. */
  leave() {
    if (this.idle) return;
    if (this.#job) return void this.api.cancel(this.#job, true).catch(() => {});
    this.#cancelled = true;
    this.#abort.abort();
  }

  /** The server forgets documents after a while (and when it restarts): then upload again, once. */
  async #submit(edit) {
    const { signal } = this.#abort;
    for (let again = false; ; again = true) {
      const fields = {
        document: await unlessAborted(signal, this.session.uploaded(edit.photo)),
        model: edit.model,
        mask: edit.mask,
        mask_mode: "white",
        prompt: edit.prompt,
        n: edit.n,
        seed: edit.seed,
        num_inference_steps: edit.steps,
        partial_images: edit.previews,
        output_format: "png",
        use_cache: edit.fresh ? "false" : null,
      };
      try {
        return await unlessAborted(signal, this.#asked(fields, signal));
      } catch (error) {
        if (again || !(error instanceof ApiError && error.status === 404)) throw error;
        edit.photo.id = null;
      }
    }
  }

  /** Not aborted, for the server may have made the job already: one that nobody waits for any more is cancelled by its name. */
  async #asked(fields, signal) {
    const job = await this.api.submit(fields);
    if (signal.aborted) this.api.cancel(job.id, true).catch(() => {});
    return job;
  }

  /** Events until the last one. A broken connection is taken up again: the server replays what has passed. */
  async #follow(id) {
    for (let failures = 0; ; failures++) {
      try {
        for await (const event of this.api.events(id, this.#abort.signal)) {
          failures = 0;
          const end = await this.#take(event);
          if (end) return end;
        }
      } catch (error) {
        if (!(error instanceof Unreachable) || failures >= TRIES) throw error;
      }
      if (failures >= TRIES) throw new Unreachable();
      await new Promise((done) => setTimeout(done, 250 * 2 ** failures));
    }
  }

  /** @returns {Promise<string|null>} how the job ended, if this was its last event */
  async #take(event) {
    switch (event.type) {
      case "job.status":
        if (event.status === "failed") throw failure(event.error);
        if (FINAL.includes(event.status)) return event.status;
        if (this.state !== "cancelling") this.#become(event.status);
        return null;
      case "image_edit.partial_image":
        if (this.#isNew(`preview ${event.index ?? 0} ${event.partial_image_index}`)) this.#tell("preview", event);
        return null;
      case "image_edit.completed":
        if (this.#isNew(`variation ${event.index ?? 0}`)) this.#tell("variation", event);
        return null;
      case "error":
        throw failure(event.error);
      default:
        return null;
    }
  }

  #isNew(name) {
    const fresh = !this.#seen.has(name);
    this.#seen.add(name);
    return fresh;
  }

  #tell(
    type,
    { index = 0, b64_json: encoded, output_format: format, seed = null, usage = null, partial_image_index: preview = null },
  ) {
    const blob = fromBase64(encoded, `image/${format ?? "png"}`);
    if (type === "variation") this.done++;
    this.dispatchEvent(new CustomEvent(type, { detail: { index, blob, seed, usage, preview } }));
  }

  #become(state) {
    this.state = state;
    this.dispatchEvent(new Event("state"));
  }
}

/** What is awaited goes on, since others may await it too. Rejects with an AbortError. */
function unlessAborted(signal, work) {
  return new Promise((done, fail) => {
    if (signal.aborted) fail(signal.reason);
    signal.addEventListener("abort", () => fail(signal.reason));
    work.then(done, fail);
  });
}

const failure = (error) => new ApiError(0, error ?? { message: "The edit failed, and the server did not say why." });

function fromBase64(text, type) {
  const binary = atob(text);
  const data = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) data[i] = binary.charCodeAt(i);
  return new Blob([data], { type });
}
