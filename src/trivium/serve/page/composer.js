// The box to write in: sends on Enter, grows with its text, and keeps large pastes beside it instead of in it.
import { button, byId, el, icon, setText } from "./dom.js";

const LARGE_PASTE = 12_000; // characters
const TALLEST = 260; // pixels
const COUNT_AFTER_MS = 500;
const COUNT_UP_TO = 24_000; // characters: more is not sent off to be counted

function size(characters) {
  return characters < 10_000 ? `${characters} characters` : characters < 1e6 ? `${Math.round(characters / 1000)} thousand characters` : `${(characters / 1e6).toFixed(1)} million characters`;
}

/** `onsend(text)`, `onstop()`, `oneditlast()`, `tokens(text, signal)` → number or null. */
export class Composer {
  #clips = [];
  #running = false;
  #timer = 0;
  #counting = null;

  constructor({ onsend, onstop, oneditlast, tokens }) {
    Object.assign(this, { onsend, onstop, oneditlast, tokens });
    this.area = byId("draft");
    this.send = byId("send");
    this.count = byId("count");
    this.list = byId("clips");
    this.send.addEventListener("click", () => (this.#running ? this.onstop() : this.submit()));
    this.area.addEventListener("input", () => this.#changed());
    this.area.addEventListener("keydown", (event) => this.#key(event));
    this.area.addEventListener("paste", (event) => this.#paste(event));
    byId("composer").addEventListener("click", (event) => event.target === event.currentTarget && this.area.focus());
    this.running = false;
  }

  /** While an answer is written the button stops it. */
  set running(on) {
    const label = on ? "Stop the answer" : "Send message";
    this.#running = on;
    this.send.setAttribute("aria-label", label);
    this.send.title = on ? "Stop (Esc)" : "Send (Enter)";
    this.send.classList.toggle("stops", on);
    this.send.replaceChildren(icon(on ? "stop" : "up"));
    this.#enable();
  }

  get text() {
    return [...this.#clips, this.area.value].filter((part) => part.trim()).join("\n\n");
  }

  set text(words) {
    this.area.value = words;
    this.#changed();
    this.area.focus();
  }

  clear() {
    this.#clips = [];
    this.#drawClips();
    this.area.value = "";
    this.#changed();
  }

  submit() {
    const { text } = this;
    if (this.#running || !text.trim()) return;
    if (this.onsend(text)) this.clear();
    this.area.focus();
  }

  #key(event) {
    const plain = !event.shiftKey && !event.ctrlKey && !event.altKey && !event.metaKey;
    if (event.key === "Enter" && plain && !event.isComposing && event.keyCode !== 229) {
      event.preventDefault();
      this.submit();
    } else if (event.key === "ArrowUp" && plain && !this.area.value && !this.#running) {
      event.preventDefault();
      this.oneditlast();
    }
  }

  #paste(event) {
    const words = event.clipboardData?.getData("text/plain") ?? "";
    if (words.length <= LARGE_PASTE) return;
    event.preventDefault();
    this.#clips.push(words);
    this.#drawClips();
    this.#enable();
  }

  #drawClips() {
    this.list.hidden = this.#clips.length === 0;
    const drop = (i) => () => {
      this.#clips.splice(i, 1);
      this.#drawClips();
      this.#enable();
      this.area.focus();
    };
    const clip = (words, i) => {
      const start = words.slice(0, 200).replace(/\s+/g, " ").trim().slice(0, 60);
      const label = el("span", { class: "clip-words" }, el("span", { class: "clip-start" }, start), el("span", { class: "clip-size" }, `Pasted, ${size(words.length)}`));
      return el("li", { class: "clip" }, icon("page"), label, button("Remove pasted text", { name: "close", class: "icon-button small", onclick: drop(i) }));
    };
    this.list.replaceChildren(...this.#clips.map(clip));
  }

  #enable() {
    this.send.disabled = !this.#running && !this.#clips.length && !/\S/.test(this.area.value);
  }

  #changed() {
    this.#enable();
    // Reading the height lays the text out: not done for texts that fill the box anyway.
    this.area.style.height = "auto";
    this.area.style.height = `${this.area.value.length > LARGE_PASTE ? TALLEST : Math.min(TALLEST, this.area.scrollHeight)}px`;
    clearTimeout(this.#timer);
    this.#counting?.abort();
    if (!this.area.value || this.area.value.length > COUNT_UP_TO) return setText(this.count, "");
    this.#timer = setTimeout(() => this.#askCount(), COUNT_AFTER_MS);
  }

  async #askCount() {
    this.#counting = new AbortController();
    try {
      const count = await this.tokens(this.area.value, this.#counting.signal);
      setText(this.count, count === null ? "" : `${count.toLocaleString("en")} token${count === 1 ? "" : "s"}`);
    } catch {
      setText(this.count, ""); // a count is a nicety: without it nothing is lost
    }
  }
}
