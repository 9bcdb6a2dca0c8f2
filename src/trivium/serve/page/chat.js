// Shows the chosen path of a conversation, follows the end while it grows, and reads answers out at a calm pace.
import { button, byId, el } from "./dom.js";
import { MessageView } from "./message.js";

const NEAR_END = 90; // pixels
const PAINT_MS = 50;
const SPEAK_MS = 4000;

/** Says things to screen readers through one polite region. */
export class Announcer {
  #said = 0;
  #pending = "";

  constructor(region) {
    this.region = region;
  }

  say(words) {
    this.#pending = "";
    this.region.textContent = "";
    this.region.append(el("p", null, words));
  }

  /** Text of an answer: whole sentences, every few seconds. */
  hear(piece) {
    this.#pending = (this.#pending + piece).slice(-4000);
    const now = performance.now();
    if (now - this.#said < SPEAK_MS) return;
    const end = Math.max(...[". ", "! ", "? ", "\n"].map((mark) => this.#pending.lastIndexOf(mark)));
    if (end < 0) return;
    this.#said = now;
    const words = this.#pending.slice(0, end + 1).trim();
    this.#pending = this.#pending.slice(end + 1);
    if (words) this.region.replaceChildren(el("p", null, words));
  }

  /** The rest of an answer, and how it ended. */
  close(words) {
    this.region.replaceChildren(el("p", null, `${this.#pending.trim()} ${words}`.trim()));
    this.#pending = "";
  }
}

export class ChatView {
  #frame = 0;
  #painted = 0;
  #cost = 0;
  #dirty = new Set();

  constructor(actions) {
    this.actions = actions;
    this.log = byId("log");
    this.welcome = byId("welcome");
    this.scroller = byId("scroller");
    this.views = [];
    this.conversation = null;
    this.following = true;
    this.jump = button("Jump to the end", { name: "down", class: "jump", onclick: () => this.follow() });
    this.jump.hidden = true;
    byId("jump-place").append(this.jump);
    this.scroller.addEventListener("scroll", () => this.#scrolled(), { passive: true });
  }

  #scrolled() {
    const { scrollTop, scrollHeight, clientHeight } = this.scroller;
    this.following = scrollHeight - scrollTop - clientHeight < NEAR_END;
    this.jump.hidden = this.following;
  }

  /** Goes to the end and stays there. */
  follow() {
    this.following = true;
    this.jump.hidden = true;
    this.scroller.scrollTop = this.scroller.scrollHeight;
  }

  /** Shows this conversation (null: the welcome); messages that are already shown keep their nodes. */
  show(conversation, { busy = false, queue = "" } = {}) {
    const other = this.conversation !== conversation;
    if (other) {
      this.views = [];
      this.log.replaceChildren();
    }
    this.conversation = conversation;
    const path = conversation?.path() ?? [];
    this.welcome.hidden = path.length > 0;
    let same = 0;
    while (same < path.length && this.views[same]?.message === path[same]) same++;
    for (const view of this.views.splice(same)) view.element.remove();
    for (const message of path.slice(same)) {
      const view = new MessageView(message, this.actions);
      this.views.push(view);
      this.log.append(view.element);
    }
    this.views.forEach((view, i) => {
      const ids = conversation.siblings(view.message);
      const siblings = ids.map((id) => conversation.messages.get(id));
      const place = ids.indexOf(view.message.id);
      view.refresh({ place, total: ids.length, siblings, last: i === this.views.length - 1, busy, queue });
    });
    if (other || this.following) this.follow();
  }

  /** A piece of text for a message; painted soon, never more often than painting can bear. */
  append(message, piece) {
    const view = this.views.findLast((each) => each.message === message);
    if (!view) return;
    view.append(piece);
    this.#dirty.add(view);
    this.#frame ||= setTimeout(() => requestAnimationFrame(() => this.#paint()), Math.max(0, this.#painted + Math.max(PAINT_MS, 4 * this.#cost) - performance.now()));
  }

  #paint() {
    const start = performance.now();
    this.#frame = 0;
    for (const view of this.#dirty) view.paint();
    this.#dirty.clear();
    if (this.following) this.scroller.scrollTop = this.scroller.scrollHeight;
    this.#painted = performance.now();
    this.#cost = this.#painted - start;
  }

  editLast() {
    this.views.findLast((view) => view.isUser)?.edit();
  }
}
