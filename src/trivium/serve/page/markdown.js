// Shows Markdown that is still being written: what is finished is built once, only the open end is built again.
import { BlockReader, cells } from "./blocks.js";
import { coloured } from "./code.js";
import { copyButton, el } from "./dom.js";
import { inline } from "./inline.js";

const LONG_LEAF = 4096; // beyond this an open paragraph's end is plain text until it closes
const SHOWN = new WeakMap(); // what a paragraph's element shows: it outlives its block when a half line is taken back
const CONTAINERS = new Set(["quote", "list", "item"]);
const CHUNK_LINES = 60; // lines of code per box, so that a new line lays out one box only

const BUILD = {
  quote: () => el("blockquote"),
  list: (node) => (node.ordered ? el("ol", { start: node.first === 1 ? null : node.first }) : el("ul")),
  item(node) {
    const box = el("input", { type: "checkbox", disabled: true, checked: node.task, "aria-label": node.task ? "done" : "to do" });
    return node.task === null ? el("li") : el("li", { class: "task" }, box);
  },
  paragraph: () => el("p"),
  heading: (node) => el(`h${Math.min(6, node.level + 2)}`, { class: `title-${node.level}` }),
  rule: () => el("hr"),
  code: buildCode,
  table: buildTable,
};

function buildCode(node) {
  const text = () => node.lines.join("\n");
  const code = el("code");
  return el(
    "figure",
    { class: "code" },
    el("figcaption", null, el("span", null, node.language || "text"), copyButton("Copy code", text)),
    el("pre", { tabindex: "0", "aria-label": `Code, ${node.language || "text"}` }, code),
  );
}

function buildTable(node) {
  const head = el("tr", null, row(node, node.lines[0], "th"));
  const table = el("table", null, el("thead", null, head), el("tbody"));
  return el("div", { class: "table", tabindex: "0", role: "group", "aria-label": "Table" }, table);
}

function row(node, line, tag) {
  const texts = cells(line);
  return node.align.map((align, i) => {
    const scope = tag === "th" ? "col" : null;
    return el(tag, { class: `to-${align}`, scope }, inline(texts[i] ?? ""));
  });
}

// Beyond LONG_LEAF only the plain end grows while the paragraph is open; its start keeps its nodes.
function fillParagraph(node, closed) {
  const text = node.lines.join("\n");
  const whole = closed || text.length <= LONG_LEAF;
  const shown = `${whole}${text}`;
  if (SHOWN.get(node.dom)?.text === shown) return;
  const start = whole ? null : text.slice(0, LONG_LEAF);
  if (start !== null && SHOWN.get(node.dom)?.start === start) node.dom.lastChild.data = text.slice(LONG_LEAF);
  else node.dom.replaceChildren(...inline(whole ? text : start), document.createTextNode(whole ? "" : text.slice(LONG_LEAF)));
  SHOWN.set(node.dom, { text: shown, start });
}

function box(lines, language) {
  // A box does not show the end of its last line, so an empty last line needs one more.
  return el("span", { class: "lines" }, coloured(lines.join("\n"), language), lines.at(-1) === "" ? "\n" : null);
}

// Boxes that are full stay; the last one is written again. Lines that were taken back are in the last box only.
function fillCode(node, closed) {
  const code = node.dom.lastChild.firstChild;
  node.full ??= 0; // lines in full boxes
  code.lastChild?.remove();
  const stable = closed ? node.lines.length : (node.steady ?? 0);
  for (; stable - node.full > CHUNK_LINES; node.full += CHUNK_LINES) {
    code.append(box(node.lines.slice(node.full, node.full + CHUNK_LINES), node.language));
  }
  code.append(box(node.lines.slice(node.full), node.language));
}

function fillTable(node) {
  const body = node.dom.firstChild.lastChild;
  const steady = Math.max(0, (node.steady ?? 1) - 1); // rows that cannot change any more
  node.rows ??= 0;
  for (; node.rows > (node.stableRows ?? 0); node.rows--) body.lastChild.remove();
  for (; node.rows < node.lines.length - 1; node.rows++) body.append(el("tr", null, row(node, node.lines[node.rows + 1], "td")));
  node.stableRows = Math.min(steady, node.rows);
}

function fill(node, closed) {
  if (node.type === "paragraph") fillParagraph(node, closed);
  else if (node.type === "heading") fillParagraph(node, true);
  else if (node.type === "code") fillCode(node, closed);
  else if (node.type === "table") fillTable(node);
}

/** One answer's Markdown under `element`. `append` as text comes, `show` when it is time to paint, `finish` at the end. */
export class MarkdownView {
  constructor(element) {
    this.element = element;
    this.reader = new BlockReader();
    this.reader.root.dom = element;
    this.rest = []; // pieces of the last, unfinished line
    this.before = null; // where the tree stood before the unfinished line was shown
  }

  append(text) {
    this.rest.push(text);
  }

  /** Paints what came since the last call; its cost goes with that, not with the whole text. */
  show(last = false) {
    if (this.before) this.reader.rollback(this.before);
    this.before = null;
    let line = this.rest.join("");
    const end = line.lastIndexOf("\n");
    if (end >= 0 || last) {
      for (const each of line.slice(0, end < 0 ? 0 : end + 1).split("\n").slice(0, -1)) this.reader.line(each.replace(/\r$/, ""));
      line = line.slice(end + 1);
      if (last && line) this.reader.line(line);
      if (last) this.reader.closeTo(0);
      this.sync(this.reader.root, true);
    }
    this.rest = last ? [] : [line];
    if (!last && line) {
      this.before = this.reader.snapshot();
      this.reader.line(line, true);
      this.sync(this.reader.root, false);
    }
  }

  finish() {
    this.show(true);
  }

  // Brings the DOM of an open node up to its tree. `steady`: no half line is in the tree, so what is closed stays closed.
  sync(node, steady) {
    const { dom } = node;
    node.settled ??= 0; // blocks that are shown for good
    // Siblings are walked, never counted: browsers count a parent's children anew after each change.
    const first = node.type === "item" && node.task !== null ? dom.firstChild.nextSibling : dom.firstChild;
    let place = node.lastSettled ? node.lastSettled.nextSibling : first;
    for (let i = node.settled; i < node.children.length; i++) {
      const child = node.children[i];
      // At this place stands what shows this block, or what showed one that was taken back: a paragraph is used again.
      child.dom ??= child.type === "paragraph" && place?.nodeName === "P" ? place : BUILD[child.type](child);
      if (place === child.dom) place = place.nextSibling;
      else dom.insertBefore(child.dom, place);
      if (steady) child.steady = child.lines.length;
      fill(child, steady && !child.open);
      if (CONTAINERS.has(child.type)) this.sync(child, steady);
      if (steady && !child.open && i === node.settled) {
        node.settled = i + 1;
        node.lastSettled = child.dom;
      }
    }
    while (place) {
      const next = place.nextSibling;
      place.remove();
      place = next;
    }
  }
}

/** The whole text at once. */
export function markdown(element, text) {
  const view = new MarkdownView(element);
  view.append(text);
  view.finish();
  return view;
}
