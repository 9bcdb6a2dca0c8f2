// Colours code: comments, texts, numbers and the usual keywords, by one pass of one pattern; unknown languages stay plain.
import { el } from "./dom.js";

const LONGEST = 20_000; // characters of one box: more stays plain

const HASH = "python py bash sh shell zsh yaml yml toml ruby rb perl r make makefile dockerfile julia jl elixir nix conf ini";
const SLASH = "javascript js jsx typescript ts tsx java c h cpp c++ cc cuda cu csharp cs go rust rs swift kotlin kt scala php json jsonc css scss dart zig proto glsl metal triton";
const DASH = "sql lua haskell hs ada";
const COMMENT = new Map([
  ...HASH.split(" ").map((name) => [name, "#[^\\n]*"]),
  ...SLASH.split(" ").map((name) => [name, "\\/\\/[^\\n]*|\\/\\*[\\s\\S]*?(?:\\*\\/|$)"]),
  ...DASH.split(" ").map((name) => [name, "--[^\\n]*"]),
]);
// An end that is missing is taken as it is, so that nothing is read twice.
const TEXT = `"""[\\s\\S]*?(?:"""|$)|'''[\\s\\S]*?(?:'''|$)|"(?:[^"\\\\\\n]|\\\\.)*"?|'(?:[^'\\\\\\n]|\\\\.)*'?|\`(?:[^\`\\\\]|\\\\.)*\`?`;
const NUMBER = "\\b\\d[\\w.]*";
const WORD = "[A-Za-z_$][\\w$]*";
const KEYWORDS = new Set(
  (
    "and as assert async await begin break case catch class const continue crate def default defer del do done elif else end enum esac except export " +
    "extends extern false False fi finally fn for from func function global go if impl implements import in instanceof interface is lambda let loop " +
    "match mod module mut namespace new nil None nonlocal not null or package pass private protected pub public raise return self Self static " +
    "struct super switch template then this throw trait true True try type typedef typename union unsafe use using var virtual void where while with yield " +
    "SELECT FROM WHERE INSERT INTO VALUES UPDATE SET DELETE CREATE TABLE JOIN LEFT RIGHT INNER ON GROUP ORDER BY LIMIT AS AND OR NOT NULL"
  ).split(" "),
);

const patterns = new Map(
  [...new Set(COMMENT.values())].map((comment) => [comment, new RegExp(`(${comment})|(${TEXT})|(${NUMBER})|(${WORD})`, "g")]),
);

/** The code as strings and coloured spans; their text is exactly the code's. */
export function coloured(code, language) {
  const comment = COMMENT.get(language.toLowerCase());
  if (!comment || code.length > LONGEST) return [code];
  const parts = [];
  let at = 0;
  for (const match of code.matchAll(patterns.get(comment))) {
    const [whole, isComment, isText, isNumber, word] = match;
    const kind = isComment ? "comment" : isText ? "string" : isNumber ? "number" : KEYWORDS.has(word) ? "keyword" : null;
    if (!kind) continue;
    parts.push(code.slice(at, match.index), el("span", { class: kind }, whole));
    at = match.index + whole.length;
  }
  return [...parts, code.slice(at)].filter((part) => part !== "");
}
