// A picture of expert load: one row per MoE layer, one square per expert, stronger where more tokens went.
import { el, setText, svg } from "./dom.js";

const LEVELS = 8;
const WIDTH = 280;
const FADE = 0.9; // per answer of the server, about one a second

/** Load relative to an even share (1 = even) as one of the levels; twice that is the last level but one. */
export function level(load, even) {
  if (!even || load <= 0) return 0;
  return Math.min(LEVELS, 1 + Math.floor((load / even) * 3));
}

// A server may count since its start: then what was added lately is the load, and older tokens fade.
class Recent {
  #before = null;
  #faded = [];

  of(layers, shape) {
    const same = this.#before?.shape === shape;
    const added = layers.map((loads, row) => loads.map((load, i) => (same ? load - this.#before.layers[row][i] : 0)));
    const counts = same && added.every((loads) => loads.every((load) => load >= 0));
    this.#before = { shape, layers };
    if (!counts) this.#faded = added.map((loads) => loads.map(() => 0));
    else this.#faded = added.map((loads, row) => loads.map((load, i) => FADE * this.#faded[row][i] + load));
    const moved = this.#faded.some((loads) => loads.some((load) => load > 0.01));
    return moved ? this.#faded : layers;
  }
}

export class ExpertPicture {
  #shape = "";
  #cells = [];
  #recent = new Recent();

  constructor() {
    this.picture = svg("svg", { class: "experts-picture", role: "img", "aria-labelledby": "experts-words" });
    this.words = el("p", { class: "help", id: "experts-words" });
    const scale = Array.from({ length: LEVELS + 1 }, (_, i) => el("i", { class: `level-${i}` }));
    this.legend = el("div", { class: "legend", "aria-hidden": "true" }, el("span", null, "idle"), scale, el("span", null, "twice its share and more"));
    this.element = el("section", { class: "experts", "aria-label": "Expert load", hidden: true }, el("h3", null, "Expert load"), this.picture, this.legend, this.words);
  }

  /** @param {{layers: number[][], left: number}|null} experts as pulse.js reads them */
  show(experts) {
    this.element.hidden = experts === null;
    if (!experts) return;
    const shape = experts.layers.map((layer) => layer.length).join(",");
    const layers = this.#recent.of(experts.layers, shape);
    const { left } = experts;
    if (shape !== this.#shape) this.#build(layers, shape);
    let busiest = { share: 0 };
    layers.forEach((loads, row) => {
      const total = loads.reduce((sum, load) => sum + load, 0);
      const even = total / loads.length;
      loads.forEach((load, column) => {
        const cell = this.#cells[row][column];
        const name = `level-${level(load, even)}`;
        if (cell.getAttribute("class") !== name) cell.setAttribute("class", name);
        const words = `Layer ${row + 1}, expert ${column + 1}: ${total ? ((100 * load) / total).toFixed(1) : 0} % of its layer's tokens`;
        setText(cell.firstChild, words);
        if (even && load / even > busiest.share) busiest = { share: load / even, row, column };
      });
    });
    const sizes = new Set(layers.map((layer) => layer.length));
    const shapeWords = `${layers.length} layer${layers.length === 1 ? "" : "s"} of ${[...sizes].join(" or ")} experts.`;
    const peak = busiest.share ? ` The busiest is expert ${busiest.column + 1} of layer ${busiest.row + 1}, with ${busiest.share.toFixed(1)} times an even share.` : " No tokens yet.";
    setText(this.words, shapeWords + peak + (left ? ` ${left} more layers are not drawn.` : ""));
  }

  #build(layers, shape) {
    this.#shape = shape;
    const most = Math.max(...layers.map((layer) => layer.length));
    const step = WIDTH / most;
    const tall = Math.max(3, Math.min(18, step));
    const gap = Math.min(1.5, step * 0.15);
    this.#cells = layers.map((loads, row) =>
      loads.map((_, column) => svg("rect", { x: (column * step).toFixed(2), y: (row * tall).toFixed(2), width: (step - gap).toFixed(2), height: (tall - gap).toFixed(2), rx: Math.min(2.5, step / 4).toFixed(2), class: "level-0" }, svg("title"))),
    );
    this.picture.setAttribute("viewBox", `0 0 ${WIDTH} ${(layers.length * tall).toFixed(2)}`);
    this.picture.replaceChildren(...this.#cells.flat());
  }
}
