// The panel at the side: two tabs, settings and status, opened from the header.
import { button, byId, el } from "./dom.js";
import { keep } from "./prefs.js";

/** `tabs`: [{name, label, element}]; `onchange(open tab's name or null)`. */
export class Panel {
  constructor(tabs, onchange) {
    this.onchange = onchange;
    this.element = byId("panel");
    this.open = null;
    this.opener = null;
    this.tabs = tabs.map(({ name, label, element }) => {
      const tab = el("button", { type: "button", role: "tab", id: `tab-${name}`, "aria-controls": `pane-${name}`, on: { click: () => this.show(name) } }, label);
      const pane = el("div", { role: "tabpanel", id: `pane-${name}`, "aria-labelledby": `tab-${name}`, class: "pane", tabindex: "0" }, element);
      return { name, tab, pane };
    });
    const list = el("div", { role: "tablist", "aria-label": "Panel", class: "tabs", on: { keydown: (event) => this.#key(event) } }, this.tabs.map((each) => each.tab));
    const close = button("Close panel", { name: "close", class: "icon-button", onclick: () => this.show(null) });
    this.element.append(el("div", { class: "panel-top" }, list, close), ...this.tabs.map((each) => each.pane));
  }

  #key(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const at = this.tabs.findIndex((each) => each.name === this.open);
    const next = this.tabs[(at + step + this.tabs.length) % this.tabs.length];
    this.show(next.name);
    next.tab.focus();
  }

  /** Opens a tab; null closes the panel and gives the focus back to what opened it. */
  show(name) {
    const had = this.element.contains(document.activeElement);
    if (name && !this.open) this.opener = document.activeElement;
    this.open = name;
    this.element.hidden = name === null;
    for (const { name: each, tab, pane } of this.tabs) {
      tab.setAttribute("aria-selected", String(each === name));
      tab.tabIndex = each === name ? 0 : -1;
      pane.hidden = each !== name;
    }
    keep("panel", name ?? "");
    this.onchange(name);
    if (name === null && had) this.opener?.focus?.();
  }

  toggle(name) {
    this.show(this.open === name ? null : name);
    if (this.open) this.tabs.find((each) => each.name === name).tab.focus();
  }
}
