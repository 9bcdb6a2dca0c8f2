"""The page on the server that people start: ``trivium serve`` as a process, a model with experts, a real browser."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.inference.folders import folder
from tests.serve.page_browser import Visit, chromium
from tests.serve.page_server import Reply
from tests.serve.running import eventually
from trivium.bench.serve_process import ServerProcess, started
from trivium.models.moe_config import MoEConfig

pytestmark = pytest.mark.timeout(200)


class Served:
    """What a visit needs of a server."""

    def __init__(self, server: ServerProcess) -> None:
        self.api = server.url
        self.replies: list[Reply] = []

    @property
    def url(self) -> str:
        return self.api.removesuffix("v1")

    def status(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.api}/status", timeout=60) as answer:
            return dict(json.load(answer))

    def held(self) -> int:
        status = self.status()
        return int(status["running"] + status["waiting"])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A model with experts in both layers that never ends an answer, behind ``trivium serve``."""
    experts = MoEConfig(experts=4, layers=(0, 1), ffn_dim=40, top_k=2)
    where = tmp_path_factory.mktemp("page") / "endless"
    folder(where, endless=True, moe=experts, tied=False, max_positions=1 << 16)
    with started(str(where), ["--threads=1", "--memory=128MiB"]) as server:
        yield Served(server)


@pytest.fixture
def answer(place: Served) -> str:
    """What the ``openai`` client is told: the likeliest eight bytes."""
    with openai.OpenAI(base_url=place.api, api_key="none", max_retries=0) as client:
        name = client.models.list().data[0].id
        assert name == "endless"
        asked = client.chat.completions.create(
            model=name, messages=[{"role": "user", "content": "Good day"}], temperature=0, max_tokens=8
        ).choices[0]
    assert asked.finish_reason == "length" and asked.message.content
    return asked.message.content


def said(visit: Visit) -> list[str]:
    """Every message without its blanks; also those that are out of sight."""
    return ["".join(text.split()) for text in visit.page.locator(".message .text").all_text_contents()]


def test_the_page_and_the_client_on_a_started_server(place: Served, answer: str) -> None:
    with chromium() as browser:
        visit = Visit(browser, place).open()
        page = visit.page
        page.get_by_role("button", name="Server: Ready").wait_for()

        # The page asks the same and shows the same.
        visit.button("Settings").click()
        page.get_by_label("Temperature").fill("0")
        page.get_by_label("Longest answer").fill("8")
        shown = visit.ask("Good day")
        assert "".join(shown.split()) == "".join(answer.split())
        assert "8 tokens" in page.locator(".message.last .figures").inner_text()

        # The panel tells of this server: its name, and a picture of its experts.
        page.get_by_role("button", name="Server:").click()
        panel = page.locator("#panel")
        panel.get_by_role("img").wait_for()
        assert panel.get_by_role("img").locator("rect").count() == 8
        assert "2 layers of 4 experts. The busiest is expert" in panel.inner_text()
        assert "endless" in panel.inner_text()
        experts = place.status()["experts"]
        assert [len(layer) for layer in experts] == [4, 4] and min(map(sum, experts)) > 0

        # An answer that would go on is stopped, here and in the engine.
        page.get_by_role("tab", name="Settings").click()
        page.get_by_label("Longest answer").fill("")
        visit.send("Go on and on")
        page.wait_for_selector(".message.assistant.last[data-state=streaming] .text:not(:empty)")
        page.get_by_role("button", name="Server: Busy").wait_for()
        assert place.held() == 1
        visit.button("Stop the answer").click()
        visit.answer("stopped")
        visit.sees("You stopped this answer.")
        eventually(lambda: place.held() == 0)

        # A reload keeps what was said; one in the middle of an answer keeps the part, and the engine is free again.
        before = said(visit)
        assert before[0] == "Goodday" and before[2] == "Goonandon" and before[3]
        visit.reload()
        assert said(visit) == before
        visit.send("Once more")
        page.wait_for_selector(".message.assistant.last[data-state=streaming] .text:not(:empty)")
        visit.reload()
        visit.answer("interrupted")
        eventually(lambda: place.held() == 0)
        assert said(visit)[:5] == [*before, "Oncemore"]
        visit.close()


@pytest.mark.parametrize(("ci", "outcome"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)])
@pytest.mark.parametrize("missing", ["Chromium", "playwright"])
def test_a_browser_that_is_missing_fails_where_ci_is_set(
    monkeypatch: pytest.MonkeyPatch, ci: str, outcome: type[BaseException], missing: str
) -> None:
    monkeypatch.setenv("CI", ci)
    there = None if missing == "Chromium" else "/usr/bin/chromium"
    monkeypatch.setattr("tests.serve.page_browser.shutil.which", lambda name: there)
    monkeypatch.setattr("tests.serve.page_browser.importlib.util.find_spec", lambda name: None)
    with pytest.raises(outcome, match=missing), chromium():
        pass
