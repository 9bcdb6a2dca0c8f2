"""Servers and browsers for all tests of a file that do no harm to them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.serve.page_browser import Visit, chromium
from tests.serve.page_server import PageServer, page_server
from tests.serve.running import Running, running


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """One server with the stub engine."""
    with running() as handle:
        yield handle
        assert handle.engine.stats.running == handle.engine.stats.waiting == 0
        assert handle.get("/readyz").status == 200


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium; for one file at a time, because Playwright keeps an event loop while it runs."""
    with chromium() as running_browser:
        yield running_browser


@pytest.fixture(scope="module")
def stub() -> Iterator[PageServer]:
    """The page's server, scripted."""
    with page_server() as found:
        yield found


@pytest.fixture
def visit(browser: Any, stub: PageServer) -> Iterator[Visit]:
    """A new visitor on the page, and nothing scripted yet."""
    stub.reset()
    visitor = Visit(browser, stub)
    yield visitor.open()
    visitor.close()
