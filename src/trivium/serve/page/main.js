// Starts the page: makes its parts and joins them; each part knows only what it is handed here.
import { Announcer, ChatView } from "./chat.js";
import { Chats } from "./chats.js";
import { Client } from "./client.js";
import { Composer } from "./composer.js";
import { askKey, askText, askYes, notice, toast } from "./dialog.js";
import { button, byId, el, mark, setText } from "./dom.js";
import { Panel } from "./panel.js";
import { currentTheme, keep, kept, nextTheme } from "./prefs.js";
import { Pulse } from "./pulse.js";
import { LARGEST_IMPORT } from "./records.js";
import { SettingsPanel } from "./settings.js";
import { download, Sidebar, themeButton } from "./sidebar.js";
import { shownState, stateWords, StatusPanel } from "./status.js";
import { Store } from "./store.js";

const IDEAS = ["Explain a mixture of experts in three sentences", "Write a Python function that merges two sorted lists", "What should I ask a language model first?"];
const WIDE = matchMedia("(min-width: 900px)");

const client = new Client();
const announcer = new Announcer(byId("announcer"));
const store = new Store((words) => notice("store", words));
let models = [];
let model = kept("model", (value) => typeof value === "string", "");
let asking = null;

const chats = new Chats({
  client,
  store,
  model: () => model,
  onchange: draw,
  onpiece(message, piece) {
    view.append(message, piece);
    announcer.hear(piece);
  },
  onend(run) {
    const ends = { done: "Answer finished.", stopped: "Answer stopped.", interrupted: "The answer was interrupted.", error: "No answer came." };
    announcer.close(ends[run.message.state] ?? "");
    if (run.error?.kind === "auth") needKey(true);
    if (run.error?.kind === "offline" || run.error?.kind === "cut") pulse.now();
  },
});

const view = new ChatView({
  regenerate: (message) => chats.regenerate(message),
  onward: (message) => chats.onward(message),
  edit: (message, text) => (view.follow(), chats.edit(message, text)),
  choose: (message) => chats.choose(message),
});

const composer = new Composer({
  onsend(text) {
    view.following = true;
    const sent = chats.send(text);
    if (sent) announcer.say("Message sent.");
    return sent;
  },
  onstop: () => chats.stop(),
  oneditlast: () => view.editLast(),
  tokens: (text, signal) => (pulse.state === "ready" ? client.count(model, text, signal) : null),
});

const sidebar = new Sidebar({
  create() {
    chats.create();
    drawer(false);
    composer.area.focus();
  },
  async open(id) {
    await chats.open(id);
    drawer(false);
    if (WIDE.matches) composer.area.focus();
  },
  async rename(meta) {
    const title = await askText("Rename chat", "Title", meta.title);
    if (title) chats.rename(meta, title);
  },
  async remove(meta) {
    if (await askYes("Delete chat?", `“${meta.title.slice(0, 80)}” will be gone from this browser.`, "Delete")) chats.remove(meta);
  },
  exportAll: () => save(chats.metas),
  exportOne: (meta) => save([meta]),
  async importFile(file) {
    try {
      if (file.size > LARGEST_IMPORT) throw new Error(`The file has ${file.size} bytes; at most ${LARGEST_IMPORT} are read.`);
      const count = await chats.takeIn(await file.text());
      toast(`Imported ${count} chat${count === 1 ? "" : "s"}.`);
    } catch (error) {
      toast(`Nothing was imported. ${error.message}`);
    }
  },
});

const settings = new SettingsPanel((changed) => chats.configure(changed));
const status = new StatusPanel();
const pulse = new Pulse(client, onpulse);
const pill = button("Server", { class: "pill", onclick: () => panel.toggle("status") });
const picker = el("select", { class: "model-pick", "aria-label": "Model", hidden: true, on: { change: () => choose(picker.value) } });
const modelName = el("span", { class: "model-name", dir: "auto" });
const panel = new Panel(
  [
    { name: "settings", label: "Settings", element: settings.element },
    { name: "status", label: "Status", element: status.element },
  ],
  (name) => {
    byId("app").classList.toggle("with-panel", name !== null);
    pulse.attention = name === "status" || chats.run !== null;
    veil();
  },
);

function save(metas) {
  if (!metas.length) return toast("There is no chat to export yet.");
  const day = new Date().toISOString().slice(0, 10);
  return chats.giveOut(metas).then((text) => download(`trivium-chats-${day}.json`, text));
}

function choose(id) {
  model = id;
  keep("model", id);
  setText(modelName, id);
  modelName.title = id;
  setText(byId("welcome-model"), id ? `You are talking to ${id}.` : "");
}

function queueWords() {
  const waiting = pulse.status?.waiting;
  return waiting ? `In the queue, ${waiting} waiting` : "";
}

let drawnChat = null;
function draw() {
  const { current, run } = chats;
  view.show(current, { busy: run !== null, queue: queueWords() });
  sidebar.show(chats.metas, current?.meta.id, new Set(chats.runs.keys()));
  composer.running = run !== null;
  pulse.attention = panel.open === "status" || run !== null;
  const title = current?.messages.size ? current.meta.title : "";
  document.title = title ? `${title} · Trivium` : "Trivium";
  setText(byId("heading"), title || "New chat");
  if (drawnChat !== current) settings.show(current.meta);
  drawnChat = current;
}

/** Asks for the key once at a time; `wrong` when a key was just refused. */
async function needKey() {
  asking ??= askKey(client.hasKey);
  const key = await asking;
  asking = null;
  if (key) {
    client.setKey(key);
    pulse.now();
  }
  notice("key", key ? null : "The server needs a key.", key ? null : button("Enter key", { name: "key", text: true, class: "quiet", onclick: needKey }));
}

function onpulse(state, before) {
  const { status: now } = pulse;
  status.show(state, now);
  const seen = shownState(state, now);
  pill.dataset.state = seen;
  const [words] = stateWords(seen);
  setText(pill.lastChild, words);
  pill.setAttribute("aria-label", `Server: ${words}. Show the status panel`);
  pill.title = stateWords(seen)[1];
  const retry = button("Try now", { text: true, class: "quiet", onclick: () => pulse.now() });
  notice("gone", state === "gone" ? (navigator.onLine ? "The server cannot be reached. Trying again by itself." : "This device is offline.") : null, retry);
  notice("loading", state === "loading" ? `Not ready yet. ${pulse.words}` : null);
  if (state === "locked" && before !== "locked") needKey();
  if (state !== "locked" && before === "locked") notice("key", null);
  if (state === "gone") for (const run of chats.runs.values()) run.serverGone();
  if (before === "gone" && state === "ready") toast("The server is back.");
  if (state === "ready" && (before !== "ready" || !models.length)) findModels();
  if (chats.run && !chats.run.message.content) draw();
}

async function findModels() {
  try {
    models = await client.models();
  } catch {
    return; // the pulse shows why
  }
  picker.replaceChildren(...models.map(({ id }) => el("option", { value: id }, id)));
  picker.hidden = models.length < 2;
  modelName.hidden = models.length > 1;
  choose(models.some(({ id }) => id === model) ? model : (models[0]?.id ?? ""));
  picker.value = model;
}

// On a narrow page the list of chats and the panel lie over the messages; a veil closes them.
function drawer(open) {
  byId("app").classList.toggle("with-drawer", open);
  byId("menu").setAttribute("aria-expanded", String(open));
  veil();
  if (open) byId("sidebar").querySelector("button")?.focus();
}

function veil() {
  const { classList } = byId("app");
  byId("veil").hidden = !classList.contains("with-drawer") && (!classList.contains("with-panel") || WIDE.matches);
}

function furnish() {
  const menu = button("Chats", { name: "menu", class: "icon-button", id: "menu", "aria-expanded": "false", "aria-controls": "sidebar" });
  menu.addEventListener("click", () => {
    if (!WIDE.matches) return drawer(!byId("app").classList.contains("with-drawer"));
    keep("narrow", byId("app").classList.toggle("without-sidebar"));
  });
  if (kept("narrow", (value) => value === true, false)) byId("app").classList.add("without-sidebar");
  const fresh = button("New chat", { name: "plus", class: "icon-button only-narrow", onclick: () => (chats.create(), composer.area.focus()) });
  byId("top-left").append(menu, modelName, picker);
  pill.replaceChildren(el("span", { class: "dot", "aria-hidden": "true" }), el("span", null, "Connecting"));
  pill.dataset.state = "connecting";
  const tune = button("Settings", { name: "sliders", class: "icon-button", onclick: () => panel.toggle("settings") });
  byId("top-right").append(pill, fresh, tune, themeButton(currentTheme(), nextTheme));
  const idea = (words) => el("button", { type: "button", class: "idea", on: { click: () => (composer.text = words) } }, words);
  byId("welcome").append(mark(), el("h2", null, "Where shall we begin?"), el("p", { id: "welcome-model", class: "welcome-model", dir: "auto" }), el("div", { class: "ideas" }, IDEAS.map(idea)));
  byId("veil").addEventListener("click", () => (drawer(false), panel.show(null)));
  WIDE.addEventListener("change", veil);
  document.addEventListener("keydown", onkey);
  const keepPage = (event) => event.dataTransfer?.types.includes("Files") && event.preventDefault(); // a dropped file must not replace the page
  document.addEventListener("dragover", keepPage);
  document.addEventListener("drop", keepPage);
}

function onkey(event) {
  if (event.key !== "Escape" || event.defaultPrevented || document.querySelector("dialog[open]")) return;
  if (byId("app").classList.contains("with-drawer")) return drawer(false), byId("menu").focus();
  if (chats.run) return chats.stop();
  if (panel.open && byId("panel").contains(document.activeElement)) panel.show(null);
}

async function start() {
  furnish();
  await store.open();
  await chats.start();
  if (store.damaged) notice("damaged", `${store.damaged} damaged entr${store.damaged === 1 ? "y was" : "ies were"} skipped.`);
  const open = kept("panel", (value) => ["settings", "status"].includes(value), "");
  if (open && WIDE.matches) panel.show(open);
  if (WIDE.matches) composer.area.focus();
  document.documentElement.dataset.started = "true";
  await pulse.start();
}

start();
