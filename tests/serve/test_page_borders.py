"""The page at its borders: hostile text, large pastes, damaged or refused storage, keyboard, screen readers, phones."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from tests.serve.page_browser import Visit
from tests.serve.page_server import LOADS, PAGE, SLOW, PageServer, Reply

HOSTILE = '<img src=x onerror="alert(1)"><script>alert(2)</script><svg onload=alert(3)>"\'><iframe src=//evil.org>'


def foreign_nodes(visit: Visit) -> int:
    return int(visit.page.evaluate("document.body.querySelectorAll('img, script, iframe, [onload], [onerror]').length"))


def test_hostile_text_is_inert_everywhere(visit: Visit, stub: PageServer, tmp_path: Path) -> None:
    stub.models = [HOSTILE, f"second {HOSTILE}"]
    visit.reload()
    visit.page.get_by_label("Model", exact=True).wait_for()
    assert visit.ask(HOSTILE, Reply(pieces=list(HOSTILE))) == HOSTILE
    visit.send(HOSTILE, Reply(status=400, message=HOSTILE))
    visit.answer("error")
    visit.send(HOSTILE, Reply(pieces=["x"], gap_s=0.1, then="error", message=HOSTILE))
    visit.answer("interrupted")
    visit.button("Server: Ready. Show the status panel").click()
    visit.page.locator(".status-model", has_text="onerror").wait_for()
    assert visit.texts()[0] == HOSTILE and HOSTILE in visit.page.locator(".note").last.inner_text()
    with visit.page.expect_download() as waiting:
        visit.button("Export all").click()
    file = tmp_path / "chats.json"
    waiting.value.save_as(file)
    content = json.loads(file.read_text())
    content["conversations"][0]["meta"]["title"] = f"imported {HOSTILE}"
    file.write_text(json.dumps(content))
    visit.page.set_input_files("#import-file", file)
    visit.page.locator(".chat-title", has_text="imported").wait_for()
    visit.page.set_input_files("#import-file", {"name": "x", "mimeType": "", "buffer": b'{"format": "<img src=x>"}'})
    visit.sees("Nothing was imported.")
    visit.reload()
    assert foreign_nodes(visit) == 0
    assert visit.page.evaluate("document.querySelectorAll('script').length") == 2  # the page's own


def test_no_file_of_the_page_makes_markup_of_text() -> None:
    """The rule that the renderer's safety rests on, read off the source; so is that nothing outside is loaded."""
    forbidden = re.compile(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|createContextualFragment|setHTML"
        r"|\beval\(|new Function|setTimeout\(\s*[\"'`]|import\(|localStorage\[|javascript:|@import|url\("
    )
    outside = re.compile(r"(?:src|href)=\"(?:https?:)?//|from \"(?!\./)|fetch\(\s*[\"'`]")
    inline = re.compile(r"\sstyle=|\son\w+=\"|<script>|<style")
    files = sorted(PAGE.iterdir())
    assert {"index.html", "main.js", "style.css"} <= {file.name for file in files}
    for file in files:
        text = file.read_text()
        assert not forbidden.search(text) and not outside.search(text), file.name
        assert not (file.suffix == ".html" and inline.search(text)), file.name
        assert len(text.splitlines()) <= 400, file.name
        second = text.splitlines()[1] if file.suffix == ".html" else text[:200]
        assert re.match(r"// |/\* |<!-- |<svg [^>]*><!-- ", second), f"{file.name} does not say its one reason first"


def test_a_paste_of_a_megabyte(visit: Visit, stub: PageServer) -> None:
    took = visit.page.evaluate(
        """() => {
          const area = document.getElementById("draft");
          const data = new DataTransfer();
          data.setData("text/plain", "all work and no play\\n".repeat(50_000));
          const start = performance.now();
          area.dispatchEvent(new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true }));
          document.body.offsetHeight;
          return performance.now() - start;
        }"""
    )
    assert took < 30_000  # against hanging only: a core may be taken away
    visit.sees("Pasted, 1.1 million characters")
    visit.ask("What is this?")
    assert len(stub.requests[0]["messages"][0]["content"]) == 50_000 * 21 + len("\n\nWhat is this?")
    assert len(visit.texts()[0]) < 7000
    visit.button("Show all 1,050,015 characters").click()
    assert visit.page.locator(".plain-box").count() > 50
    assert visit.ask("still there") == "Hello from the stub."
    visit.button("New chat").first.click()
    visit.page.evaluate(
        """() => {
          const data = new DataTransfer();
          data.setData("text/plain", "x".repeat(20_000));
          const event = new ClipboardEvent("paste", { clipboardData: data, cancelable: true });
          document.getElementById("draft").dispatchEvent(event);
        }"""
    )
    visit.button("Remove pasted text").click()
    assert visit.button("Send message").is_disabled()


def test_damaged_storage(visit: Visit) -> None:
    visit.ask("sound", Reply(pieces=["record"]))
    visit.page.evaluate(
        """() => new Promise((resolve) => {
          localStorage.setItem("trivium.settings", "{");
          localStorage.setItem("trivium.theme", '"<b>"');
          localStorage.setItem("trivium.open", "[1]");
          sessionStorage.setItem("trivium.partial", '[["a"], 7]');
          indexedDB.open("trivium").onsuccess = ({ target: { result } }) => {
            const work = result.transaction(["conversations", "messages"], "readwrite");
            const [chats, messages] = ["conversations", "messages"].map((name) => work.objectStore(name));
            chats.put({ id: "aa" });
            chats.put({ id: "bb", title: { toString: 1 }, created: "x" });
            messages.index("conversation").getAll().onsuccess = ({ target }) => {
              const [sound] = target.result;
              const { conversation } = sound;
              messages.put({ id: "cc", conversation, parent: null, role: "system", content: "x" });
              messages.put({ ...sound, id: "d1", parent: "d2", content: "circle", seq: 0 });
              messages.put({ ...sound, id: "d2", parent: "d1", content: "circle too", seq: 0 });
            };
            work.oncomplete = resolve;
          };
        })"""
    )
    visit.reload()
    visit.sees("2 damaged entries were skipped.")
    visit.page.locator(".chat-open").click()
    visit.page.locator(".text", has_text="record").wait_for()
    assert visit.texts() == ["sound", "record"]
    assert visit.ask("and on") == "Hello from the stub."


@pytest.mark.parametrize("refused", ["closed", "full"])
def test_storage_refused(browser: Any, stub: PageServer, refused: str) -> None:
    stub.reset()
    visit = Visit(browser, stub)
    visit.context.add_init_script(
        "Storage.prototype.setItem = () => { throw new DOMException('no', 'QuotaExceededError') };"
        + {
            "closed": "indexedDB.open = () => { throw new DOMException('no', 'SecurityError') };"
            "const get = () => { throw new DOMException('no', 'SecurityError') };"
            "Object.defineProperty(window, 'localStorage', { get });",
            "full": "IDBObjectStore.prototype.put = () => { throw new DOMException('no', 'QuotaExceededError') };",
        }[refused]
    )
    visit.open()
    assert visit.ask("go") == "Hello from the stub."
    visit.sees("storage is full" if refused == "full" else "keeps nothing")
    visit.button("New chat").first.click()
    visit.page.locator(".chat-open", has_text="go").click()
    visit.page.locator(".text", has_text="Hello from the stub.").wait_for()
    assert visit.texts() == ["go", "Hello from the stub."]
    with visit.page.expect_download():
        visit.button("Export all").click()
    visit.close()


def test_keyboard_alone(visit: Visit, stub: PageServer) -> None:
    page = visit.page
    page.reload()
    visit.started()
    for _ in range(40):  # back to the first thing on the page
        page.keyboard.press("Shift+Tab")
        if page.evaluate("document.activeElement.className") == "skip":
            break
    assert page.locator(".skip").bounding_box()["y"] >= 0, "the focused skip link is out of sight"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "draft"
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    visit.answer()
    assert stub.requests[-1]["messages"][0]["content"] == "one\ntwo"
    page.keyboard.press("ArrowUp")
    assert page.evaluate("document.activeElement.value") == "one\ntwo"
    page.keyboard.press("Escape")
    page.focus("#draft")
    stub.replies.append(SLOW)
    page.keyboard.type("long")
    page.keyboard.press("Enter")
    page.locator(".text", has_text="word2").wait_for()
    page.keyboard.press("Escape")
    visit.answer("stopped")
    page.evaluate("document.activeElement.blur()")
    seen = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(
            """() => {
              const node = document.activeElement;
              const box = node.id === "draft" ? document.getElementById("composer") : node;
              const style = getComputedStyle(box);
              const name = node.getAttribute("aria-label") ?? node.textContent;
              return [name, style.outlineStyle !== "none" || box !== node];
            }"""
        )
        seen.add(name.strip())
        assert outline or page.evaluate("document.activeElement === document.body"), f"no visible focus on {name!r}"
    wanted = {"New chat", "Export all", "Import", "Message", "Edit message", "Copy message", "Regenerate", "Settings"}
    assert wanted <= seen
    visit.button("Settings").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.getAttribute('role')") == "tab"
    page.keyboard.press("ArrowRight")
    page.get_by_role("tab", name="Status", selected=True).wait_for()
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Settings"


def test_names_for_screen_readers(visit: Visit) -> None:
    visit.ask("hi", Reply(pieces=["# Title\n\n```py\nx\n```\n\n| a |\n|---|\n| b |\n"]))
    visit.button("Settings").click()
    tree = visit.page.locator("body").aria_snapshot()
    unnamed = re.findall(
        r"^\s*- (?:button|textbox|combobox|checkbox|tab|tabpanel|link|article)(?: \[.*\])?:?$", tree, re.M
    )
    assert not unnamed, tree
    for part in (
        'navigation "Chats"',
        "- main",
        'log "Messages"',
        'complementary "Settings and status"',
        'article "You"',
    ):
        assert part in tree, f"{part} is missing in\n{tree}"
    assert visit.page.evaluate("document.documentElement.lang") == "en"
    assert visit.page.get_by_role("heading", level=1).inner_text() == "hi"
    live = visit.page.locator("#announcer")
    assert live.get_attribute("aria-live") == "polite" and "Answer finished." in live.inner_text()
    assert visit.page.locator("#log").get_attribute("aria-live") == "off", "each token would be spoken"


def test_answers_are_spoken_in_sentences(visit: Visit) -> None:
    visit.page.evaluate(
        """() => {
          window.spoken = 0;
          const region = document.getElementById("announcer");
          new MutationObserver(() => (window.spoken += 1)).observe(region, { childList: true });
        }"""
    )
    visit.ask("go", Reply(pieces=["A sentence. "] * 100, gap_s=0.005))
    assert 1 <= visit.page.evaluate("window.spoken") <= 8


@pytest.mark.parametrize("width", [320, 390])
def test_phone(browser: Any, stub: PageServer, width: int) -> None:
    stub.reset()
    visit = Visit(browser, stub, has_touch=True)
    visit.page.set_viewport_size({"width": width, "height": 640})
    visit.open()
    table = f"| {' | '.join('abcdefgh')} |\n|{'---|' * 8}"
    wide = f"`{'code' * 60}`\n\n```\n{'x' * 300}\n```\n\n{table}\n\nhttps://x.org/{'y' * 200}"
    visit.ask("w" * 300, Reply(pieces=[wide]))
    visit.send("again", Reply(pieces=["x"], gap_s=0.1, then="error", message="m" * 200))
    visit.answer("interrupted")
    fits = """() => {
      const shown = [...document.querySelectorAll("body *")].filter((node) =>
        node.checkVisibility({ visibilityProperty: true }) && !node.closest("pre, .table, .visually-hidden, .skip"));
      const wide = shown.filter((node) => {
        const { left, right } = node.getBoundingClientRect();
        return right > innerWidth + 1 || left < -1;
      });
      const names = wide.map((node) => `${node.nodeName}.${node.className}`);
      return [document.documentElement.scrollWidth <= innerWidth, names];
    }"""
    assert visit.page.evaluate(fits) == [True, []]
    visit.button("Chats").click()
    visit.page.locator(".chat-open").wait_for()
    assert visit.page.evaluate(fits)[0]
    visit.page.locator(".chat-open").click()
    visit.button("Settings").click()
    visit.page.get_by_label("Temperature").wait_for()
    visit.page.wait_for_timeout(250)
    assert visit.page.evaluate(fits) == [True, []]
    visit.button("Close panel").click()
    visit.page.locator("#draft").fill("\n".join("line" for _ in range(40)))
    box = visit.page.locator("#send").bounding_box()
    assert box["y"] + box["height"] <= 640 and box["x"] + box["width"] <= width
    visit.close()


def test_status_panel(visit: Visit, stub: PageServer) -> None:
    stub.running, stub.waiting = 3, 2
    visit.page.get_by_role("button", name="Server:").click()
    visit.page.get_by_role("button", name="Server: Busy").wait_for()
    panel = visit.page.locator("#panel")
    picture = panel.get_by_role("img")
    assert "4 layers of 8 experts. The busiest is expert 8 of layer 2, with 6.3 times" in panel.inner_text()
    assert picture.locator("rect").count() == 32 and picture.locator(".level-8").count() >= 1
    assert panel.get_by_role("meter").get_attribute("aria-valuenow") == "37"
    assert re.search(r"Being written\s+3\s+In the queue\s+2", panel.inner_text())
    first, *rest = LOADS
    stub.experts = [[first[0] + 50, *first[1:]], *rest]
    visit.sees("The busiest is expert 1 of layer 1")  # counts since the start: what was added is shown
    stub.experts = None
    picture.wait_for(state="hidden")
    asked, began = stub.status_calls, time.monotonic()
    while stub.status_calls == asked:
        assert time.monotonic() - began < 120, "somebody looks, and the server is not asked"
        visit.page.wait_for_timeout(100)
    assert stub.status_calls - asked <= 2 + (time.monotonic() - began)
    visit.button("Close panel").click()
    asked, began = stub.status_calls, time.monotonic()
    visit.page.wait_for_timeout(4000)  # watched, it would be asked four times
    often = "nobody looks, and the server is still asked often"
    assert stub.status_calls - asked <= 2 + (time.monotonic() - began - 4) / 5, often


def test_status_of_any_shape(visit: Visit) -> None:
    visit.page.get_by_role("button", name="Server:").click()
    shapes: list[Any] = [{"experts": [["x", None], 7, {}]}, {"cache_usage": "much", "running": -1}, {"model": 3}, []]
    current: list[Any] = [{}]
    visit.page.route("**/v1/status", lambda route: route.fulfill(json=current[0]))
    for current[0] in shapes:
        for _ in range(2):  # the first may have been under way
            with visit.page.expect_response("**/v1/status"):
                pass
        assert "NaN" not in visit.page.locator("#panel").inner_text()
    assert visit.ask("go") == "Hello from the stub."


def test_theme(visit: Visit) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    visit.page.emulate_media(color_scheme="light")
    light = visit.page.evaluate(ground)
    visit.page.emulate_media(color_scheme="dark")
    dark = visit.page.evaluate(ground)
    assert light != dark
    visit.button("Theme: as the system").click()
    assert visit.page.evaluate(ground) == light
    visit.reload()
    assert visit.page.evaluate(ground) == light
    visit.button("Theme: light").click()
    visit.page.emulate_media(color_scheme="light")
    assert visit.page.evaluate(ground) == dark


def test_two_tabs(visit: Visit) -> None:
    visit.send("go", SLOW)
    visit.page.locator(".text", has_text="word3").wait_for()
    other = visit.watch(visit.context.new_page())
    other.goto(visit.server.url)
    other.locator(".chat-open", has_text="go").wait_for()
    other.locator(".message.assistant").wait_for()
    assert other.get_by_text("interrupted").count() == 0, "the answer is being written in the other tab"
    visit.page.keyboard.press("Escape")
    visit.answer("stopped")
    other.get_by_text("You stopped this answer.").wait_for()
