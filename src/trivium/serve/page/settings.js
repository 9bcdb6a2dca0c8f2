// The settings of a chat: the system prompt and how tokens are drawn; an empty field is the server's own default.
import { el } from "./dom.js";
import { readSettings, SETTINGS } from "./records.js";

const FIELDS = [
  ["temperature", "Temperature", "0 always takes the likeliest token; higher is more varied.", 0.1],
  ["top_p", "Top p", "Draws only from the likeliest tokens that together reach this share.", 0.05],
  ["max_tokens", "Longest answer", "In tokens.", 1],
  ["seed", "Seed", "The same seed and prompt give the same answer.", 1],
  ["presence_penalty", "Presence penalty", "Above 0: away from tokens that occurred.", 0.1],
  ["frequency_penalty", "Frequency penalty", "Above 0: away from tokens that occurred often.", 0.1],
];

/** `onchange({system, settings})` after each valid change. */
export class SettingsPanel {
  constructor(onchange) {
    this.onchange = onchange;
    this.system = el("textarea", { id: "system", rows: 4, placeholder: "How the model should behave", on: { input: () => this.#changed() } });
    this.inputs = new Map();
    const fields = FIELDS.map((field) => this.#field(field));
    this.stop = el("textarea", { id: "stop", rows: 2, "aria-describedby": "stop-help", on: { input: () => this.#changed() } });
    const reset = el("button", { type: "button", class: "quiet", on: { click: () => this.#reset() } }, "Back to the defaults");
    this.element = el(
      "div",
      { class: "settings" },
      el("div", { class: "field" }, el("label", { for: "system" }, "System prompt"), this.system),
      el("div", { class: "fields" }, fields),
      el("div", { class: "field" }, el("label", { for: "stop" }, "Stop at"), this.stop, el("p", { class: "help", id: "stop-help" }, "One text per line, up to 8 lines of 64 characters.")),
      reset,
    );
  }

  #field([name, label, help, step]) {
    const [low, high] = SETTINGS[name];
    const id = `set-${name}`;
    const input = el("input", { id, type: "text", inputmode: low < 0 ? "text" : "decimal", autocomplete: "off", placeholder: "default", "aria-describedby": `${id}-help` });
    input.addEventListener("input", () => this.#changed());
    input.addEventListener("keydown", (event) => {
      const sign = { ArrowUp: 1, ArrowDown: -1 }[event.key];
      if (!sign) return;
      event.preventDefault();
      const next = (Number.parseFloat(input.value) || 0) + sign * step;
      input.value = String(Number(Math.min(high, Math.max(low, next)).toFixed(4)));
      this.#changed();
    });
    const words = el("p", { class: "help", id: `${id}-help` }, help);
    this.inputs.set(name, { input, words, help });
    return el("div", { class: "field" }, el("label", { for: id }, label), input, words);
  }

  show({ system, settings }) {
    this.system.value = system;
    for (const [name, { input }] of this.inputs) input.value = settings[name] === undefined ? "" : String(settings[name]);
    this.stop.value = (settings.stop ?? []).join("\n");
    this.#read();
  }

  #reset() {
    this.show({ system: "", settings: {} });
    this.#changed();
  }

  // The valid settings; a field that is not valid says what it takes and is left out.
  #read() {
    const settings = {};
    for (const [name, { input, words, help }] of this.inputs) {
      const [low, high, whole] = SETTINGS[name];
      const given = input.value.trim().replace(",", ".");
      const value = Number(given);
      const right = given === "" || (value >= low && value <= high && (!whole || Number.isInteger(value)));
      input.setAttribute("aria-invalid", String(!right));
      const takes = `Takes ${whole ? "a whole number" : "a number"} from ${low} to ${high.toLocaleString("en")}; not used as it is.`;
      words.textContent = right ? help : takes;
      if (given !== "" && right) settings[name] = value;
    }
    const stops = this.stop.value.split("\n").filter((line) => line !== "").map((line) => line.slice(0, 64));
    if (stops.length) settings.stop = stops.slice(0, 8);
    return readSettings(settings);
  }

  #changed() {
    this.onchange({ system: this.system.value, settings: this.#read() });
  }
}
