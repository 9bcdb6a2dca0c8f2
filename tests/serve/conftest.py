"""One server with the stub engine for all tests of a file that do no harm to it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.serve.running import Running, running


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as handle:
        yield handle
        assert handle.engine.stats.running == handle.engine.stats.waiting == 0
        assert handle.get("/readyz").status == 200
