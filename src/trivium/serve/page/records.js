// Reads stored or imported records field by field, so that a damaged or hostile one is refused and never half used.

const ID = /^[0-9a-f]{1,64}$/;
const STATES = new Set(["done", "streaming", "stopped", "interrupted", "error"]);
const LONGEST_TEXT = 16 * 1024 * 1024;
const MOST_MESSAGES = 20_000;
export const LARGEST_IMPORT = 64 * 1024 * 1024;
export const FORMAT = "trivium-chats";

/** The settings of a request: [lowest, highest, whole number?]; `null` there means: the server's own default. */
export const SETTINGS = {
  temperature: [0, 2, false],
  top_p: [0, 1, false],
  max_tokens: [1, 1_000_000, true],
  seed: [0, 2 ** 31 - 1, true],
  presence_penalty: [-2, 2, false],
  frequency_penalty: [-2, 2, false],
};

/** A record that cannot be used, and why. */
export class RecordError extends Error {}

function need(right, where, what) {
  if (!right) throw new RecordError(`${where}: expected ${what}`);
}

function text(value, where, longest = LONGEST_TEXT) {
  need(typeof value === "string" && value.length <= longest, where, `text of at most ${longest} characters`);
  return value;
}

function id(value, where) {
  need(typeof value === "string" && ID.test(value), where, "an id of up to 64 hexadecimal digits");
  return value;
}

function number(value, where, low = 0, high = Number.MAX_SAFE_INTEGER) {
  need(typeof value === "number" && value >= low && value <= high, where, `a number from ${low} to ${high}`);
  return value;
}

function isObject(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** Only known settings within their limits. */
export function readSettings(value, where = "settings") {
  need(isObject(value), where, "an object");
  const read = {};
  for (const [name, [low, high, whole]] of Object.entries(SETTINGS)) {
    const given = Object.hasOwn(value, name) ? value[name] : null;
    if (given === null) continue;
    read[name] = number(given, `${where}.${name}`, low, high);
    need(!whole || Number.isInteger(given), `${where}.${name}`, "a whole number");
  }
  if (Array.isArray(value.stop)) read.stop = value.stop.slice(0, 8).map((each, i) => text(each, `${where}.stop[${i}]`, 64));
  return read;
}

export function readMeta(value, where = "conversation") {
  need(isObject(value), where, "an object");
  const chosen = Array.isArray(value.chosen) ? value.chosen.slice(0, MOST_MESSAGES) : [];
  for (const pair of chosen) need(Array.isArray(pair) && pair.length === 2 && pair.every((each) => typeof each === "string"), `${where}.chosen`, "pairs of ids");
  return {
    id: id(value.id, `${where}.id`),
    title: text(value.title, `${where}.title`, 400),
    named: value.named === true,
    created: number(value.created, `${where}.created`),
    updated: number(value.updated, `${where}.updated`),
    system: text(value.system ?? "", `${where}.system`),
    settings: readSettings(value.settings ?? {}, `${where}.settings`),
    model: text(value.model ?? "", `${where}.model`, 1000),
    chosen: chosen.map(([parent, child]) => [parent, child]),
  };
}

export function readMessage(value, where = "message") {
  need(isObject(value), where, "an object");
  need(value.role === "user" || value.role === "assistant", `${where}.role`, '"user" or "assistant"');
  need(STATES.has(value.state), `${where}.state`, `one of ${[...STATES].join(", ")}`);
  const stats = isObject(value.stats) ? value.stats : null;
  return {
    id: id(value.id, `${where}.id`),
    conversation: id(value.conversation, `${where}.conversation`),
    parent: value.parent === null ? null : id(value.parent, `${where}.parent`),
    role: value.role,
    content: text(value.content, `${where}.content`),
    state: value.state,
    seq: number(value.seq, `${where}.seq`),
    created: number(value.created, `${where}.created`),
    error: text(value.error ?? "", `${where}.error`, 4000),
    finish: text(value.finish ?? "", `${where}.finish`, 100),
    model: text(value.model ?? "", `${where}.model`, 1000),
    stats: stats && { tokens: number(stats.tokens, `${where}.stats.tokens`), first_s: number(stats.first_s, `${where}.stats.first_s`), rate: number(stats.rate, `${where}.stats.rate`) },
  };
}

/** All that `exported` wrote: [{meta, messages}], with `fresh()` ids, so that an import never overwrites anything. */
export function readExport(source, fresh) {
  let value;
  try {
    value = JSON.parse(source);
  } catch (error) {
    throw new RecordError(`The file is not JSON: ${error.message}`);
  }
  need(isObject(value) && value.format === FORMAT, "format", `"${FORMAT}"; this is not a file that this page exported`);
  need(value.version === 1, "version", "1; the file comes from another version of this page");
  need(Array.isArray(value.conversations), "conversations", "a list");
  return value.conversations.map((each, i) => {
    const where = `conversations[${i}]`;
    need(isObject(each) && Array.isArray(each.messages), `${where}.messages`, "a list");
    need(each.messages.length <= MOST_MESSAGES, `${where}.messages`, `at most ${MOST_MESSAGES} messages`);
    const names = new Map();
    const meta = readMeta(each.meta, `${where}.meta`);
    const messages = each.messages.map((one, j) => readMessage(one, `${where}.messages[${j}]`));
    meta.id = fresh();
    for (const message of messages) {
      need(!names.has(message.id), `${where}.messages`, `distinct ids; ${message.id} is there twice`);
      names.set(message.id, fresh());
    }
    for (const message of messages) {
      need(message.parent === null || names.has(message.parent), `${where}.messages`, `the parent ${message.parent} of ${message.id}`);
      const state = message.state === "streaming" ? "interrupted" : message.state;
      Object.assign(message, { id: names.get(message.id), parent: names.get(message.parent) ?? null, conversation: meta.id, state });
    }
    meta.chosen = meta.chosen.map(([parent, child]) => [names.get(parent) ?? "", names.get(child) ?? ""]);
    return { meta, messages };
  });
}

/** The text of a file with these conversations ({meta, messages}). */
export function exported(conversations) {
  return JSON.stringify({ format: FORMAT, version: 1, exported: new Date().toISOString(), conversations }, null, 1);
}
