"""A headless Chromium on the page, watched: no dialog, no script error, no policy violation, no request elsewhere."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol

import pytest

from tests.serve.page_server import Reply

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
LIMIT_MS = 120_000


@contextmanager
def chromium() -> Iterator[Any]:
    """The system's Chromium under Playwright.

    Where either is missing the test is skipped, with the reason; where the environment has ``CI`` it fails.
    """
    binary = next((found for name in NAMES if (found := shutil.which(name))), None)
    if binary is None:
        _missing(f"no Chromium on PATH (looked for {', '.join(NAMES)})")
    if importlib.util.find_spec("playwright") is None:
        _missing("playwright is not installed")
    import playwright.sync_api as api

    with api.sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=binary, args=arguments, headless=True, timeout=LIMIT_MS)
        try:
            yield browser
        finally:
            browser.close()


def _missing(what: str) -> NoReturn:
    if os.environ.get("CI"):
        pytest.fail(f"{what}, and the page has to be tested where CI is set", pytrace=False)
    pytest.skip(what)


class Place(Protocol):
    """A server with the page: the stub, or a real one (which answers as it likes and takes no replies)."""

    replies: list[Reply]

    @property
    def url(self) -> str: ...


class Visit:
    """One visitor's page, its controls by the names a person knows, and what must not happen on it."""

    def __init__(self, browser: Any, server: Place, **options: Any) -> None:
        self.server = server
        self.context = browser.new_context(viewport={"width": 1280, "height": 800}, **options)
        self.context.set_default_timeout(LIMIT_MS)
        self.faults: list[str] = []
        self.context.expose_binding(
            "trivium_test_violation", lambda _source, what: self.faults.append(f"policy: {what}")
        )
        self.context.add_init_script(
            "addEventListener('securitypolicyviolation',"
            " (e) => trivium_test_violation(`${e.violatedDirective} ${e.blockedURI} ${e.sourceFile}`))"
        )
        self.page = self.watch(self.context.new_page())

    def watch(self, page: Any) -> Any:
        origin = self.server.url

        def request(sent: Any) -> None:
            if not sent.url.startswith((origin, f"blob:{origin}")):
                self.faults.append(f"request to {sent.url}")

        def dialog(shown: Any) -> None:
            self.faults.append(f"dialog: {shown.message}")
            shown.dismiss()

        def console(said: Any) -> None:
            # A refused or broken request is logged by the browser itself; all else is the page's.
            if said.type in ("error", "warning") and not said.text.startswith("Failed to load resource"):
                self.faults.append(f"console: {said.text}")

        page.on("request", request)
        page.on("dialog", dialog)
        page.on("console", console)
        page.on("pageerror", lambda error: self.faults.append(f"script: {error}"))
        page.on("popup", lambda _: self.faults.append("popup"))
        return page

    def open(self) -> Visit:
        self.page.goto(self.server.url)
        self.started()
        return self

    def started(self) -> None:
        self.page.wait_for_selector("html[data-started]", state="attached")

    def reload(self) -> None:
        self.page.reload()
        self.started()

    def button(self, name: str, last: bool = False) -> Any:
        found = self.page.get_by_role("button", name=name, exact=True)
        return found.last if last else found

    def send(self, text: str, *replies: Reply) -> None:
        self.server.replies += replies
        self.page.fill("#draft", text)
        self.page.press("#draft", "Enter")

    def answer(self, state: str = "done") -> Any:
        """The last answer, once it is in this state."""
        return self.page.wait_for_selector(f".message.assistant.last[data-state={state}]")

    def ask(self, text: str, *replies: Reply) -> str:
        """Sends and waits for the whole answer; returns its text."""
        before = self.page.locator(".message").count()
        self.send(text, *replies)
        self.page.locator(".message").nth(before + 1).wait_for()
        return str(self.answer().query_selector(".text").inner_text())

    def texts(self) -> list[str]:
        return [text.strip() for text in self.page.locator(".message .text").all_inner_texts()]

    def shows(self, texts: list[str]) -> None:
        """Wait until these are the messages' texts: a click may return before the page is drawn anew."""
        for _ in range(600):
            if self.texts() == texts:
                return
            self.page.wait_for_timeout(50)
        assert self.texts() == texts

    def sees(self, text: str) -> None:
        self.page.get_by_text(text).last.wait_for()

    def close(self) -> None:
        self.context.close()
        if self.faults:
            raise AssertionError("on the page: " + "; ".join(self.faults))
