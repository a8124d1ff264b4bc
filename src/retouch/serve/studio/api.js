/** The server's HTTP contract: one method a call, errors as `ApiError`, the key asked for once where one is needed. */

const BASE = new URL("../v1/", import.meta.url);
const KEY_NAME = "retouch.key";

/** What the server refused, in its own words. */
export class ApiError extends Error {
  constructor(status, { message, code = null, param = null } = {}, retryAfter = null) {
    super(message || `The server answered with status ${status}.`);
    Object.assign(this, { name: "ApiError", status, code, param, retryAfter });
  }
}

/** The server could not be reached, or the connection broke. */
export class Unreachable extends Error {
  constructor(cause) {
    super("The server does not answer. Is it still running, and the connection up?", { cause });
    this.name = "Unreachable";
  }
}

export class Api {
  #asking = null;

  /** @param {(wrong: boolean) => Promise<string|null>} askKey asks the person for a key; null where they decline */
  constructor(askKey) {
    this.askKey = askKey;
  }

  get key() {
    return localStorage.getItem(KEY_NAME);
  }

  set key(value) {
    if (value) localStorage.setItem(KEY_NAME, value);
    else localStorage.removeItem(KEY_NAME);
  }

  models = () => this.#json("models");
  stats = (signal) => this.#json("stats", { signal });
  jobs = (signal) => this.#json("jobs", { signal });
  job = (id) => this.#json(`jobs/${encodeURIComponent(id)}`);
  cancel = (id, keepalive = false) => this.#json(`jobs/${encodeURIComponent(id)}`, { method: "DELETE", keepalive });
  submit = (fields) => this.#json("jobs", { method: "POST", body: form(fields) });
  upload = (blob, name) =>
    this.#json("documents", { method: "POST", body: form({ file: new File([blob], name, { type: blob.type }) }) });

  /** The document's upright pixels, as the server holds them. */
  async content(id) {
    return (await this.#call(`documents/${encodeURIComponent(id)}/content`)).blob();
  }

  /**
   * What happens to a job, event by event. fetch and not EventSource, which cannot send the key.
   * @returns {AsyncGenerator<{type: string}>}
   */
  async *events(id, signal) {
    const answer = await this.#call(`jobs/${encodeURIComponent(id)}/events`, {
      signal,
      headers: { Accept: "text/event-stream" },
    });
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let lines = [];
    let rest = "";
    try {
      for (;;) {
        const { value, done } = await reader.read();
        if (done) return;
        const parts = (rest + value).split(/\r?\n/);
        rest = parts.pop();
        for (const line of parts) {
          if (line.startsWith("data:")) lines.push(line.slice(5).trimStart());
          else if (line === "" && lines.length) {
            yield JSON.parse(lines.join("\n"));
            lines = [];
          }
        }
      }
    } catch (error) {
      throw error.name === "TypeError" ? new Unreachable(error) : error;
    } finally {
      reader.cancel().catch(() => {});
    }
  }

  async #json(path, options) {
    return (await this.#call(path, options)).json();
  }

  async #call(path, { headers = {}, ...options } = {}) {
    for (;;) {
      const key = this.key;
      if (key) headers.Authorization = `Bearer ${key}`;
      const answer = await reach(new URL(path, BASE), { ...options, headers });
      if (answer.ok) return answer;
      const error = await refusal(answer);
      if (answer.status !== 401 || options.keepalive || !(await this.#newKey(key))) throw error;
    }
  }

  /** One dialog, however many calls were refused at the same time. @returns {Promise<boolean>} whether there is a new key */
  async #newKey(refused) {
    if (this.key !== refused) return Boolean(this.key);
    this.#asking ??= this.askKey(Boolean(refused)).finally(() => (this.#asking = null));
    const given = await this.#asking;
    if (given) this.key = given;
    return Boolean(given);
  }
}

async function reach(url, options) {
  try {
    return await fetch(url, options);
  } catch (error) {
    throw error.name === "AbortError" ? error : new Unreachable(error);
  }
}

async function refusal(answer) {
  const body = await answer.json().catch(() => ({}));
  const retryAfter = Number(answer.headers.get("Retry-After"));
  return new ApiError(answer.status, body?.error ?? {}, Number.isFinite(retryAfter) && retryAfter > 0 ? retryAfter : null);
}

/** Fields that are null, undefined or "" are left out: the server fills in what is missing. */
function form(fields) {
  const data = new FormData();
  for (const [name, value] of Object.entries(fields)) {
    if (value instanceof Blob) data.append(name, value, value.name ?? `${name}.png`);
    else if (value !== null && value !== undefined && value !== "") data.append(name, String(value));
  }
  return data;
}
