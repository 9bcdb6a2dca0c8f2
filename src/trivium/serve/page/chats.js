// What can be done with chats (open, send, edit, stop, keep, take in): the page's state, apart from how it is drawn.
import { keep, kept, stashPartial, takePartial } from "./prefs.js";
import { exported, readExport, readSettings } from "./records.js";
import { Run } from "./run.js";
import { Conversation, newId, newMeta, titleOf } from "./tree.js";

function lockName(id) {
  return `trivium-answer-${id}`;
}

// Answers that another tab of this browser is writing now: their lock is held.
async function heldElsewhere() {
  if (!navigator.locks) return new Set(); // plain http on a network has no locks: then no other tab counts as writing
  const { held } = await navigator.locks.query();
  return new Set(held.map((lock) => lock.name));
}

/** `onchange()` when anything to draw changed; `onpiece(message, piece)`; `onend(run)` when an answer ended. */
export class Chats {
  constructor({ client, store, model, onchange, onpiece, onend }) {
    Object.assign(this, { client, store, model, onchange, onpiece, onend });
    this.metas = [];
    this.current = null; // the open conversation, perhaps without a message yet
    this.runs = new Map(); // conversation id → its run
    this.opened = new Map(); // conversations with a run, by id: another chat may be shown meanwhile
    this.channel = "BroadcastChannel" in globalThis ? new BroadcastChannel("trivium") : null;
    this.channel?.addEventListener("message", ({ data }) => this.#elsewhere(String(data)));
    window.addEventListener("pagehide", () => stashPartial([...this.runs.values()].map(({ message }) => [message.id, message.content])));
  }

  async start() {
    this.partial = takePartial();
    this.metas = await this.store.list();
    const last = kept("open", (value) => typeof value === "string", "");
    if (this.metas.some((meta) => meta.id === last)) await this.open(last);
    else this.create();
  }

  get run() {
    return this.current ? (this.runs.get(this.current.meta.id) ?? null) : null;
  }

  create() {
    const isObject = (value) => typeof value === "object";
    let settings = {};
    try {
      settings = readSettings(kept("settings", isObject, {}));
    } catch {
      settings = {}; // damaged: the server's defaults
    }
    this.current = new Conversation(newMeta({ system: kept("system", (value) => typeof value === "string", ""), settings }));
    keep("open", "");
    this.onchange();
  }

  async open(id) {
    const meta = this.metas.find((each) => each.id === id);
    if (!meta) return;
    const conversation = this.opened.get(id) ?? new Conversation(meta, await this.store.messages(id));
    const held = await heldElsewhere();
    for (const message of conversation.messages.values()) {
      const mine = this.runs.get(id)?.message === message;
      if (message.state !== "streaming" || mine || held.has(lockName(message.id))) continue;
      const longer = this.partial.get(message.id) ?? "";
      if (longer.length > message.content.length) message.content = longer;
      Object.assign(message, { state: "interrupted", error: "The page was closed or loaded again while it was written." });
      this.store.saveMessage(message);
    }
    this.current = conversation;
    keep("open", id);
    this.onchange();
  }

  #elsewhere(id) {
    this.store.list().then(async (metas) => {
      this.metas = metas;
      if (this.current?.meta.id === id && !this.runs.has(id)) {
        if (metas.some((meta) => meta.id === id)) await this.open(id);
        else this.create();
      }
      this.onchange();
    });
  }

  #changed(conversation) {
    const { meta } = conversation;
    meta.updated = Date.now();
    this.metas = [meta, ...this.metas.filter((each) => each.id !== meta.id)];
    this.#keepMeta(conversation);
  }

  #keepMeta({ meta }) {
    this.store.saveMeta(meta).then(() => this.channel?.postMessage(meta.id));
  }

  /** Sends a message; false while an answer is being written. */
  send(text) {
    if (this.run) return false;
    const parent = this.current.leaf()?.id ?? null;
    this.#ask(parent, text);
    return true;
  }

  /** A new version of a user's message, beside the old one, and its answer. */
  edit(message, text) {
    if (!this.run) this.#ask(message.parent, text);
  }

  #ask(parent, text) {
    const { current } = this;
    const question = current.add({ parent, role: "user", content: text });
    if (!current.meta.named && parent === null) current.meta.title = titleOf(text);
    this.store.saveMessage(question);
    keep("open", current.meta.id);
    this.#answer(current, current.add({ parent: question.id, role: "assistant", state: "streaming" }));
  }

  /** Another answer beside this one; one without any text is replaced. */
  regenerate(message) {
    if (this.run) return;
    const { current } = this;
    if (!message.content) this.store.removeMessages(current.remove(message));
    this.#answer(current, current.add({ parent: message.parent, role: "assistant", state: "streaming" }));
  }

  /** Goes on with an answer that was stopped, interrupted or cut at its token limit. */
  onward(message) {
    if (!this.run) this.#answer(this.current, message);
  }

  choose(message) {
    this.current.choose(message);
    this.#keepMeta(this.current);
    this.onchange();
  }

  #answer(conversation, message) {
    const { client, store } = this;
    const { id } = conversation.meta;
    const onupdate = (_run, piece) => this.current === conversation && this.onpiece(message, piece);
    const onend = (run) => {
      this.runs.delete(id);
      this.opened.delete(id);
      this.channel?.postMessage(id);
      this.onend(run);
      this.onchange();
    };
    const run = new Run({ client, store, conversation, message, model: this.model() || conversation.meta.model, onupdate, onend });
    conversation.meta.model = run.model;
    Object.assign(message, { state: "streaming", error: "", finish: "" }); // at once: the lock may take a moment
    this.runs.set(id, run);
    this.opened.set(id, conversation);
    this.#changed(conversation);
    if (navigator.locks) navigator.locks.request(lockName(message.id), { ifAvailable: true }, () => run.start());
    else run.start();
    this.onchange();
  }

  stop() {
    this.run?.stop();
  }

  /** System prompt and settings of the open chat; they are also what the next new chat starts with. */
  configure({ system, settings }) {
    Object.assign(this.current.meta, { system, settings });
    keep("system", system.slice(0, 100_000));
    keep("settings", settings);
    if (this.current.messages.size) this.#keepMeta(this.current);
  }

  rename(meta, title) {
    Object.assign(meta, { title: title.slice(0, 200), named: true });
    this.#keepMeta({ meta });
    this.onchange();
  }

  async remove(meta) {
    this.runs.get(meta.id)?.stop();
    this.metas = this.metas.filter((each) => each.id !== meta.id);
    if (this.current?.meta.id === meta.id) this.create();
    this.onchange();
    await this.store.remove(meta);
    this.channel?.postMessage(meta.id);
  }

  /** The text of an export file with these chats. */
  async giveOut(metas) {
    const all = [];
    for (const meta of metas) {
      const open = this.opened.get(meta.id);
      const messages = open ? [...open.messages.values()] : await this.store.messages(meta.id);
      all.push({ meta, messages: messages.sort((a, b) => a.seq - b.seq) });
    }
    return exported(all);
  }

  /** Adds the chats of an export file beside the present ones; returns how many. Raises RecordError. */
  async takeIn(text) {
    const found = readExport(text, newId);
    for (const { meta, messages } of found) {
      await this.store.saveMeta(meta);
      for (const message of messages) await this.store.saveMessage(message);
    }
    this.metas = await this.store.list();
    if (found.length) await this.open(found[0].meta.id);
    return found.length;
  }
}
