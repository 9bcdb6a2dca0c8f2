// One message on the page: its text, its state in words, and the buttons that belong to it.
import { button, copyButton, el, icon, mark, setText } from "./dom.js";
import { markdown, MarkdownView } from "./markdown.js";

const SHORT = 6000; // characters of a user's message shown at first
const CHUNK = 8000; // characters per box of a long text, so that only boxes in sight are laid out
const LAZY = 120_000; // an answer longer than this is shown as plain boxes until asked for

const NOTES = {
  stopped: "You stopped this answer.",
  interrupted: "This answer was interrupted.",
  error: "No answer came.",
  length: "The answer reached its token limit.",
};

function plainBoxes(text) {
  const boxes = [];
  for (let at = 0; at < text.length; ) {
    let end = Math.min(text.length, at + CHUNK);
    const line = text.lastIndexOf("\n", end);
    if (end < text.length && line > at) end = line + 1;
    boxes.push(el("span", { class: "plain-box" }, text.slice(at, end).replace(/\n$/, end < text.length ? "" : "\n")));
    at = end;
  }
  return boxes;
}

/** `actions`: regenerate, onward, edit(message, text), choose(message) of the controller. */
export class MessageView {
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.isUser = message.role === "user";
    this.body = el("div", { class: this.isUser ? "text plain" : "text prose" });
    this.foot = el("div", { class: "foot" });
    this.note = el("div", { class: "note", hidden: true });
    const speaker = el("h2", { class: "visually-hidden" }, this.isUser ? "You" : "Assistant");
    const side = this.isUser ? null : el("div", { class: "side" }, mark());
    this.element = el(
      "article",
      { class: `message ${message.role}`, "data-id": message.id, "aria-label": this.isUser ? "You" : "Assistant" },
      side,
      el("div", { class: "column" }, speaker, this.body, this.note, this.foot),
    );
    this.live = null;
  }

  /** Shows the message as it is now, among `total` siblings at `place`. */
  refresh({ place, total, siblings, last, busy, queue = "" }) {
    const { message } = this;
    const writing = message.state === "streaming";
    this.element.dataset.state = message.state;
    this.element.classList.toggle("last", last);
    this.element.setAttribute("aria-busy", String(writing));
    if (!this.editing) this.#text(writing);
    this.#note(writing, busy, last, queue);
    this.#foot({ place, total, siblings, busy, writing });
  }

  #text(writing) {
    const { content } = this.message;
    if (this.isUser) {
      if (this.shown !== content) this.#plain(content, SHORT);
    } else if (writing) {
      if (!this.live) {
        this.body.replaceChildren();
        this.live = new MarkdownView(this.body);
        this.live.append(content);
        this.live.show();
      }
    } else if (this.live) {
      this.live.finish();
      this.live = null;
    } else if (this.shown !== content) {
      if (content.length > LAZY) this.#long(content);
      else markdown(this.body, (this.body.replaceChildren(), content));
    }
    this.shown = content;
  }

  #plain(content, limit) {
    const short = content.length > limit ? content.slice(0, limit) : content;
    this.body.replaceChildren(...plainBoxes(short));
    if (short === content) return;
    const label = `Show all ${content.length.toLocaleString("en")} characters`;
    this.body.append(el("button", { type: "button", class: "more", on: { click: () => this.#plain(content, Infinity) } }, label));
  }

  #long(content) {
    this.#plain(content, SHORT);
    this.body.lastChild.addEventListener("click", () => (this.body.replaceChildren(), markdown(this.body, content)));
  }

  /** The next piece of a streaming answer; `paint` makes it visible. */
  append(piece) {
    this.live?.append(piece);
    if (this.#waiting) this.#wait(false);
  }

  paint() {
    if (!this.live) return;
    this.live.show();
    this.shown = this.message.content;
  }

  #waiting = null;

  #wait(on, queue = "") {
    if (!on) {
      this.#waiting?.remove();
      this.#waiting = null;
      return;
    }
    if (!this.#waiting) {
      this.#waiting = el("p", { class: "waiting" }, el("span", { class: "dots", "aria-hidden": "true" }, el("i"), el("i"), el("i")), el("span"));
      this.body.after(this.#waiting);
    }
    setText(this.#waiting.lastChild, queue || "Waiting for the first word");
  }

  #note(writing, busy, last, queue) {
    const { message } = this;
    this.#wait(writing && message.content === "", queue);
    const reason = message.state === "done" && message.finish === "length" ? "length" : message.state;
    const words = writing ? "" : (NOTES[reason] ?? "");
    this.note.hidden = !words || this.isUser;
    if (this.note.hidden) return;
    const wrong = message.state === "error" || message.state === "interrupted";
    this.note.className = wrong ? "note wrong" : "note";
    const again = { name: "again", text: true, class: "quiet", disabled: busy, onclick: () => this.actions.regenerate(message) };
    const onward = { name: "onward", text: true, class: "quiet", disabled: busy, onclick: () => this.actions.onward(message) };
    this.note.replaceChildren(
      el("p", { role: wrong ? "alert" : null }, wrong ? icon("alert") : null, el("span", null, words, message.error ? el("span", { class: "why" }, ` ${message.error}`) : null)),
      el("div", { class: "note-actions" }, message.content && last ? button("Continue", onward) : null, button(message.content ? "Regenerate" : "Try again", again)),
    );
  }

  #foot({ place, total, siblings, busy, writing }) {
    const { message } = this;
    const parts = [];
    if (total > 1) {
      const to = (step) => () => this.actions.choose(siblings[place + step]);
      const turn = (label, name, step) => button(label, { name, class: "icon-button small", disabled: !siblings[place + step], "data-turn": step, onclick: to(step) });
      const words = el("span", { class: "place", "aria-label": `Version ${place + 1} of ${total}` }, `${place + 1} / ${total}`);
      parts.push(el("div", { class: "switch", role: "group", "aria-label": "Versions of this message" }, turn("Previous version", "left", -1), words, turn("Next version", "right", 1)));
    }
    const small = { class: "icon-button small" };
    if (message.content && !writing) parts.push(copyButton("Copy message", () => message.content, small));
    if (this.isUser) parts.push(button("Edit message", { name: "edit", ...small, disabled: busy, onclick: () => this.edit() }));
    else if (!writing) parts.push(button("Regenerate", { name: "again", ...small, disabled: busy, onclick: () => this.actions.regenerate(message) }));
    if (message.stats && !writing) parts.push(this.#figures());
    const focused = document.activeElement?.closest?.(".foot") === this.foot ? document.activeElement.dataset.turn : null;
    this.foot.replaceChildren(...parts);
    if (focused) this.foot.querySelector(`[data-turn="${focused}"]:not(:disabled), [data-turn]:not(:disabled)`)?.focus();
  }

  #figures() {
    const { tokens, first_s, rate } = this.message.stats;
    const words = [`${tokens.toLocaleString("en")} token${tokens === 1 ? "" : "s"}`, rate ? `${rate.toFixed(rate < 10 ? 1 : 0)} tokens/s` : "", `first after ${first_s.toFixed(2)} s`];
    return el("span", { class: "figures", title: this.message.model }, words.filter(Boolean).join(" · "));
  }

  /** Turns the message into a box to edit; saving makes a sibling, the old version stays. */
  edit() {
    this.editing = true;
    const area = el("textarea", { class: "edit-area", "aria-label": "Edit message", rows: 3 });
    area.value = this.message.content;
    const leave = () => {
      this.editing = false;
      this.shown = undefined;
      this.element.classList.remove("editing");
      this.#text(false);
      this.foot.hidden = false;
      this.foot.querySelector("[aria-label='Edit message']")?.focus();
    };
    const save = () => {
      const text = area.value;
      if (!text.trim()) return;
      leave();
      this.actions.edit(this.message, text);
    };
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") event.stopPropagation(), leave();
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) event.preventDefault(), save();
    });
    const buttons = [button("Cancel", { text: true, class: "quiet", onclick: leave }), button("Send edited", { text: true, class: "solid", onclick: save })];
    this.element.classList.add("editing");
    this.foot.hidden = true;
    this.body.replaceChildren(area, el("div", { class: "edit-actions" }, buttons));
    area.focus();
  }
}
