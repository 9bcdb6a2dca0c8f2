// Questions the page asks (a name, a yes, the server's key) in native modal dialogs, and short passing words.
import { byId, el } from "./dom.js";

let serial = 0;

/** Shows a dialog and resolves to what `answer()` gives on OK, or null when it is left. */
function ask({ title, words, field = null, ok, danger = false, answer }) {
  return new Promise((resolve) => {
    const id = `dialog-${(serial += 1)}`;
    const dialog = el("dialog", { class: "dialog", "aria-labelledby": id });
    let result = null;
    const accept = (event) => {
      event.preventDefault();
      result = answer();
      dialog.close();
    };
    const form = el(
      "form",
      { on: { submit: accept } },
      el("h2", { id }, title),
      words ? el("p", null, words) : null,
      field,
      el(
        "div",
        { class: "dialog-actions" },
        el("button", { type: "button", class: "quiet", on: { click: () => dialog.close() } }, "Cancel"),
        el("button", { type: "submit", class: danger ? "solid danger" : "solid" }, ok),
      ),
    );
    dialog.append(form);
    dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(result);
    });
    document.body.append(dialog);
    dialog.showModal();
    field?.querySelector("input")?.select();
  });
}

/** @returns {Promise<string|null>} */
export function askText(title, label, value) {
  const input = el("input", { type: "text", maxlength: 200, autofocus: true });
  input.value = value;
  const field = el("label", { class: "field" }, el("span", null, label), input);
  return ask({ title, field, ok: "Save", answer: () => input.value.trim() || null });
}

/** @returns {Promise<boolean>} */
export async function askYes(title, words, ok) {
  return (await ask({ title, words, ok, danger: true, answer: () => true })) === true;
}

/** @returns {Promise<string|null>} */
export function askKey(wrong) {
  const input = el("input", { type: "password", autocomplete: "off", autofocus: true, maxlength: 4096 });
  const field = el("label", { class: "field" }, el("span", null, "API key"), input);
  const words = wrong ? "The server did not accept this key. " : "This server answers only with a key. ";
  const where = "It is kept until this tab is closed and sent to this server only.";
  return ask({ title: "Key needed", words: words + where, field, ok: "Use key", answer: () => input.value.trim() || null });
}

/** A few words that pass. */
export function toast(words) {
  const node = el("p", { class: "toast" }, words);
  byId("toasts").append(node);
  setTimeout(() => node.remove(), 5000);
}

/** A lasting notice above the messages, by name; null words take it away. */
export function notice(name, words, action = null) {
  const box = byId("notices");
  const old = box.querySelector(`[data-name="${name}"]`);
  if (!words) return void old?.remove();
  if (old?.firstChild.textContent === words) return;
  const node = el("div", { class: "notice", "data-name": name, role: "status" }, el("span", null, words), action);
  if (old) old.replaceWith(node);
  else box.append(node);
}
