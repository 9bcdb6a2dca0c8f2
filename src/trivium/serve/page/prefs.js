// Small choices kept in localStorage (theme, panel, last chat, last settings): every one may be missing, damaged or refused.

const PREFIX = "trivium.";

/** The kept value if `right(value)`, else `otherwise`. */
export function kept(name, right, otherwise) {
  try {
    const value = JSON.parse(localStorage.getItem(PREFIX + name));
    return value !== null && right(value) ? value : otherwise;
  } catch {
    return otherwise;
  }
}

/** Keeps a value; without effect where storage is full or closed, since nothing here is worth a message. */
export function keep(name, value) {
  try {
    localStorage.setItem(PREFIX + name, JSON.stringify(value));
  } catch {
    // the choice lasts as long as the page
  }
}

const THEMES = ["system", "light", "dark"];

/** The next theme after the present one; applied and kept. */
export function nextTheme() {
  const theme = THEMES[(THEMES.indexOf(currentTheme()) + 1) % THEMES.length];
  keep("theme", theme);
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  return theme;
}

export function currentTheme() {
  return kept("theme", (value) => THEMES.includes(value), "system");
}

const PARTIAL = "partial"; // in sessionStorage, where a reload of this tab finds it

/** Writes down at once what answers have come so far: [[message id, text], …]. Called when the page goes away. */
export function stashPartial(texts) {
  try {
    if (texts.length) sessionStorage.setItem(PREFIX + PARTIAL, JSON.stringify(texts));
  } catch {
    // too large for the session's store: the last periodic write stands
  }
}

/** What the page had when it went away, by message id; forgotten once read. */
export function takePartial() {
  try {
    const texts = JSON.parse(sessionStorage.getItem(PREFIX + PARTIAL) ?? "[]");
    sessionStorage.removeItem(PREFIX + PARTIAL);
    return new Map(texts.filter(([id, text]) => typeof id === "string" && typeof text === "string"));
  } catch {
    return new Map();
  }
}
