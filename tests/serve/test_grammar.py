"""Grammars as they are compiled: in a worker, within their time, which begins when the worker does (H25)."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest

from tests.serve.stub import CONTROL, END
from trivium.serve import grammar as module
from trivium.serve.errors import ApiError
from trivium.serve.grammar import Grammar, GrammarConstraint, Grammars

pytestmark = pytest.mark.timeout(120)
PLAIN = Grammar(kind="regex", source="ab?", param="regex")
CATASTROPHES = (
    "(a+)+$", "(a|a)*b?", "(.*)*", "((a+)+)+c?", "[a-z]{1,9999}", "(x+x+)+y", "(((a{1,999}){1,999}){1,999}){1,999}",
    "(" + "|".join("ab?" * 12 + str(i) for i in range(60)) + "){1,400}", "(a?){500}a{500}", "(.{0,300}x){0,300}",
)  # fmt: skip


@pytest.fixture
def grammars() -> Iterator[Grammars]:
    control = {text: 256 + index for index, text in enumerate(CONTROL)}
    words = [bytes([byte]) for byte in range(256)] + [b""] * len(CONTROL)
    found = Grammars(words, control=control, end_ids=[END], width=261, limit_s=0.2)
    yield found
    found.close()


def slow(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Makes every compilation but PLAIN's wait for the event."""
    go = threading.Event()
    quick = Grammars._compile

    def compiled(self: Grammars, grammar: Grammar) -> GrammarConstraint:
        if grammar is not PLAIN:
            go.wait(60)
        return quick(self, grammar)

    monkeypatch.setattr(Grammars, "_compile", compiled)
    return go


def other(number: int) -> Grammar:
    return Grammar(kind="regex", source=f"x{number}", param="regex")


def test_one_that_takes_too_long_is_refused(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    go = slow(grammars, monkeypatch)
    with pytest.raises(ApiError, match="did not compile within 200 ms") as caught:
        asyncio.run(grammars.compile(other(0)))
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "invalid_grammar", "regex")
    go.set()


def test_waiting_for_a_worker_is_not_compiling(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WAIT_S", 60.0)
    go = slow(grammars, monkeypatch)

    async def main() -> None:
        busy = [asyncio.ensure_future(grammars.compile(other(number))) for number in range(2)]
        for one in busy:
            with pytest.raises(ApiError, match="200 ms"):
                await one
        waiting = asyncio.ensure_future(grammars.compile(PLAIN))  # both workers are still at it
        await asyncio.sleep(0.5)
        assert not waiting.done()
        go.set()
        assert (await waiting).allowed().nonzero().flatten().tolist() == [ord("a")]

    asyncio.run(main())


def test_nobody_waits_for_ever(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WAIT_S", 0.3)
    go = slow(grammars, monkeypatch)

    async def main() -> list[ApiError]:
        tasks = [asyncio.ensure_future(grammars.compile(other(number))) for number in range(9)]
        found = await asyncio.gather(*tasks, return_exceptions=True)
        go.set()
        assert isinstance(await eventually(grammars), GrammarConstraint)
        return [one for one in found if isinstance(one, ApiError)]

    refused = asyncio.run(main())
    assert [one.status for one in refused] == [400, 400, 429, 429, 429, 429, 429, 429, 429]
    assert all(one.headers["Retry-After"] for one in refused[2:])


async def eventually(grammars: Grammars) -> GrammarConstraint | None:
    for _ in range(200):
        try:
            return await grammars.compile(PLAIN)
        except ApiError as error:
            assert error.status == 429
            await asyncio.sleep(0.05)
    return None


@pytest.mark.parametrize("source", CATASTROPHES, ids=range(len(CATASTROPHES)))
def test_what_nobody_waits_for_ends_by_itself(grammars: Grammars, source: str) -> None:
    """A thread cannot be killed: llguidance's own bound on its work is what ends it, in processor time."""
    begun = time.thread_time()
    try:
        grammars._compile(Grammar(kind="regex", source=source, param="regex"))
    except ApiError as error:
        assert (error.status, error.param) == (400, "regex")
    assert time.thread_time() - begun < 1.0
