// A conversation as a tree of messages: an edit or a new answer is a sibling, and one path through the tree is shown.

/** A new name for a record; unguessable names are not needed, only distinct ones. */
export function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** The first words of a text, as a title. */
export function titleOf(text) {
  const line = text.slice(0, 400).replace(/\s+/g, " ").trim();
  return line.length > 60 ? `${line.slice(0, 57).trimEnd()}…` : line || "New chat";
}

/** What a conversation's record holds before its first message. */
export function newMeta({ system = "", settings = {}, model = "" } = {}) {
  const now = Date.now();
  return { id: newId(), title: "New chat", named: false, created: now, updated: now, system, settings, model, chosen: [] };
}

const ROOT = "";

export class Conversation {
  /** `meta` and `messages` as records.js reads them. A message without its parent hangs at the root; circles are cut. */
  constructor(meta, messages = []) {
    this.meta = meta;
    this.messages = new Map();
    this.children = new Map([[ROOT, []]]);
    this.chosen = new Map(meta.chosen);
    for (const message of messages) this.messages.set(message.id, message);
    const ordered = [...this.messages.values()].sort((a, b) => a.seq - b.seq || (a.id < b.id ? -1 : 1));
    for (const message of ordered) {
      if (message.parent !== null && !this.#above(message)) message.parent = null;
      this.#of(message.parent).push(message.id);
    }
  }

  // Whether the way up from this message ends at the root.
  #above(message) {
    const seen = new Set();
    for (let at = message; at; at = this.messages.get(at.parent)) {
      if (seen.has(at.id)) return false;
      seen.add(at.id);
      if (at.parent === null) return true;
    }
    return false;
  }

  #of(parent) {
    const key = parent ?? ROOT;
    if (!this.children.has(key)) this.children.set(key, []);
    return this.children.get(key);
  }

  /** The chosen child of a message (of the root: null), or undefined at the end. */
  next(parent) {
    const ids = this.#of(parent);
    const chosen = this.chosen.get(parent ?? ROOT);
    return this.messages.get(ids.includes(chosen) ? chosen : ids.at(-1));
  }

  /** The messages shown, first to last. */
  path() {
    const shown = [];
    for (let at = this.next(null); at; at = this.next(at.id)) shown.push(at);
    return shown;
  }

  leaf() {
    return this.path().at(-1) ?? null;
  }

  siblings(message) {
    return this.#of(message.parent);
  }

  choose(message) {
    this.chosen.set(message.parent ?? ROOT, message.id);
    this.meta.chosen = [...this.chosen];
  }

  /** A new message under `parent` (an id or null), chosen. */
  add({ parent, role, content = "", state = "done" }) {
    const seq = Math.max(0, ...[...this.messages.values()].map((each) => each.seq)) + 1;
    const base = { id: newId(), conversation: this.meta.id, parent, role, content, state, seq, created: Date.now() };
    const message = { ...base, error: "", finish: "", model: "", stats: null };
    this.messages.set(message.id, message);
    this.#of(parent).push(message.id);
    this.choose(message);
    return message;
  }

  /** Takes a message and all below it out; returns their ids. */
  remove(message) {
    const gone = [message.id];
    for (let i = 0; i < gone.length; i++) gone.push(...this.#of(gone[i]));
    const ids = this.#of(message.parent);
    ids.splice(ids.indexOf(message.id), 1);
    for (const id of gone) {
      this.messages.delete(id);
      this.children.delete(id);
      this.chosen.delete(id);
    }
    this.meta.chosen = [...this.chosen];
    return gone;
  }

  /** What the model is given before it writes `message`: the system prompt and the path above it. */
  promptFor(message) {
    const above = [];
    for (let at = this.messages.get(message.parent); at; at = this.messages.get(at.parent)) above.push(at);
    const said = above.reverse().filter((each) => each.content !== "" || each.role === "user");
    const system = this.meta.system.trim() ? [{ role: "system", content: this.meta.system }] : [];
    return [...system, ...said.map(({ role, content }) => ({ role, content }))];
  }
}
