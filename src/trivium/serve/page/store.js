// Keeps conversations in the browser (IndexedDB); where that fails the page goes on in memory and says so.
import { readMessage, readMeta } from "./records.js";

const NAME = "trivium";
const OPEN_LIMIT_MS = 4000;

function settled(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

function openDatabase() {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(() => reject(new Error("the browser's store did not open")), OPEN_LIMIT_MS);
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("conversations", { keyPath: "id" });
      request.result.createObjectStore("messages", { keyPath: "id" }).createIndex("conversation", "conversation");
    };
    request.onerror = () => (clearTimeout(timer), reject(request.error));
    request.onsuccess = () => (clearTimeout(timer), resolve(request.result));
  });
}

/** Records by id. Writes are never waited for by the page: `onproblem(words or null)` tells when they fail or work again. */
export class Store {
  constructor(onproblem) {
    this.onproblem = onproblem;
    this.problem = null;
    this.database = null;
    this.damaged = 0;
    this.memory = { conversations: new Map(), messages: new Map() }; // what could not be written
  }

  async open() {
    try {
      this.database = await openDatabase();
      this.database.onversionchange = () => this.#lost();
      this.database.onclose = () => this.#lost();
    } catch (error) {
      this.#tell(error);
    }
    return this;
  }

  #lost() {
    this.database?.close();
    this.database = null;
    this.#tell(new Error("the browser closed its store"));
  }

  #tell(error) {
    const full = error?.name === "QuotaExceededError";
    const words = full ? "The browser's storage is full." : "This browser keeps nothing for this page.";
    this.problem = error ? `${words} Export your chats before you close it.` : null;
    this.onproblem(this.problem);
  }

  async #do(names, mode, work) {
    const transaction = this.database.transaction(names, mode);
    const done = new Promise((resolve, reject) => {
      transaction.oncomplete = resolve;
      transaction.onabort = () => reject(transaction.error);
    });
    const result = work(...names.map((name) => transaction.objectStore(name)));
    await done;
    return result;
  }

  async #put(name, record) {
    try {
      if (!this.database) throw new Error("no store");
      const { database, memory } = this;
      const copy = structuredClone(record);
      await this.#do([name], "readwrite", (records) => void records.put(copy));
      memory[name].delete(record.id);
      if (this.problem && database) this.#tell(null);
    } catch (error) {
      this.memory[name].set(record.id, structuredClone(record));
      if (!this.problem) this.#tell(error);
    }
  }

  saveMeta(meta) {
    return this.#put("conversations", meta);
  }

  saveMessage(message) {
    return this.#put("messages", message);
  }

  // Records that can be read; the others are counted and left where they are.
  #readable(records, read) {
    const right = new Map();
    for (const record of records) {
      try {
        const checked = read(record);
        right.set(checked.id, checked);
      } catch {
        this.damaged += 1;
      }
    }
    return right;
  }

  async #all(name, read, key) {
    let found = [];
    try {
      if (this.database) {
        await this.#do([name], "readonly", (records) => {
          const source = key === undefined ? records : records.index("conversation");
          settled(source.getAll(key)).then((all) => (found = all), () => {});
        });
      }
    } catch (error) {
      this.#tell(error);
    }
    const right = this.#readable(found, read);
    for (const record of this.memory[name].values()) {
      if (key === undefined || record.conversation === key) right.set(record.id, structuredClone(record));
    }
    return [...right.values()];
  }

  /** Every conversation's record, newest first. */
  async list() {
    return (await this.#all("conversations", readMeta)).sort((a, b) => b.updated - a.updated);
  }

  async messages(conversation) {
    return this.#all("messages", readMessage, conversation);
  }

  async remove(meta) {
    this.memory.conversations.delete(meta.id);
    for (const [id, message] of this.memory.messages) {
      if (message.conversation === meta.id) this.memory.messages.delete(id);
    }
    try {
      // One transaction, begun at once: a page that goes away meanwhile does not bring half of it back.
      await this.#do(["conversations", "messages"], "readwrite", (conversations, messages) => {
        conversations.delete(meta.id);
        const keys = messages.index("conversation").getAllKeys(meta.id);
        keys.onsuccess = () => keys.result.forEach((key) => messages.delete(key));
      });
    } catch {
      // nothing was stored: memory was all there is
    }
  }

  async removeMessages(ids) {
    for (const id of ids) this.memory.messages.delete(id);
    try {
      await this.#do(["messages"], "readwrite", (records) => ids.forEach((id) => records.delete(id)));
    } catch {
      // as above
    }
  }
}
