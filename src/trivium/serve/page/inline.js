// Markdown inside a line of text (emphasis, code, links) as DOM nodes, in one pass and linear time.
import { el, icon } from "./dom.js";

const DEEPEST = 24;
const SPECIAL = /[\\`*_~[\]!<h\n]/g;
const TARGET = /\(\s{0,8}(?:<([^<>\n]{0,2000})>|([^\s()<>]{0,2000}(?:\([^\s()<>]{0,200}\)[^\s()<>]{0,2000})?))(?:\s{1,8}(?:"[^"]{0,300}"|'[^']{0,300}'))?\s{0,8}\)/y;
const BARE = /https?:\/\/[^\s<>"'`\\|*]{1,2000}/y;
const ANGLE = /<(https?:\/\/[^\s<>]{1,2000})>/y;
const PUNCTUATION = /[!-/:-@[-`{-~]/;
const WORD = /[\p{L}\p{N}]/u;

/** The address as the browser understands it if it is http or https, else null. */
export function safeAddress(text) {
  try {
    const url = new URL(text);
    return url.protocol === "https:" || url.protocol === "http:" ? url.href : null;
  } catch {
    return null;
  }
}

function link(address, children) {
  return el("a", { href: address, title: address, target: "_blank", rel: "noopener noreferrer nofollow" }, children);
}

// Where the runs of back-ticks of each length are: a closing run is found without scanning twice.
function backtickRuns(text) {
  const runs = new Map();
  for (const match of text.matchAll(/`+/g)) {
    if (!runs.has(match[0].length)) runs.set(match[0].length, { at: [], next: 0 });
    runs.get(match[0].length).at.push(match.index);
  }
  return runs;
}

class Scan {
  constructor(text) {
    this.text = text;
    this.out = [];
    this.marks = []; // open marks: {kind, source, start: index into out}
    this.open = new Map(); // how many open marks there are of each kind
    this.runs = text.includes("`") ? backtickRuns(text) : null;
  }

  literal(text) {
    if (!text) return;
    if (typeof this.out.at(-1) === "string") this.out[this.out.length - 1] += text;
    else this.out.push(text);
  }

  push(kind, source) {
    if (this.marks.length >= DEEPEST) {
      const oldest = this.marks.shift();
      this.open.set(oldest.kind, this.open.get(oldest.kind) - 1);
      this.out[oldest.start] = oldest.source;
    }
    this.marks.push({ kind, source, start: this.out.length });
    this.out.push(""); // stands for the mark; becomes its text again if nothing closes it
    this.out.push(null); // keeps text before and after the mark apart
    this.open.set(kind, (this.open.get(kind) ?? 0) + 1);
  }

  pop() {
    const mark = this.marks.pop();
    this.open.set(mark.kind, this.open.get(mark.kind) - 1);
    return mark;
  }

  // Closes the nearest open mark of this kind; marks above it become text. Returns what it holds.
  close(kind) {
    while (this.marks.at(-1).kind !== kind) {
      const mark = this.pop();
      this.out[mark.start] = mark.source;
    }
    const mark = this.pop();
    return this.out.splice(mark.start).filter((part) => part !== null && part !== "");
  }

  has(kind) {
    return (this.open.get(kind) ?? 0) > 0;
  }

  emphasis(at) {
    const { text } = this;
    const sign = text[at];
    let end = at;
    while (text[end] === sign) end++;
    const length = end - at;
    const before = text[at - 1] ?? " ";
    const after = text[end] ?? " ";
    if (length > 3 || (sign === "~" && length !== 2)) return this.literal(text.slice(at, end)), end;
    const inWord = sign === "_" && WORD.test(before) && WORD.test(after);
    const closes = !/\s/.test(before) && !inWord && !(sign === "_" && WORD.test(after));
    const opens = !/\s/.test(after) && !inWord && !(sign === "_" && WORD.test(before));
    let left = length;
    while (closes && left) {
      const widths = (left >= 2 ? [2, 1] : [1]).filter((w) => this.has(sign + w));
      const nearest = this.marks.findLast((mark) => widths.some((w) => mark.kind === sign + w));
      if (!nearest) break;
      const width = Number(nearest.kind[1]);
      const tag = sign === "~" ? "del" : width === 2 ? "strong" : "em";
      const children = this.close(nearest.kind);
      this.out.push(children.length ? el(tag, null, children) : nearest.source + nearest.source);
      left -= width;
    }
    if (left && opens) {
      if (left === 3) this.push(sign + 2, sign.repeat(2));
      const width = left === 3 ? 1 : left;
      this.push(sign + width, sign.repeat(width));
    } else {
      this.literal(sign.repeat(left));
    }
    return end;
  }

  code(at) {
    const { text } = this;
    let end = at;
    while (text[end] === "`") end++;
    const runs = this.runs.get(end - at);
    while (runs.next < runs.at.length && runs.at[runs.next] < end) runs.next++;
    const close = runs.at[runs.next];
    if (close === undefined) return this.literal(text.slice(at, end)), end;
    let inside = text.slice(end, close).replaceAll("\n", " ");
    if (/^ .*[^ ].* $/.test(inside) && inside.length < 1000) inside = inside.slice(1, -1);
    this.out.push(el("code", null, inside));
    return close + (end - at);
  }

  bracket(at) {
    const kind = this.has("[") || this.has("!") ? this.marks.findLast((mark) => "[!".includes(mark.kind)).kind : null;
    TARGET.lastIndex = at + 1;
    const target = kind && this.text[at + 1] === "(" ? TARGET.exec(this.text) : null;
    const address = target ? safeAddress(target[1] ?? target[2]) : null;
    if (!kind) return this.literal("]"), at + 1;
    if (!address) {
      const mark = this.marks.findLast((each) => each.kind === kind);
      const children = this.close(kind);
      this.literal(mark.source);
      for (const child of children) typeof child === "string" ? this.literal(child) : this.out.push(child);
      this.literal("]");
      return at + 1;
    }
    const children = this.close(kind);
    // An image is not fetched: the page sends no request elsewhere. It becomes a link with a sign.
    const flat = children.map((child) => (child.nodeName === "A" ? child.textContent : child));
    if (kind === "!") this.out.push(link(address, [icon("picture"), flat.length ? flat : "image"]));
    else this.out.push(flat.length ? link(address, flat) : link(address, address));
    return TARGET.lastIndex;
  }

  address(at) {
    if (this.text[at] === "<") {
      ANGLE.lastIndex = at;
      const angle = ANGLE.exec(this.text);
      const target = angle && safeAddress(angle[1]);
      if (!target) return this.literal("<"), at + 1;
      this.out.push(link(target, angle[1]));
      return ANGLE.lastIndex;
    }
    BARE.lastIndex = at;
    const bare = WORD.test(this.text[at - 1] ?? " ") ? null : BARE.exec(this.text);
    if (!bare || this.has("[") || this.has("!")) {
      const whole = bare ? bare[0].match(/^[^[\]]*/)[0] || "h" : "h";
      return this.literal(whole), at + whole.length;
    }
    let address = bare[0];
    let depth = 0; // closing brackets beyond the opening ones belong to the sentence
    for (const sign of address) depth += sign === "(" ? 1 : sign === ")" ? -1 : 0;
    while (/[.,;:!?\])_~]/.test(address.at(-1)) && !(address.endsWith(")") && depth >= 0)) {
      if (address.endsWith(")")) depth++;
      address = address.slice(0, -1);
    }
    const target = safeAddress(address);
    if (target) this.out.push(link(target, address));
    else this.literal(address);
    return at + address.length;
  }

  run() {
    const { text } = this;
    let at = 0;
    while (at < text.length) {
      SPECIAL.lastIndex = at;
      const next = SPECIAL.exec(text)?.index ?? text.length;
      this.literal(text.slice(at, next));
      at = next;
      if (at >= text.length) break;
      const sign = text[at];
      if (sign === "\n") this.out.push(el("br")), at++;
      else if (sign === "\\" && PUNCTUATION.test(text[at + 1] ?? "")) this.literal(text[at + 1]), (at += 2);
      else if (sign === "`") at = this.code(at);
      else if (sign === "*" || sign === "_" || sign === "~") at = this.emphasis(at);
      else if (sign === "[") this.push("[", "["), at++;
      else if (sign === "!" && text[at + 1] === "[") this.push("!", "!["), (at += 2);
      else if (sign === "]") at = this.bracket(at);
      else if (sign === "<" || sign === "h") at = this.address(at);
      else this.literal(sign), at++;
    }
    for (const mark of this.marks) this.out[mark.start] = mark.source;
    return this.out.filter((part) => part !== null && part !== "");
  }
}

/** The text as nodes and strings, ready for `append`. Nothing in it can become markup, script or a request. */
export function inline(text) {
  return new Scan(text).run();
}
