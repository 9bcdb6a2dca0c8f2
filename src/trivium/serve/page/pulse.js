// Asks the server how it is, often while someone looks and seldom otherwise, and backs off while it is gone.

const FAST_MS = 1000;
const SLOW_MS = 5000;
const LONGEST_MS = 15_000;
const MOST_LAYERS = 96;
const MOST_EXPERTS = 512;

function count(value) {
  return typeof value === "number" && Number.isFinite(value) && value >= 0 ? value : null;
}

function experts(value) {
  if (!Array.isArray(value) || !value.length) return null;
  const layers = value.slice(0, MOST_LAYERS).map((layer) => (Array.isArray(layer) ? layer.slice(0, MOST_EXPERTS).map((x) => count(x) ?? 0) : []));
  return layers.some((layer) => layer.length) ? { layers, left: value.length - layers.length } : null;
}

/** The fields of /v1/status that are what they should be; the others null. */
export function readStatus(value) {
  return {
    model: typeof value?.model === "string" ? value.model.slice(0, 1000) : "",
    running: count(value?.running),
    waiting: count(value?.waiting),
    cache: count(value?.cache_usage) === null ? null : Math.min(1, value.cache_usage),
    rate: count(value?.tokens_per_s),
    experts: experts(value?.experts),
  };
}

/** `state`: connecting | ready | loading | gone | locked; `status` as readStatus gives it, null where there is none. */
export class Pulse {
  #timer = 0;
  #failures = 0;
  #offered = true; // whether the server has /v1/status
  #asking = null;

  constructor(client, onchange) {
    this.client = client;
    this.onchange = onchange;
    this.state = "connecting";
    this.status = null;
    this.words = ""; // what the server said of why it is not ready
    this.fast = false;
  }

  start() {
    document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(this.#timer) : this.now()));
    window.addEventListener("online", () => this.now());
    window.addEventListener("offline", () => this.now());
    return this.now();
  }

  /** Someone looks (or not any more). */
  set attention(fast) {
    if (fast === this.fast) return;
    this.fast = fast;
    if (fast) this.now();
  }

  /** Asks at once; calls while one is under way join it. */
  now() {
    clearTimeout(this.#timer);
    this.#asking ??= this.#ask().finally(() => {
      this.#asking = null;
      clearTimeout(this.#timer);
      if (!document.hidden) this.#timer = setTimeout(() => this.now(), this.#pause());
    });
    return this.#asking;
  }

  #pause() {
    if (this.#failures) return Math.min(LONGEST_MS, FAST_MS * 2 ** Math.min(8, this.#failures - 1));
    return this.fast && this.#offered ? FAST_MS : SLOW_MS;
  }

  async #ask() {
    let state = "ready";
    let status = null;
    this.words = "";
    try {
      if (this.#offered) status = readStatus(await this.client.status());
      else await this.client.ready();
      this.#failures = 0;
    } catch (error) {
      if (error.status === 404 && this.#offered) {
        this.#offered = false; // another OpenAI-compatible server: only readiness can be asked
        return this.#ask();
      }
      state = { loading: "loading", auth: "locked", offline: "gone", server: "gone", busy: "ready" }[error.kind] ?? "gone";
      this.words = error.message;
      this.#failures = state === "ready" ? 0 : this.#failures + 1;
      if (state === "loading") this.#failures = Math.min(this.#failures, 2);
    }
    const before = this.state;
    this.state = state;
    this.status = status;
    this.onchange(state, before);
  }
}
