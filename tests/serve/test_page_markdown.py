"""The page's Markdown in a real browser: what it shows, that it is inert, and that hostile texts cost linear time."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.serve.page_browser import Visit
from tests.serve.page_server import PageServer

TAGS = (
    "A BLOCKQUOTE BR BUTTON CODE DEL DIV EM FIGCAPTION FIGURE H3 H4 H5 H6 HR INPUT LI OL P PRE SPAN STRONG TABLE TBODY"
    " TD TH THEAD TR UL svg path"
)
# Shows a text, whole or in pieces, and gives back a plain picture of the nodes: tag, attributes that matter, children.
RENDER = """async ([pieces]) => {
  const { MarkdownView } = await import("/markdown.js");
  const box = document.createElement("div");
  const view = new MarkdownView(box);
  for (const piece of pieces) view.append(piece), pieces.length > 1 && view.show();
  view.finish();
  const keep = ["href", "start", "checked"];
  const picture = (node) => {
    if (node.nodeType === 3) return node.data;
    if (["svg", "BUTTON", "FIGCAPTION"].includes(node.nodeName)) return "";
    if (node.className === "lines") return node.textContent.replace(/\\n$/, "") + (node.nextSibling ? "\\n" : "");
    const has = keep.filter((name) => node.hasAttribute(name)).map((name) => ` ${name}=${node.getAttribute(name)}`);
    return `<${node.nodeName.toLowerCase()}${has.join("")}>${[...node.childNodes].map(picture).join("")}</>`;
  };
  const all = [...box.querySelectorAll("*")];
  const names = all.flatMap((node) => [...node.attributes]).map((each) => each.name);
  const handlers = names.filter((name) => /^on|^style$|^src/.test(name));
  const links = all.filter((node) => node.nodeName === "A").map((node) => [node.protocol, node.rel, node.target]);
  const tags = [...new Set(all.map((node) => node.nodeName))];
  return { picture: [...box.childNodes].map(picture).join(""), tags, handlers, links };
}"""

SHOWN = [
    ("one\ntwo", "<p>one<br></>two</>"),
    ("a *b* _c_ **d** ***e*** ~~f~~", "<p>a <em>b</> <em>c</> <strong>d</> <strong><em>e</></> <del>f</></>"),
    ("**a *b* c** snake_case_name 2*3*4", "<p><strong>a <em>b</> c</> snake_case_name 2<em>3</>4</>"),
    ("*a **b* c** \\*d\\*", "<p><em>a **b</> c** *d*</>"),
    ("`a <b> *c*` ``x ` y`` `open", "<p><code>a <b> *c*</> <code>x ` y</> `open</>"),
    (
        '[a *b*](https://x.org/y "t") https://z.org/q_(r). end',
        "<p><a href=https://x.org/y>a <em>b</></> <a href=https://z.org/q_(r)>https://z.org/q_(r)</>. end</>",
    ),
    ("![alt](https://x.org/p.png)", "<p><a href=https://x.org/p.png>alt</></>"),
    ("[a](javascript:alert(1)) [b](/local) [c]", "<p>[a](javascript:alert(1)) [b](/local) [c]</>"),
    ("# T\n###### S ##\n####### no", "<h3>T</><h6>S</><p>####### no</>"),
    ("a\n\n---\nb", "<p>a</><hr></><p>b</>"),
    ("```py\nx = 1\n\n  y\n```\nafter", "<figure><pre><code>x = 1\n\n  y</></></><p>after</>"),
    ("~~~\n```\n~~~\n```\nopen", "<figure><pre><code>```</></></><figure><pre><code>open</></></>"),
    ("- a\n- b\n  - c\n\n    d\n- e", "<ul><li><p>a</></><li><p>b</><ul><li><p>c</><p>d</></></></><li><p>e</></></>"),
    (
        "3. a\n4. b\n   ```\n   code\n   ```\n\nend",
        "<ol start=3><li><p>a</></><li><p>b</><figure><pre><code>code</></></></></><p>end</>",
    ),
    ("1. a\n  - b\n* c", "<ol><li><p>a</><ul><li><p>b</></></></></><ul><li><p>c</></></>"),
    ("- [x] a\n- [ ] b", "<ul><li><input checked=></><p>a</></><li><input></><p>b</></></>"),
    ("> a\nb\n> - c\n\nd", "<blockquote><p>a<br></>b</><ul><li><p>c</></></></><p>d</>"),
    (
        "intro\n| a | b |\n|:--|--:|\n| `x|y` | 1\\|2 |\n\nend",
        "<p>intro</><div><table><thead><tr><th>a</><th>b</></></>"
        "<tbody><tr><td><code>x|y</></><td>1|2</></></></></><p>end</>",
    ),
    ("<b>x</b> &amp; <script>alert(1)</script>", "<p><b>x</b> &amp; <script>alert(1)</script></>"),
]
HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "[x](javascript:alert(1)) [x](JaVaScRiPt:alert(1)) [x](java\tscript:alert(1)) [x](\x01javascript:alert(1))",
    "[x](data:text/html,<script>alert(1)</script>) [x](vbscript:x) [x](file:///etc/passwd) [x](blob:https://a)",
    "[x](&#106;avascript:alert(1)) [x](//evil.org) <javascript:alert(1)> [x](<javascript:alert(1)>)",
    '[x](https://a.org" onmouseover="alert(1)) [x](https://a.org/"onclick=alert(1)) https://a.org/"onload="x',
    "```html\n<script>alert(1)</script>\n```\n`<svg onload=alert(1)>`\n| <iframe src=//evil.org> |\n|---|\n| <b> |",
    "![x](javascript:alert(1)) ![x](https://evil.org/pixel.png) <style>*{display:none}</style>",
    '```"><script>alert(1)</script>\nx\n```',
]
PATHS = {
    "stars": "*",
    "pairs": "**a",
    "open emphasis": "*a ",
    "underscores": "_a ",
    "mixed": "*a _b **c ",
    "brackets": "[",
    "closed brackets": "[]",
    "targets": "[](",
    "images": "![",
    "closers": "](",
    "half links": "[a](b ",
    "quoted": '[a](x "',
    "angles": "<",
    "half addresses": "<http://",
    "addresses": "http://a)",
    "escapes": "\\",
    "tildes": "~~a ",
    "bars": "|a",
    "quotes": "> ",
    "bullets": "- ",
    "numbers": "1. ",
    "quote lines": ">\n",
    "deeper lists": "- a\n ",
    "fences": "```\n",
    "tables": "|a|\n|-|\n",
    "hashes": "#",
    "blank": "\n",
    "spaces": " ",
    "list lines": "- a\n",
    "code quotes": "```py\n" + '"\\' * 9 + "\n```\n",
    "long code": "```c\n" + '/*"' * 6000 + "\n```\n",
    "bars and ticks": "|`",
}


@pytest.fixture(scope="module")
def page(browser: Any, stub: PageServer) -> Iterator[Any]:
    visit = Visit(browser, stub).open()
    yield visit.page
    visit.close()


def render(page: Any, *pieces: str) -> dict[str, Any]:
    return dict(page.evaluate(RENDER, [list(pieces)]))


@pytest.mark.parametrize(("text", "picture"), SHOWN, ids=range(len(SHOWN)))
def test_what_is_shown(page: Any, text: str, picture: str) -> None:
    assert render(page, text)["picture"] == picture


def test_pieces_show_the_same_as_the_whole(page: Any) -> None:
    draw = random.Random(5)
    texts = [text for text, _ in SHOWN] + HOSTILE + ["\n\n".join(text for text, _ in SHOWN)]
    lines = "\n".join(texts).split("\n")
    texts += [
        "\n".join(draw.choice(["", "  ", "    ", "> ", "- "]) + draw.choice(lines) for _ in range(60)) for _ in range(6)
    ]
    texts += ["```\n" + "\n".join(draw.choice(["", "x", "    y"]) for _ in range(400)) + "\n```\nend", "word " * 2500]
    for text in texts:
        cuts = sorted(draw.sample(range(len(text)), min(len(text) - 1, 60)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert render(page, *pieces)["picture"] == render(page, text)["picture"], text


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_stays_text(page: Any, text: str) -> None:
    for pieces in ([text], list(text), ["> - " + text], ["**" + text + "**"]):
        seen = render(page, *pieces)
        assert set(seen["tags"]) <= set(TAGS.split()) and not seen["handlers"]
        for protocol, rel, target in seen["links"]:
            assert protocol in ("http:", "https:") and "noopener" in rel and target == "_blank"
        assert "javascript:" not in str(seen["links"])


@pytest.mark.parametrize("name", PATHS)
def test_pathological_text_takes_linear_time(page: Any, name: str) -> None:
    """What is quadratic takes minutes for 100,000 characters; what is linear well under a second on a quiet core."""
    unit = PATHS[name]
    texts = [unit * (length // len(unit)) for length in (25_000, 100_000)]
    until = time.monotonic() + 120
    small, large = took(page, texts)
    # Four times the text: 4 times the time if linear, 16 times if quadratic; short times are not compared. What is not
    # linear never is; a core that was taken away comes back.
    while large >= max(1000, 9 * small) and time.monotonic() < until:
        small, large = took(page, texts)
    assert large < max(1000, 9 * small), f"{small:.0f} ms for 25,000 characters of {unit!r}, {large:.0f} ms for 100,000"


def took(page: Any, texts: list[str]) -> list[float]:
    """Milliseconds for each of the texts."""
    return list(
        page.evaluate(
            """async (texts) => {
              const { markdown } = await import("/markdown.js");
              return texts.map((text) => {
                const start = performance.now();
                markdown(document.createElement("div"), text);
                return performance.now() - start;
              });
            }""",
            texts,
        )
    )


def test_back_ticks_of_every_length(page: Any) -> None:
    text = " ".join("`" * n for n in range(1, 400))
    assert render(page, text)["picture"].count("`") == len(text) - 398


@pytest.mark.parametrize("kind", ["paragraphs", "code", "list", "table", "one line"])
def test_streaming_builds_each_node_once(page: Any, kind: str) -> None:
    """Twice the text makes about twice the nodes: nothing that is finished is built again. Counts, not times."""
    unit = {
        "paragraphs": "Some **bold** text with `code` in it.\nA line.\n\n",
        "code": "x = compute(1, 2)\n\n",
        "list": "- an *item* of the list\n",
        "table": "| a | b **c** |\n",
        "one line": "word **bold** and `code` ",
    }[kind]
    start = {"code": "```\n", "table": "| x | y |\n|---|---|\n"}.get(kind, "")
    made = [
        page.evaluate(
            """async ([text]) => {
              const { MarkdownView } = await import("/markdown.js");
              const { createElement } = document;
              let made = 0;
              document.createElement = function (...names) { made += 1; return createElement.apply(document, names); };
              const view = new MarkdownView(createElement.call(document, "div"));
              for (let at = 0; at < text.length; at += 40) view.append(text.slice(at, at + 40)), view.show();
              view.finish();
              document.createElement = createElement;
              return made;
            }""",
            [start + unit * times],
        )
        for times in (1000, 2000)
    ]
    assert made[1] < 2.2 * made[0], made


@pytest.mark.parametrize("language", ["py", "js", "sql", "unknown"])
def test_colours_change_no_character(page: Any, language: str) -> None:
    lines = [
        'x = "a\\"b" + \'c # d',
        "# note // note -- note",
        "if x: return 0x1F /* open",
        '"""long',
        "`a ${b}`",
        "</code>",
    ]
    code = "\n".join(lines * 30)
    seen = render(page, f"```{language}\n{code}\n```")
    assert seen["picture"] == f"<figure><pre><code>{code}</></></>"
    coloured = page.evaluate(
        """async ([text, language]) => {
          const { coloured } = await import("/code.js");
          const parts = coloured(text, language).filter((part) => part.className);
          return parts.map((part) => [part.className, part.textContent]);
        }""",
        ["if x: # no\n  y = 'a' + 1 -- z", language],
    )
    wanted = {
        "py": [["keyword", "if"], ["comment", "# no"], ["string", "'a'"], ["number", "1"]],
        "js": [["keyword", "if"], ["string", "'a'"], ["number", "1"]],
        "sql": [["keyword", "if"], ["string", "'a'"], ["number", "1"], ["comment", "-- z"]],
        "unknown": [],
    }
    assert [part for part in coloured if part[1] != "no"] == wanted[language]
