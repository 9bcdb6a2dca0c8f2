// Builds DOM nodes from plain data: the page's only door to the document. Text goes in as text, never as markup.

const SVG = "http://www.w3.org/2000/svg";

/** Sets attributes: `true` stands for the empty value; null, undefined and false leave the attribute out. */
function setAttributes(node, attributes) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (name === "on") {
      for (const [event, listener] of Object.entries(value)) node.addEventListener(event, listener);
    } else if (/^(on|style$|srcdoc$)/i.test(name)) {
      throw new TypeError(`dom: attribute ${name} is not set from data`);
    } else if (value !== null && value !== undefined && value !== false) {
      node.setAttribute(name, value === true ? "" : String(value));
    }
  }
  return node;
}

/** A new HTML element. Children are nodes, strings (as text), arrays of these, or null. */
export function el(tag, attributes, ...children) {
  const node = setAttributes(document.createElement(tag), attributes);
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** A new SVG element. */
export function svg(tag, attributes, ...children) {
  const node = setAttributes(document.createElementNS(SVG, tag), attributes);
  node.append(...children.filter(Boolean));
  return node;
}

/** The element of index.html with this id. */
export function byId(id) {
  const node = document.getElementById(id);
  if (!node) throw new Error(`index.html has no #${id}`);
  return node;
}

/** Writes text only when it changed, so that screen readers and layout are not stirred for nothing. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// Strokes on a 24 × 24 grid.
const ICONS = {
  plus: ["M12 5v14", "M5 12h14"],
  up: ["M12 19V5", "M6 11l6-6 6 6"],
  down: ["M12 5v14", "M6 13l6 6 6-6"],
  stop: ["M8 8h8v8H8z"],
  copy: ["M9 9h10v10H9z", "M15 5H5v10"],
  check: ["M5 13l4 4L19 7"],
  edit: ["M4 20l1-4L16 5l3 3L8 19z", "M14 7l3 3"],
  again: ["M20 11a8 8 0 1 0-2.3 6", "M20 5v6h-6"],
  onward: ["M5 6l7 6-7 6z", "M14 6l6 6-6 6"],
  left: ["M15 6l-6 6 6 6"],
  right: ["M9 6l6 6-6 6"],
  menu: ["M4 7h16", "M4 12h10", "M4 17h16"],
  sliders: ["M4 8h9", "M19 8h1", "M4 16h2", "M12 16h8", "M16 5.5a2.5 2.5 0 1 0 0 5a2.5 2.5 0 1 0 0-5", "M9 13.5a2.5 2.5 0 1 0 0 5a2.5 2.5 0 1 0 0-5"],
  pulse: ["M3 12h4l3-7 4 14 3-7h4"],
  sun: ["M12 8a4 4 0 1 0 0 8a4 4 0 1 0 0-8", "M12 2v2", "M12 20v2", "M2 12h2", "M20 12h2", "M5 5l1.4 1.4", "M17.6 17.6L19 19", "M5 19l1.4-1.4", "M17.6 6.4L19 5"],
  moon: ["M20 14.5A8.5 8.5 0 0 1 9.5 4 8.5 8.5 0 1 0 20 14.5z"],
  half: ["M12 4a8 8 0 1 0 0 16a8 8 0 1 0 0-16", "M12 4v16", "M12 8h7", "M12 12h8", "M12 16h7"],
  save: ["M12 4v11", "M7 10l5 5 5-5", "M5 20h14"],
  load: ["M12 15V4", "M7 9l5-5 5 5", "M5 20h14"],
  bin: ["M5 7h14", "M9 7V4h6v3", "M7 7l1 13h8l1-13"],
  close: ["M6 6l12 12", "M18 6L6 18"],
  key: ["M8 11a4 4 0 1 0 0 8a4 4 0 1 0 0-8", "M11 12l8-8", "M16 7l3 3"],
  alert: ["M12 4l9 16H3z", "M12 10v4", "M12 17v.5"],
  page: ["M7 3h7l4 4v14H7z", "M14 3v4h4", "M10 12h5", "M10 16h5"],
  picture: ["M4 5h16v14H4z", "M4 16l5-5 4 4 3-3 4 4"],
};

/** An icon by name; it says nothing to screen readers, the button around it has the words. */
export function icon(name) {
  const strokes = ICONS[name].map((d) => svg("path", { d }));
  return svg("svg", { viewBox: "0 0 24 24", class: "icon", "aria-hidden": "true", focusable: "false" }, ...strokes);
}

/** The mark: three roads that meet. */
export function mark() {
  return svg(
    "svg",
    { viewBox: "0 0 32 32", class: "mark", "aria-hidden": "true", focusable: "false" },
    svg("path", { d: "M16 17V28" }),
    svg("path", { d: "M16 17C16 11 12 9 5 6" }),
    svg("path", { d: "M16 17C16 11 20 9 27 6" }),
    svg("circle", { cx: 16, cy: 17, r: 3 }),
  );
}

/** A button with an icon and a spoken label; `text` also shows the label. */
export function button(label, { name = null, text = false, onclick, ...attributes }) {
  const node = el(
    "button",
    { type: "button", "aria-label": text ? null : label, title: text ? null : label, ...attributes, on: { click: onclick } },
    name ? icon(name) : null,
    text ? el("span", null, label) : null,
  );
  return node;
}

/** Copies text; where the clipboard is closed to the page (plain http on a network), through a selection. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = el("textarea", { class: "visually-hidden", "aria-hidden": "true", readonly: true });
    area.value = text;
    const before = document.activeElement;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    before?.focus?.();
    return done;
  }
}

/** A button that copies what `text()` returns and says so for a moment. */
export function copyButton(label, text, attributes = {}) {
  const node = button(label, {
    name: "copy",
    ...attributes,
    onclick: async () => {
      const done = await copyText(text());
      node.replaceChildren(icon(done ? "check" : "alert"));
      node.setAttribute("aria-label", done ? "Copied" : "The browser refused to copy");
      setTimeout(() => {
        node.replaceChildren(icon("copy"));
        node.setAttribute("aria-label", label);
      }, 1600);
    },
  });
  return node;
}
