// One answer being written: reads its stream into its message, keeps what has come, and always ends in a named state.
import { ServerError } from "./client.js";

const SAVE_MS = 700;
const SILENCE_MS = 8000; // how long a stream may be silent while the server does not answer anything else either
const ONWARD = "Continue your last answer exactly where it stopped, without repeating anything.";

/** `onupdate(run, piece)` after each piece of text; `onend(run)` once, whatever happened. */
export class Run {
  #abort = new AbortController();
  #saved = 0;
  #heard = performance.now();

  constructor({ client, store, conversation, message, model, onupdate, onend }) {
    Object.assign(this, { client, store, conversation, message, model, onupdate, onend });
    this.began = performance.now();
    this.first = null; // when the first text came
    this.pieces = 0;
    this.tokens = null;
  }

  stop() {
    this.#abort.abort("stopped");
  }

  /** The server does not answer: a stream that is silent as well is given up. */
  serverGone() {
    if (performance.now() - this.#heard > SILENCE_MS) this.#abort.abort("gone");
  }

  #body(onward, plainly) {
    const { conversation, message } = this;
    const messages = conversation.promptFor(message);
    const more = {};
    if (onward) {
      messages.push({ role: "assistant", content: message.content });
      if (plainly) messages.push({ role: "user", content: ONWARD });
      else Object.assign(more, { continue_final_message: true, add_generation_prompt: false });
    }
    const options = { stream: true, stream_options: { include_usage: true } };
    return { model: this.model, messages, ...conversation.meta.settings, ...options, ...more };
  }

  /** Writes the answer, or goes on after what the message holds. */
  async start() {
    const { message } = this;
    const onward = message.content !== "";
    const gone = { error: "The server does not answer any more.", state: "interrupted" };
    Object.assign(message, { state: "streaming", error: "", finish: "", stats: null, model: this.model });
    this.#save();
    try {
      try {
        await this.#read(this.#body(onward, false));
      } catch (error) {
        if (!(onward && error.status === 400 && this.first === null)) throw error;
        await this.#read(this.#body(true, true)); // a server that cannot continue a message is asked in words
      }
      message.state = "done";
    } catch (error) {
      if (this.#abort.signal.aborted) Object.assign(message, this.#abort.signal.reason === "gone" ? gone : { state: "stopped" });
      else if (error instanceof ServerError) Object.assign(message, { state: message.content ? "interrupted" : "error", error: error.message });
      else Object.assign(message, { state: "error", error: `The page failed: ${error.message}` });
      this.error = error;
    }
    this.#figures();
    await this.#save();
    this.onend(this);
  }

  async #read(body) {
    for await (const piece of this.client.chat(body, this.#abort.signal)) {
      this.#heard = performance.now();
      if (piece.finish) this.message.finish = piece.finish;
      if (piece.tokens !== null) this.tokens = piece.tokens;
      if (!piece.text) continue;
      this.first ??= this.#heard;
      this.pieces += 1;
      this.message.content += piece.text;
      this.onupdate(this, piece.text);
      if (this.#heard - this.#saved > SAVE_MS) this.#save();
    }
    if (this.message.finish === "abort") throw new ServerError("cut", "The server stopped before the answer ended.");
  }

  #figures() {
    if (this.first === null) return;
    const tokens = this.tokens ?? this.pieces;
    const seconds = (performance.now() - this.first) / 1000;
    const rate = tokens > 1 && seconds > 0 ? (tokens - 1) / seconds : 0;
    this.message.stats = { tokens, first_s: (this.first - this.began) / 1000, rate };
  }

  #save() {
    this.#saved = performance.now();
    return this.store.saveMessage(this.message);
  }
}
