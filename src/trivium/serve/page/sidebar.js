// The list of chats: open, rename, delete, and take them out of or into the browser.
import { button, byId, el, icon, mark } from "./dom.js";

const DAY_MS = 86_400_000;

function groupOf(time) {
  const today = new Date().setHours(0, 0, 0, 0);
  if (time >= today) return "Today";
  if (time >= today - DAY_MS) return "Yesterday";
  return time >= today - 7 * DAY_MS ? "This week" : "Earlier";
}

/** `actions`: create, open(id), rename(meta), remove(meta), exportAll, exportOne(meta), importFile(file). */
export class Sidebar {
  constructor(actions) {
    this.actions = actions;
    this.list = byId("chats");
    byId("brand").prepend(mark());
    byId("sidebar-new").append(button("New chat", { name: "plus", text: true, class: "new-chat", onclick: () => actions.create() }));
    const file = el("input", { type: "file", accept: ".json,application/json", class: "visually-hidden", "aria-label": "File with exported chats", tabindex: "-1", id: "import-file" });
    file.addEventListener("change", () => {
      if (file.files[0]) actions.importFile(file.files[0]);
      file.value = "";
    });
    byId("sidebar-tools").append(
      button("Export all", { name: "save", text: true, class: "tool", onclick: () => actions.exportAll() }),
      button("Import", { name: "load", text: true, class: "tool", onclick: () => file.click() }),
      file,
    );
  }

  /** @param {Set<string>} writing ids of chats in which an answer is being written */
  show(metas, openId, writing) {
    const focused = this.list.contains(document.activeElement) ? document.activeElement.closest("li")?.dataset.id : null;
    const groups = new Map();
    for (const meta of metas) {
      const name = groupOf(meta.updated);
      if (!groups.has(name)) groups.set(name, []);
      groups.get(name).push(this.#entry(meta, openId, writing.has(meta.id)));
    }
    const sections = [...groups].map(([name, entries], i) => {
      const id = `group-${i}`;
      return el("section", { "aria-labelledby": id }, el("h2", { id }, name), el("ul", null, entries));
    });
    this.list.replaceChildren(...(sections.length ? sections : [el("p", { class: "empty" }, "Your chats will be listed here.")]));
    if (focused) this.list.querySelector(`li[data-id="${focused}"] .chat-open`)?.focus();
  }

  #entry(meta, openId, writing) {
    const current = meta.id === openId;
    const open = el(
      "button",
      { type: "button", class: "chat-open", "aria-current": current ? "page" : null, title: meta.title, on: { click: () => this.actions.open(meta.id) } },
      el("span", { class: "chat-title", dir: "auto" }, meta.title),
      writing ? el("span", { class: "chat-busy", title: "Writing" }, el("span", { class: "visually-hidden" }, "(writing)")) : null,
    );
    const act = (label, name, work) => button(`${label} “${meta.title}”`, { name, class: "icon-button small", title: label, onclick: () => work(meta) });
    const tools = el("span", { class: "chat-tools" }, act("Rename", "edit", this.actions.rename), act("Export", "save", this.actions.exportOne), act("Delete", "bin", this.actions.remove));
    return el("li", { class: current ? "chat current" : "chat", "data-id": meta.id }, open, tools);
  }
}

/** Offers a text as a file. */
export function download(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  const link = el("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** The theme button: shows and says which theme is on. */
export function themeButton(current, next) {
  const show = (node, theme) => {
    const label = { system: "Theme: as the system", light: "Theme: light", dark: "Theme: dark" }[theme];
    node.replaceChildren(icon({ system: "half", light: "sun", dark: "moon" }[theme]));
    node.setAttribute("aria-label", label);
    node.title = label;
  };
  const node = button("Theme", { name: "half", class: "icon-button", onclick: () => show(node, next()) });
  show(node, current);
  return node;
}
