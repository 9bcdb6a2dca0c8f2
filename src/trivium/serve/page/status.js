// The status panel: what the server is doing now, drawn from /v1/status.
import { el, setText, svg } from "./dom.js";
import { ExpertPicture } from "./experts.js";

const SAMPLES = 90;
const WORDS = {
  connecting: ["Connecting", "The server has not answered yet."],
  ready: ["Ready", "The server answers."],
  busy: ["Busy", "The server is writing answers."],
  loading: ["Not ready", "The server is up; it is loading or stopping."],
  gone: ["Not reachable", "The server does not answer. The page keeps trying."],
  locked: ["Key needed", "The server answers only with a key."],
};

/** The state a person sees: ready, or busy while answers are written. */
export function shownState(state, status) {
  return state === "ready" && status?.running > 0 ? "busy" : state;
}

export function stateWords(state) {
  return WORDS[state];
}

function tile(label, unit) {
  const value = el("span", { class: "tile-value" }, "–");
  const node = el("div", { class: "tile" }, el("dt", null, label), el("dd", null, value, unit ? el("span", { class: "tile-unit" }, unit) : null));
  return { node, value };
}

export class StatusPanel {
  #rates = [];

  constructor() {
    this.state = el("p", { class: "state-line" }, el("span", { class: "dot", "aria-hidden": "true" }), el("strong"), el("span"));
    this.rate = tile("Speed", "tokens/s");
    this.running = tile("Being written");
    this.waiting = tile("In the queue");
    this.cache = tile("Cache in use", "%");
    this.line = svg("polyline", { class: "spark-line" });
    this.area = svg("polygon", { class: "spark-area" });
    this.spark = svg("svg", { class: "spark", viewBox: `0 0 ${SAMPLES - 1} 40`, preserveAspectRatio: "none", "aria-hidden": "true" }, this.area, this.line);
    this.meter = el("div", { class: "meter", role: "meter", "aria-label": "Cache in use", "aria-valuemin": 0, "aria-valuemax": 100, "aria-valuenow": 0 }, el("span"));
    this.experts = new ExpertPicture();
    this.model = el("p", { class: "status-model" });
    this.rate.node.classList.add("wide");
    this.rate.node.append(this.spark);
    this.cache.node.classList.add("wide");
    this.cache.node.append(this.meter);
    this.tiles = el("dl", { class: "tiles" }, this.rate.node, this.running.node, this.waiting.node, this.cache.node);
    this.element = el("div", { class: "status" }, this.state, this.model, this.tiles, this.experts.element);
  }

  show(state, status) {
    const seen = shownState(state, status);
    this.state.dataset.state = seen;
    setText(this.state.children[1], WORDS[seen][0]);
    setText(this.state.children[2], WORDS[seen][1]);
    this.element.classList.toggle("stale", status === null);
    setText(this.model, status?.model ?? "");
    const number = (value) => (value === null || value === undefined ? "–" : value.toLocaleString("en", { maximumFractionDigits: value < 10 ? 1 : 0 }));
    setText(this.rate.value, number(status?.rate));
    setText(this.running.value, number(status?.running));
    setText(this.waiting.value, number(status?.waiting));
    const percent = status?.cache === null || status?.cache === undefined ? null : Math.round(status.cache * 100);
    setText(this.cache.value, number(percent));
    this.meter.setAttribute("aria-valuenow", percent ?? 0);
    this.meter.firstChild.style.width = `${percent ?? 0}%`;
    if (status) this.#draw(status.rate ?? 0);
    this.experts.show(status?.experts ?? null);
  }

  #draw(rate) {
    this.#rates.push(rate);
    if (this.#rates.length > SAMPLES) this.#rates.shift();
    const top = Math.max(1, ...this.#rates);
    const step = (SAMPLES - 1) / Math.max(20, this.#rates.length - 1);
    const points = this.#rates.map((each, i) => `${(i * step).toFixed(2)},${(38 - (34 * each) / top).toFixed(1)}`);
    const end = ((this.#rates.length - 1) * step).toFixed(2);
    this.line.setAttribute("points", points.join(" "));
    this.area.setAttribute("points", `0,40 ${points.join(" ")} ${end},40`);
  }
}
