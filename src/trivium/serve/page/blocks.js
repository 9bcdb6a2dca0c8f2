// Reads Markdown line by line into a tree of blocks: each finished line is read once, the last half line can be taken back.

const DEEPEST = 12;
const MOST_COLUMNS = 64;
const FENCE = /^(`{3,}|~{3,})[ \t]*([^`\n]{0,200})$/;
const HEADING = /^(#{1,6})(?:[ \t]+(.*))?$/;
const RULE = /^(?:\*[ \t]*){3,}$|^(?:-[ \t]*){3,}$|^(?:_[ \t]*){3,}$/;
const ITEM = /^(?:([-*+])|(\d{1,9})([.)]))(?:([ \t]+)|$)/;
const DELIMITERS = /^\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;

function block(type, more = {}) {
  return { type, children: [], lines: [], open: true, ...more };
}

/** A table line's cells: cut at bars that are neither escaped nor inside back-ticks. */
export function cells(line) {
  const parts = [];
  let part = "";
  let code = false;
  for (const piece of line.trim().replace(/^\|/, "").split(/(\\\||`+|\|)/)) {
    if (piece === "|" && !code) {
      parts.push(part.trim());
      part = "";
    } else {
      if (piece.startsWith("`")) code = !code && line.indexOf("`") !== line.lastIndexOf("`");
      part += piece === "\\|" ? "|" : piece;
    }
  }
  if (part.trim() || !line.trimEnd().endsWith("|")) parts.push(part.trim());
  return parts.slice(0, MOST_COLUMNS);
}

function indentOf(text) {
  return text.length - text.trimStart().length;
}

/** The open path of a document and what each new line does to it. */
export class BlockReader {
  constructor() {
    this.root = block("document");
    this.stack = [this.root]; // open containers, outermost first
    this.leaf = null; // the open paragraph, code or table
  }

  /** Where the tree stands now, for `rollback`: costs as much as the path is deep. */
  snapshot() {
    const nodes = this.leaf ? [...this.stack, this.leaf] : [...this.stack];
    const state = nodes.map((node) => [node, node.children.length, node.lines.length, node.open]);
    return { stack: [...this.stack], leaf: this.leaf, state };
  }

  rollback({ stack, leaf, state }) {
    this.stack = [...stack];
    this.leaf = leaf;
    for (const [node, children, lines, open] of state) {
      node.children.length = children;
      node.lines.length = lines;
      node.open = open;
    }
  }

  closeLeaf() {
    if (this.leaf) this.leaf.open = false;
    this.leaf = null;
  }

  // Closes all containers deeper than `depth` of the stack.
  closeTo(depth) {
    if (this.stack.length > depth) this.closeLeaf();
    while (this.stack.length > depth) this.stack.pop().open = false;
  }

  add(node) {
    this.closeLeaf();
    this.stack.at(-1).children.push(node);
    return node;
  }

  addLeaf(node) {
    this.leaf = this.add(node);
  }

  addContainer(node) {
    this.stack.push(this.add(node));
  }

  /** Reads one line. With `half` it may not be whole yet: nothing that is already there is changed in kind. */
  line(raw, half = false) {
    let text = /^ *\t/.test(raw) ? raw.replace(/^[ \t]+/, (space) => space.replaceAll("\t", "    ")) : raw;
    let depth = 1;
    let inside = false;
    for (; depth < this.stack.length; depth++) {
      const rest = this.continues(this.stack[depth], text);
      if (rest === null) break;
      if (this.stack[depth].type !== "list") inside = true;
      text = rest;
    }
    const matched = depth === this.stack.length;
    if (matched && this.leaf?.type === "code") return this.codeLine(inside ? text : raw);
    if (text.trim() === "") return this.blank(matched);
    const started = this.starts(text, depth);
    if (started) return;
    const continues = this.leaf?.type === "paragraph"; // also a lazy line, without the marks of its containers
    if (!continues) this.closeTo(depth);
    if (this.stack.at(-1).type === "list") this.closeTo(this.stack.length - 1);
    this.paragraphLine(text.trim(), half);
  }

  continues(node, text) {
    if (node.type === "list") return text;
    if (node.type === "quote") {
      const found = /^ {0,3}> ?/.exec(text);
      return found ? text.slice(found[0].length) : null;
    }
    if (text.trim() === "") return text;
    const indent = indentOf(text);
    return indent >= node.least ? text.slice(Math.min(indent, node.indent)) : null;
  }

  codeLine(text) {
    const { leaf } = this;
    const close = text.trim();
    if (close.length >= leaf.fence.length && close[0] === leaf.fence[0] && close === leaf.fence[0].repeat(close.length)) {
      return this.closeLeaf();
    }
    const indent = Math.min(indentOf(text), leaf.indent);
    leaf.lines.push(text.slice(indent));
  }

  blank(matched) {
    if (this.leaf && (this.leaf.type !== "code" || !matched)) this.closeLeaf();
    // A quote ends at a blank line without its sign.
    const quote = this.stack.findIndex((node) => node.type === "quote");
    if (!matched && quote > 0) this.closeTo(quote);
  }

  // Opens what this text starts: containers first, then a heading, rule or fence. False: it is plain text.
  starts(text, depth) {
    let opened = false;
    let rest = text;
    for (;;) {
      const trimmed = rest.trimStart();
      const indent = rest.length - trimmed.length;
      if (trimmed[0] === ">" && this.stack.length < DEEPEST) {
        if (!opened) this.closeTo(this.withoutList(depth));
        this.addContainer(block("quote"));
        rest = trimmed.slice(trimmed[1] === " " ? 2 : 1);
      } else if (ITEM.test(trimmed) && !RULE.test(trimmed) && this.itemMay(trimmed, opened) && this.stack.length < DEEPEST) {
        rest = this.item(trimmed, indent, opened ? null : depth);
      } else {
        break;
      }
      opened = true;
    }
    const trimmed = rest.trim();
    const leaf = this.leafOf(trimmed, indentOf(rest));
    if (leaf) {
      if (!opened) this.closeTo(this.withoutList(depth));
      if (leaf.type === "code") this.addLeaf(leaf);
      else this.add(leaf).open = false;
    } else if (opened && trimmed) {
      this.addLeaf(block("paragraph", { lines: [trimmed] }));
    }
    return opened || leaf !== null;
  }

  withoutList(depth) {
    return this.stack[depth - 1].type === "list" ? depth - 1 : depth;
  }

  // In the middle of a paragraph only an item with text starts a list, and a number only if it is 1.
  itemMay(text, opened) {
    const [whole, , number] = ITEM.exec(text);
    if (opened || this.leaf?.type !== "paragraph" || this.stack.some((node) => node.type === "list")) return true;
    return whole.length < text.length && (number === undefined || number === "1");
  }

  item(text, indent, depth) {
    const [whole, bullet, number, stop, space] = ITEM.exec(text);
    const kind = bullet ?? stop;
    let rest = text.slice(whole.length);
    const width = (space?.length ?? 1) > 4 ? whole.length - space.length + 1 : whole.length + (space ? 0 : 1);
    if (depth !== null) this.closeTo(depth);
    const last = this.stack.at(-1);
    if (last.type === "list" && last.kind !== kind) this.closeTo(this.stack.length - 1);
    if (this.stack.at(-1).type !== "list") {
      this.addContainer(block("list", { kind, ordered: number !== undefined, first: Number(number ?? 1) }));
    }
    const task = /^\[([ xX])\][ \t]+/.exec(rest);
    if (task) rest = rest.slice(task[0].length);
    // Models indent what belongs to "1. " by two or three columns: both are taken.
    const node = { indent: indent + width, least: indent + Math.min(width, 2), task: task ? task[1] !== " " : null };
    this.addContainer(block("item", node));
    return rest;
  }

  leafOf(text, indent) {
    const fence = FENCE.exec(text);
    if (fence) return block("code", { fence: fence[1], language: fence[2].trim().split(/\s/)[0], indent });
    if (indent > 3) return null;
    const heading = HEADING.exec(text);
    if (heading) {
      const title = (heading[2] ?? "").replace(/[ \t]+#+$/, "").trim();
      return block("heading", { level: heading[1].length, lines: [title] });
    }
    return RULE.test(text) ? block("rule") : null;
  }

  paragraphLine(text, half) {
    if (this.leaf?.type === "table") {
      if (text.includes("|")) return void this.leaf.lines.push(text);
      this.closeLeaf();
    }
    if (this.leaf?.type !== "paragraph") return this.addLeaf(block("paragraph", { lines: [text] }));
    const { lines } = this.leaf;
    const header = lines.at(-1);
    if (!half && header.includes("|") && text.length < 2000 && DELIMITERS.test(text)) {
      const align = cells(text).map((c) => (c.endsWith(":") ? (c.startsWith(":") ? "center" : "right") : "left"));
      if (align.length === cells(header).length) return this.table(header, align);
    }
    lines.push(text);
  }

  // The paragraph's last line was a table's head.
  table(header, align) {
    const paragraph = this.leaf;
    paragraph.lines.pop();
    if (!paragraph.lines.length) this.stack.at(-1).children.pop();
    this.addLeaf(block("table", { align, lines: [header] }));
  }
}
