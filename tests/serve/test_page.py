"""The page in a real browser: chats, branches, every state of an answer, and what is kept."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.serve.page_browser import Visit
from tests.serve.page_server import SLOW, PageServer, Reply


def eventually(right: Callable[[], bool], limit_s: float = 10) -> bool:
    until = time.monotonic() + limit_s
    while not right() and time.monotonic() < until:
        time.sleep(0.02)
    return right()


def streaming(visit: Visit) -> None:
    """Waits until some words of SLOW are shown."""
    visit.page.locator(".message.last .text", has_text="word3").wait_for()


def test_send(visit: Visit, stub: PageServer) -> None:
    assert visit.ask("Good day") == "Hello from the stub."
    assert visit.ask("And now", Reply(pieces=["Some ", "**bold** ", "words"])) == "Some bold words"
    first, second = stub.requests
    wanted = {"model": "stub-1", "stream": True, "stream_options": {"include_usage": True}}
    assert first == {**wanted, "messages": [{"role": "user", "content": "Good day"}]}
    assert [m["content"] for m in second["messages"]] == ["Good day", "Hello from the stub.", "And now"]
    assert "3 tokens" in visit.page.locator(".message.last .figures").inner_text()
    assert visit.page.locator(".message.last strong").inner_text() == "bold"
    visit.reload()
    visit.shows(["Good day", "Hello from the stub.", "And now", "Some bold words"])
    assert visit.page.title() == "Good day · Trivium"


@pytest.mark.parametrize("way", ["button", "Escape"])
def test_stop(visit: Visit, stub: PageServer, way: str) -> None:
    visit.send("go", SLOW)
    streaming(visit)
    if way == "button":
        visit.button("Stop the answer").click()
    else:
        visit.page.keyboard.press("Escape")
    visit.answer("stopped")
    visit.sees("You stopped this answer.")
    assert visit.texts()[1].startswith("word0 word1 word2 word3")
    assert eventually(lambda: stub.left == 1), "the server's stream goes on"
    visit.button("Send message").wait_for()
    assert visit.ask("more") == "Hello from the stub."


def test_regenerate_makes_a_sibling(visit: Visit) -> None:
    visit.ask("hi", Reply(pieces=["first"]))
    visit.server.replies.append(Reply(pieces=["second"]))
    visit.button("Regenerate").click()
    visit.page.locator(".text", has_text="second").wait_for()
    visit.page.get_by_label("Version 2 of 2").wait_for()
    visit.button("Previous version").click()
    visit.shows(["hi", "first"])
    visit.reload()
    visit.shows(["hi", "first"])
    visit.button("Next version").click()
    visit.shows(["hi", "second"])


def test_edit_branches(visit: Visit, stub: PageServer) -> None:
    visit.ask("one", Reply(pieces=["answer one"]))
    visit.ask("two", Reply(pieces=["answer two"]))
    visit.server.replies.append(Reply(pieces=["answer uno"]))
    visit.button("Edit message").first.click()
    box = visit.page.get_by_role("textbox", name="Edit message")
    assert box.input_value() == "one"
    box.fill("uno")
    visit.button("Send edited").click()
    visit.page.locator(".text", has_text="answer uno").wait_for()
    visit.answer()
    visit.shows(["uno", "answer uno"])
    assert [m["content"] for m in stub.requests[-1]["messages"]] == ["uno"]
    visit.button("Previous version").click()
    visit.shows(["one", "answer one", "two", "answer two"])
    visit.button("Edit message").first.click()
    visit.page.keyboard.press("Escape")
    assert visit.texts()[0] == "one"


def test_reload_in_mid_stream_keeps_the_part(visit: Visit, stub: PageServer) -> None:
    visit.send("go", SLOW)
    streaming(visit)
    visit.reload()
    visit.answer("interrupted")
    visit.sees("This answer was interrupted.")
    part = visit.texts()[1]
    assert part.startswith("word0 word1 word2 word3")
    assert visit.page.locator(".waiting").count() == 0
    stub.replies.append(Reply(pieces=["and ", "the ", "end"], then="hang"))
    visit.button("Continue").click()
    visit.page.locator(".message[data-state=streaming] .text", has_text="and the end").wait_for()
    visit.page.keyboard.press("Escape")
    visit.answer("stopped")
    assert visit.texts()[1] == f"{part} and the end"
    asked = stub.requests[-1]
    assert asked["continue_final_message"] is True and asked["add_generation_prompt"] is False
    assert asked["messages"][-1]["role"] == "assistant" and asked["messages"][-1]["content"].strip() == part
    visit.button("Regenerate").last.click()
    visit.page.get_by_label("Version 2 of 2").wait_for()


def test_continue_in_words_where_the_server_cannot(visit: Visit, stub: PageServer) -> None:
    visit.send("go", Reply(pieces=["the beginning"], then="length"))
    visit.sees("The answer reached its token limit.")
    stub.replies += [Reply(status=400, param="continue_final_message"), Reply(pieces=[" and the end"])]
    visit.button("Continue").click()
    visit.page.locator(".text", has_text="the beginning and the end").wait_for()
    visit.answer()
    roles = [m["role"] for m in stub.requests[-1]["messages"]]
    assert roles == ["user", "assistant", "user"] and "continue_final_message" not in stub.requests[-1]


def test_server_killed_in_mid_stream(visit: Visit, stub: PageServer) -> None:
    visit.send("go", SLOW)
    streaming(visit)
    stub.kill()
    try:
        visit.answer("interrupted")
        visit.sees("The server cannot be reached.")
        assert visit.texts()[1].startswith("word0 word1")
        visit.page.get_by_role("button", name="Server: Not reachable").wait_for()
        visit.send("anyone there?")
        visit.answer("error")
        visit.sees("No answer came.")
        assert visit.page.locator(".waiting").count() == 0
    finally:
        stub.start()
    visit.sees("The server is back.")
    assert visit.page.get_by_text("The server cannot be reached. Trying").count() == 0
    visit.button("Try again").click()
    visit.answer()
    assert visit.texts()[-1] == "Hello from the stub."
    assert visit.page.get_by_label("Version 2 of 2").count() == 0, "a failed try is replaced, not kept as a version"


def test_offline(visit: Visit) -> None:
    visit.ask("before")
    visit.context.set_offline(True)
    visit.sees("This device is offline.")
    visit.send("during")
    visit.answer("error")
    visit.context.set_offline(False)
    visit.page.get_by_role("button", name="Server: Ready").wait_for()
    visit.button("Try again").click()
    visit.answer()
    visit.shows(["before", "Hello from the stub.", "during", "Hello from the stub."])


FAILURES = [
    (Reply(pieces=["a", "b", "c"], gap_s=0.15, then="die"), "interrupted", "The connection"),
    (Reply(pieces=["ab"], then="error", message="The engine stopped (request 7)."), "interrupted", "(request 7)"),
    (Reply(pieces=["ab"], then="abort"), "interrupted", "The server stopped before"),
    (Reply(status=400, message="The prompt has 9,000 tokens; 4,096 fit."), "error", "4,096 fit."),
    (Reply(status=429, message="The queue is full.", headers={"Retry-After": "2"}), "error", "The queue is full."),
    (Reply(status=500, message="Internal error, id 12."), "error", "id 12."),
]


def test_every_failure_ends_in_words(visit: Visit) -> None:
    for reply, state, words in FAILURES:
        visit.send("go", reply)
        visit.answer(state)
        visit.sees(words)
        visit.button("Send message").wait_for()
        visit.button("Regenerate" if state == "interrupted" else "Try again", last=True).click()
        visit.answer("done")


def test_key(visit: Visit, stub: PageServer) -> None:
    stub.key = "s3cret"
    visit.reload()
    field = visit.page.get_by_label("API key")
    field.fill("wrong")
    visit.button("Use key").click()
    visit.send("with the wrong key")
    visit.sees("did not accept this key")
    visit.page.get_by_label("API key").fill("s3cret")
    visit.page.keyboard.press("Enter")
    visit.page.get_by_role("button", name="Server: Ready").wait_for()
    visit.button("Try again").click()
    visit.answer()
    kept = visit.page.evaluate("[JSON.stringify({...localStorage}), JSON.stringify({...sessionStorage})]")
    assert "s3cret" not in kept[0] and "s3cret" in kept[1]
    visit.reload()
    assert visit.ask("still") == "Hello from the stub."


def test_model_still_loading(visit: Visit, stub: PageServer) -> None:
    stub.loading = True
    visit.reload()
    visit.sees("The model is still loading.")
    stub.loading = False
    visit.page.get_by_role("button", name="Server: Ready").wait_for()
    assert visit.page.locator(".notice").count() == 0


TITLES = """() => new Promise((resolve) => {
  indexedDB.open("trivium").onsuccess = ({ target: { result } }) => {
    const all = result.transaction("conversations").objectStore("conversations").getAll();
    all.onsuccess = () => (result.close(), resolve(all.result.map((each) => each.title)));
  };
})"""


def test_several_chats_at_once(visit: Visit, stub: PageServer) -> None:
    visit.send("the first chat", SLOW)
    streaming(visit)
    visit.button("New chat").first.click()
    visit.shows([])
    assert visit.ask("the second chat") == "Hello from the stub."
    visit.page.get_by_text("the first chat").click()
    visit.sees("word5")
    visit.button("Stop the answer").click()
    visit.answer("stopped")
    visit.button("Rename “the first chat”").click()
    visit.page.get_by_label("Title").fill("renamed")
    visit.page.keyboard.press("Enter")
    visit.page.locator(".chat-title", has_text="renamed").wait_for()
    visit.page.locator(".chat", has_text="the second chat").hover()
    visit.button("Delete “the second chat”").click()
    visit.button("Delete").click()
    visit.page.locator(".chat", has_text="the second chat").wait_for(state="detached")
    assert visit.page.evaluate(TITLES) == ["renamed"]  # read after what was begun before it: the deletion
    visit.reload()
    assert visit.page.locator(".chat-title").all_inner_texts() == ["renamed"]


def test_settings_reach_the_request(visit: Visit, stub: PageServer) -> None:
    visit.button("Settings").click()
    visit.page.get_by_label("System prompt").fill("Be brief.")
    visit.page.get_by_label("Temperature").fill("0.2")
    visit.page.get_by_label("Longest answer").fill("64")
    visit.page.get_by_label("Seed").fill("7")
    visit.page.get_by_label("Top p").fill("1.5")
    visit.sees("Takes a number from 0 to 1")
    visit.page.get_by_label("Stop at").fill("END\n\nSTOP")
    visit.ask("go")
    asked = stub.requests[-1]
    assert asked["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (asked["temperature"], asked["max_tokens"], asked["seed"], asked["stop"]) == (0.2, 64, 7, ["END", "STOP"])
    assert "top_p" not in asked
    visit.reload()
    visit.ask("again")
    assert stub.requests[-1]["seed"] == 7


def test_export_and_import(visit: Visit, tmp_path: Path) -> None:
    visit.ask("first", Reply(pieces=["**answer**"]))
    visit.server.replies.append(Reply(pieces=["another"]))
    visit.button("Regenerate").click()
    visit.page.get_by_label("Version 2 of 2").wait_for()
    visit.answer()
    with visit.page.expect_download() as waiting:
        visit.button("Export all").click()
    file = tmp_path / "chats.json"
    waiting.value.save_as(file)
    exported = json.loads(file.read_text())
    assert [m["content"] for m in exported["conversations"][0]["messages"]] == ["first", "**answer**", "another"]
    visit.page.locator(".chat").hover()
    visit.button("Delete “first”").click()
    visit.button("Delete").click()
    visit.page.locator(".chat").wait_for(state="detached")
    for _ in range(2):  # a second import stands beside the first
        visit.page.set_input_files("#import-file", file)
        visit.sees("Imported 1 chat.")
    assert eventually(lambda: visit.page.locator(".chat").count() == 2)
    visit.shows(["first", "another"])
    visit.button("Previous version").click()
    visit.shows(["first", "answer"])


DAMAGED = [
    ("{", "not JSON"),
    ("[]", "not a file that this page exported"),
    ('{"format": "trivium-chats", "version": 2, "conversations": []}', "version: expected 1"),
    ('{"format": "trivium-chats", "version": 1, "conversations": [{"meta": {}, "messages": []}]}', "meta.id"),
    ('{"format": "trivium-chats", "version": 1, "conversations": [7]}', "conversations[0]"),
]


def test_damaged_imports_are_refused_whole(visit: Visit) -> None:
    for content, words in DAMAGED:
        file = {"name": "bad.json", "mimeType": "application/json", "buffer": content.encode()}
        visit.page.set_input_files("#import-file", file)
        visit.page.get_by_text("Nothing was imported.").last.wait_for()
        visit.sees(words)
    assert visit.page.locator(".chat").count() == 0
