// Speaks to the server: the OpenAI-shaped endpoints, its errors as one kind of object, and streams of answers.
import { EventCutter } from "./sse.js";

const KEY = "trivium.key"; // in sessionStorage: gone when the tab closes

/** What went wrong, in words to show. `kind`: offline | auth | busy | loading | request | server | cut. */
export class ServerError extends Error {
  constructor(kind, message, { status = 0, param = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { kind, status, param, retryAfter });
  }
}

const KINDS = { 401: "auth", 403: "auth", 429: "busy", 503: "loading" };
const WORDS = {
  auth: "The server asks for a key.",
  busy: "The server is full right now.",
  loading: "The server is not ready yet.",
  request: "The server did not accept the request.",
  server: "The server failed.",
};

async function errorOf(response) {
  const kind = KINDS[response.status] ?? (response.status >= 500 ? "server" : "request");
  let said = "";
  let param = null;
  try {
    const body = JSON.parse((await response.text()).slice(0, 100_000));
    said = typeof body?.error?.message === "string" ? body.error.message : "";
    param = typeof body?.error?.param === "string" ? body.error.param : null;
  } catch {
    said = ""; // not JSON: a proxy's page, whose markup says nothing here
  }
  const retryAfter = Number.parseFloat(response.headers.get("retry-after")) || null;
  return new ServerError(kind, (said || `${WORDS[kind]} (${response.status})`).slice(0, 2000), { status: response.status, param, retryAfter });
}

/** A piece of a stream's chunk, whatever the server put there. */
function readChunk(data) {
  let chunk;
  try {
    chunk = JSON.parse(data);
  } catch {
    throw new ServerError("cut", "The server sent something that is not JSON in the middle of the answer.");
  }
  if (chunk?.error) {
    const said = typeof chunk.error.message === "string" ? chunk.error.message : "The server stopped with an error.";
    throw new ServerError("cut", said.slice(0, 2000));
  }
  const choice = chunk?.choices?.[0];
  const text = choice?.delta?.content;
  const finish = choice?.finish_reason;
  return {
    text: typeof text === "string" ? text : "",
    finish: typeof finish === "string" ? finish : null,
    tokens: Number.isFinite(chunk?.usage?.completion_tokens) ? chunk.usage.completion_tokens : null,
    prompt: Number.isFinite(chunk?.usage?.prompt_tokens) ? chunk.usage.prompt_tokens : null,
  };
}

export class Client {
  #key = "";

  constructor(base = new URL(".", document.baseURI)) {
    this.base = base;
    try {
      this.#key = sessionStorage.getItem(KEY) ?? "";
    } catch {
      this.#key = ""; // storage is closed to the page: the key lives as long as the page
    }
  }

  get hasKey() {
    return this.#key !== "";
  }

  setKey(key) {
    this.#key = key;
    try {
      if (key) sessionStorage.setItem(KEY, key);
      else sessionStorage.removeItem(KEY);
    } catch {
      // as above
    }
  }

  /** One request; raises ServerError for everything that is not a 2xx, but lets an abort through. */
  async request(path, { body, signal, timeout = 10_000 } = {}) {
    const headers = {};
    if (this.#key) headers.Authorization = `Bearer ${this.#key}`;
    if (body !== undefined) headers["Content-Type"] = "application/json";
    const limit = timeout ? AbortSignal.timeout(timeout) : null;
    const signals = [signal, limit].filter(Boolean);
    const init = { headers, cache: "no-store", credentials: "omit", redirect: "error", referrerPolicy: "no-referrer" };
    let response;
    try {
      response = await fetch(new URL(path, this.base), {
        ...init,
        method: body === undefined ? "GET" : "POST",
        body: body === undefined ? undefined : JSON.stringify(body),
        signal: signals.length > 1 ? AbortSignal.any(signals) : signals[0],
      });
    } catch (error) {
      if (signal?.aborted) throw error;
      throw new ServerError("offline", "The server cannot be reached.");
    }
    if (!response.ok) throw await errorOf(response);
    return response;
  }

  async json(path, options) {
    const response = await this.request(path, options);
    try {
      return await response.json();
    } catch (error) {
      if (options?.signal?.aborted) throw error;
      throw new ServerError("server", `The server's answer to ${path} is not JSON.`);
    }
  }

  /** @returns {Promise<{id: string, context: number|null}[]>} */
  async models() {
    const { data } = (await this.json("v1/models")) ?? {};
    return (Array.isArray(data) ? data : [])
      .filter((model) => typeof model?.id === "string")
      .map((model) => ({ id: model.id, context: Number.isInteger(model.max_model_len) ? model.max_model_len : null }));
  }

  status() {
    return this.json("v1/status", { timeout: 5_000 });
  }

  ready() {
    return this.request("readyz", { timeout: 5_000 });
  }

  /** How many tokens a text has, or null where the server does not say. */
  async count(model, prompt, signal) {
    const answer = await this.json("tokenize", { body: { model, prompt }, signal });
    return Number.isInteger(answer?.count) ? answer.count : Array.isArray(answer?.tokens) ? answer.tokens.length : null;
  }

  /** Streams an answer: yields {text, finish, tokens, prompt}. Raises ServerError "cut" when it ends before its end. */
  async *chat(body, signal) {
    const response = await this.request("v1/chat/completions", { body, signal, timeout: 0 });
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    const events = new EventCutter();
    let finished = false;
    try {
      for (;;) {
        const { value, done } = await this.#read(reader, signal);
        if (done) break;
        for (const data of events.feed(value)) {
          if (data === "[DONE]") return;
          const piece = readChunk(data);
          finished ||= piece.finish !== null;
          yield piece;
        }
      }
    } finally {
      reader.cancel().catch(() => {}); // the stream may have failed already; there is nothing left to free
    }
    if (!finished) throw new ServerError("cut", "The connection ended before the answer did.");
  }

  async #read(reader, signal) {
    try {
      return await reader.read();
    } catch (error) {
      if (signal?.aborted) throw error;
      throw new ServerError("cut", "The connection to the server was lost before the answer ended.");
    }
  }
}
