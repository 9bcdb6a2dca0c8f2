"""Grammars as they are compiled: tried out in a process that ends them when their processor time is up (H25)."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from tests.serve.running import eventually, running
from tests.serve.stub import CONTROL, END, StubEngine, served
from trivium.serve import grammar as module
from trivium.serve import grammar_worker
from trivium.serve.errors import ApiError
from trivium.serve.grammar import Grammar, GrammarConstraint, Grammars
from trivium.serve.grammar_worker import ChildKilled, TooLate, Worker, WorkerEnded, WorkerFailed

pytestmark = pytest.mark.timeout(120)
PLAIN = Grammar(kind="regex", source="ab?", param="regex")
CATASTROPHES = (
    "(a+)+$", "(a|a)*b?", "(.*)*", "((a+)+)+c?", "[a-z]{1,9999}", "(x+x+)+y", "(((a{1,999}){1,999}){1,999}){1,999}",
    "(" + "|".join("ab?" * 12 + str(i) for i in range(60)) + "){1,400}", "(a?){500}a{500}", "(.{0,300}x){0,300}",
)  # fmt: skip


SCHEMAS: tuple[dict[str, Any], ...] = (
    {"type": "string", "allOf": [{"pattern": f"a.{{0,30}}{number}"} for number in range(1000)]},
    {"properties": {f"p{number}": {} for number in range(6000)}},
    {"properties": {f"p{i}": {"type": "string", "pattern": f"^((a|b|cd){{1,300}}{i}c?){{1,9}}$"} for i in range(2750)}},
    {"properties": {f"p{i}": {"type": "integer", "minimum": i, "maximum": 10**9 + i} for i in range(3000)}},
)


@pytest.fixture
def grammars(monkeypatch: pytest.MonkeyPatch) -> Iterator[Grammars]:
    monkeypatch.setattr(module, "_SLOWNESS", 1000)  # the machine may stand still for a while
    monkeypatch.setattr(module, "_LONGEST_S", 100.0)
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


def runaway(number: int) -> Grammar:
    return Grammar(kind="json_schema", source=json.dumps(SCHEMAS[0] | {"title": str(number)}), param="response_format")


def processes(grammars: Grammars) -> list[int]:
    return [worker._process.pid for worker in grammars._workers if worker._process is not None]


def test_one_that_takes_too_long_is_refused_and_holds_nothing(grammars: Grammars) -> None:
    async def main() -> None:
        found = await asyncio.gather(*(grammars.compile(runaway(i)) for i in range(2)), return_exceptions=True)
        for one in found:
            assert isinstance(one, ApiError) and "200 ms of a processor" in str(one)
            assert (one.status, one.code, one.param) == (400, "invalid_grammar", "response_format")
        while grammars._trying.busy:
            await asyncio.sleep(0.01)
        assert (await grammars.compile(PLAIN)).allowed().nonzero().flatten().tolist() == [ord("a")]

    asyncio.run(main())
    for number in processes(grammars):
        assert psutil.Process(number).children() == []  # nothing goes on


def test_what_has_compiled_in_time_is_not_tried_again(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    check = Worker.check

    def noted(self: Worker, kind: str, source: str) -> None:
        asked.append(source)
        check(self, kind, source)

    monkeypatch.setattr(Worker, "check", noted)
    monkeypatch.setattr(module, "_KNOWN", 2)
    for number in (0, 0, 1, 0, 2, 0):
        grammars._compile(other(number))
    assert asked == ["x0", "x1", "x2", "x0"]  # the third pushed the first out
    assert len(processes(grammars)) == 1


def test_a_process_that_was_ended_is_started_again(grammars: Grammars) -> None:
    assert processes(grammars) == []  # no grammar, no process
    grammars._compile(other(0))
    (number,) = processes(grammars)
    os.kill(number, signal.SIGKILL)
    grammars._compile(other(1))
    (again,) = processes(grammars)
    assert again != number
    (process,) = (worker._process for worker in grammars._workers if worker._process is not None)
    assert process.stdin is not None
    process.stdin.close()  # as when the server has gone, however it went
    assert process.wait(60) == 0
    grammars.close()
    assert not psutil.pid_exists(number) and not psutil.pid_exists(again)
    with pytest.raises(ApiError) as caught:
        grammars._compile(other(2))
    assert caught.value.status == 429


def test_waiting_for_a_worker_is_not_compiling(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WAIT_S", 60.0)
    go = slow(grammars, monkeypatch)

    async def main() -> None:
        busy = [asyncio.ensure_future(grammars.compile(other(number))) for number in range(2)]
        await asyncio.sleep(0.05)
        waiting = asyncio.ensure_future(grammars.compile(PLAIN))
        await asyncio.sleep(0.5)
        assert not waiting.done()
        go.set()
        assert (await waiting).allowed().nonzero().flatten().tolist() == [ord("a")]
        await asyncio.gather(*busy)

    asyncio.run(main())


def test_nobody_waits_for_ever(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WAIT_S", 0.3)
    monkeypatch.setattr(module, "_SLOWNESS", 0)
    go = slow(grammars, monkeypatch)

    async def main() -> list[Any]:
        tasks = [asyncio.ensure_future(grammars.compile(other(number))) for number in range(9)]
        found = await asyncio.gather(*tasks, return_exceptions=True)
        go.set()
        monkeypatch.setattr(module, "_WAIT_S", 60.0)
        assert isinstance(await grammars.compile(PLAIN), GrammarConstraint)
        return found

    refused = asyncio.run(main())
    assert [one.status for one in refused] == [429] * 9
    assert all(one.headers["Retry-After"] for one in refused)


def test_what_a_client_left_before_a_worker_came_is_not_compiled(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_WAIT_S", 60.0)
    monkeypatch.setattr(module, "_QUEUE", 3)
    go = slow(grammars, monkeypatch)
    compiled, waits = [], Grammars._compile

    def noted(self: Grammars, grammar: Grammar) -> GrammarConstraint:
        compiled.append(grammar.source)
        return waits(self, grammar)

    monkeypatch.setattr(Grammars, "_compile", noted)

    async def main() -> None:
        busy = [asyncio.ensure_future(grammars.compile(other(number))) for number in range(2)]
        while len(compiled) < 2:
            await asyncio.sleep(0.01)
        left = asyncio.ensure_future(grammars.compile(other(9)))
        await asyncio.sleep(0.05)
        left.cancel()
        with pytest.raises(asyncio.CancelledError):
            await left
        await asyncio.sleep(0.05)
        waiting = asyncio.ensure_future(grammars.compile(PLAIN))  # in the place of the one that left
        await asyncio.sleep(0.05)
        assert not waiting.done()
        go.set()
        assert isinstance(await waiting, GrammarConstraint)
        await asyncio.gather(*busy, return_exceptions=True)

    asyncio.run(main())
    assert "x9" not in compiled and sorted(compiled) == sorted([other(0).source, other(1).source, PLAIN.source])


@pytest.mark.parametrize("number", range(len(CATASTROPHES) + len(SCHEMAS)))
def test_what_nobody_waits_for_ends_by_itself(grammars: Grammars, number: int) -> None:
    """In processor time, that of the process and its children too: 0.2 s, and what starting it costs."""
    if number < len(CATASTROPHES):
        grammar = Grammar(kind="regex", source=CATASTROPHES[number], param="p")
    else:
        grammar = Grammar(kind="json_schema", source=json.dumps(SCHEMAS[number - len(CATASTROPHES)]), param="p")
    begun, before = time.thread_time(), resource.getrusage(resource.RUSAGE_CHILDREN)
    try:
        grammars._compile(grammar)
    except ApiError as error:
        assert (error.status, error.param) == (400, "p")
    here = time.thread_time() - begun
    grammars.close()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert here < 1.0
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2.0


# A process whose grammars are Python, to be run in the child.
PYTHON = """import os, sys; sys.path[:] = sys.argv[1:]
from trivium.serve import grammar_worker as worker
worker.compiled = lambda tokens, kind, source: exec(source, {"os": os})
worker.main()"""


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    """Over such a process; see `reports`."""
    monkeypatch.setattr(grammar_worker, "_PROGRAM", PYTHON)
    reports: list[str] = []
    found = Worker([bytes([byte]) for byte in range(256)], [], [0], 5.0, deadline_s=100.0, report=reports.append)
    yield found
    found.close()


def reports(worker: Worker) -> list[str]:
    found = getattr(worker._report, "__self__", None)
    assert isinstance(found, list)
    return found


def test_a_child_that_stands_still_is_ended_at_the_deadline(worker: Worker) -> None:
    worker.check("regex", "")
    worker._deadline_s = 1.0
    ended: list[BaseException] = []

    def ask() -> None:
        try:
            worker.check("regex", f"os.kill(os.getpid(), {int(signal.SIGSTOP)})")
        except BaseException as error:
            ended.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    seen: set[int] = set()
    while asking.is_alive():
        process = worker._process
        with contextlib.suppress(psutil.NoSuchProcess):
            seen |= (
                set() if process is None else {process.pid, *(c.pid for c in psutil.Process(process.pid).children())}
            )
        asking.join(0.02)
    assert [type(one) for one in ended] == [WorkerEnded]
    assert reports(worker) == ["a grammar's process gave no answer in 1 s and was ended"]  # and it was not tried again
    eventually(lambda: not any(map(alive, seen)))
    worker._deadline_s = 100.0
    worker.check("regex", "")
    assert worker._process is not None and worker._process.pid not in seen


def alive(number: int) -> bool:
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE  # whose parent is whoever adopted it
    except psutil.NoSuchProcess:
        return False


def test_a_server_that_closes_does_not_wait_for_a_child_that_stands_still(worker: Worker) -> None:
    ended: list[BaseException] = []

    def ask() -> None:
        try:
            worker.check("regex", "import time; time.sleep(600)")
        except BaseException as error:
            ended.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    eventually(lambda: worker._process is not None)
    assert worker._process is not None
    process = psutil.Process(worker._process.pid)
    eventually(process.children)
    (child,) = process.children()
    worker.close()
    asking.join()
    assert [type(one) for one in ended] == [WorkerEnded] and reports(worker) == []
    eventually(lambda: not alive(child.pid))


def test_no_thread_to_watch_a_process_leaves_it_alone(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(timer: threading.Timer) -> None:
        raise RuntimeError("can't start new thread")

    worker.check("regex", "")
    process = worker._process
    with monkeypatch.context() as patched:
        patched.setattr(threading.Timer, "start", refused)
        with pytest.raises(WorkerFailed):
            worker.check("regex", "")
    assert set(reports(worker)) == {"a grammar's process cannot be watched: can't start new thread"}
    worker.check("regex", "")
    assert worker._process is process


@pytest.mark.parametrize(
    ("source", "error", "said"),
    [
        ("os.kill(os.getpid(), 9)", ChildKilled, "ended by signal 9"),
        ("os.kill(os.getpid(), 15)", ChildKilled, "ended by signal 15"),
        ("os._exit(0)", ChildKilled, "it ended with status 0 and said nothing"),
        ("os._exit(3)", ChildKilled, "it ended with status 3 and said nothing"),
        ("raise MemoryError", ChildKilled, "no memory"),
        ("import signal; os.kill(os.getpid(), signal.SIGSEGV)", ValueError, "llguidance failed on it"),
        ("os.abort()", ValueError, "llguidance failed on it"),
        ("raise RecursionError", ValueError, "llguidance failed on it"),
        ("raise KeyboardInterrupt", ValueError, "llguidance failed on it"),  # a panic is no Exception either
        ("raise ValueError('so')", ValueError, "so"),
        ("import signal; os.kill(os.getpid(), signal.SIGPROF)", TooLate, ""),
    ],
)
def test_how_a_child_ends_says_whose_fault_it_was(
    worker: Worker, source: str, error: type[Exception], said: str
) -> None:
    with pytest.raises(error) as caught:
        worker.check("regex", source)
    if error is ChildKilled:
        assert reports(worker) == [f"the child that tried a grammar was lost: {said}"]
    else:
        assert str(caught.value) == said and reports(worker) == []
    process = worker._process
    worker.check("regex", "")
    assert worker._process is process  # which goes on


def test_what_a_child_prints_reaches_nobody_and_it_holds_one_pipe(worker: Worker) -> None:
    worker.check("regex", "for number in range(3): os.write(number, b'noise' * 9)")
    worker.check("regex", "print('noise', flush=True); os.system('echo noise')")
    listing = "raise ValueError(sum(os.path.realpath(f'/proc/self/fd/{n}').count('pipe:') for n in range(64)))"
    with pytest.raises(ValueError, match=r"^[01]$"):  # 0 where there is no /proc
        worker.check("regex", listing)


def test_a_process_that_cannot_be_started_is_the_servers_fault_and_is_logged(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[str] = []
    for worker in grammars._workers:
        monkeypatch.setattr(worker, "_report", logged.append)

    def refused() -> None:
        with pytest.raises(ApiError) as caught:
            grammars._compile(PLAIN)
        assert (caught.value.status, caught.value.code) == (503, "grammar_worker_failed")

    with monkeypatch.context() as patched:
        patched.setattr(grammar_worker, "_PROGRAM", "import sys; sys.exit('broken: 7')")
        refused()
        patched.setattr(grammar_worker.sys, "executable", "/nowhere/python")
        refused()
    first, second = logged
    assert first == "a grammar's process ended with status 1: broken: 7"
    assert "cannot be started" in second and "No such file" in second and "/nowhere/python" in second
    grammars._compile(PLAIN)  # and the next one starts anew
    assert len(logged) == 2


def test_a_child_that_the_system_ends_is_not_the_grammars_fault(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_worker, "_PROGRAM", PYTHON)
    logged: list[str] = []
    for worker in grammars._workers:
        monkeypatch.setattr(worker, "_report", logged.append)
    with pytest.raises(ApiError) as caught:
        grammars._compile(Grammar(kind="regex", source="os.kill(os.getpid(), 9)", param="regex"))
    assert (caught.value.status, caught.value.code) == (429, "grammar_worker_killed")
    assert logged == ["the child that tried a grammar was lost: ended by signal 9"]


def test_what_is_known_waits_for_nothing_that_is_tried(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_QUEUE", 3)
    monkeypatch.setattr(module, "_WAIT_S", 60.0)

    async def main() -> None:
        await grammars.compile(other(100))
        go = slow(grammars, monkeypatch)
        busy = [asyncio.ensure_future(grammars.compile(other(number))) for number in range(3)]
        await asyncio.sleep(0.05)
        assert isinstance(await grammars.compile(other(100)), GrammarConstraint)
        with pytest.raises(ApiError):
            await grammars.compile(other(101))
        go.set()
        await asyncio.gather(*busy)

    asyncio.run(main())


def without(letter: str) -> Grammars:
    """Over a vocabulary in which one byte has no token."""
    words = [b"" if byte == ord(letter) else bytes([byte]) for byte in range(256)] + [b""] * len(CONTROL)
    control = {text: 256 + index for index, text in enumerate(CONTROL)}
    return Grammars(words, control=control, end_ids=[END], width=261, limit_s=20.0)


def test_what_no_token_can_follow_is_said_of_its_field() -> None:
    engine = StubEngine()
    schema = {"enum": ["aZ"]}
    shape = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    asked: tuple[tuple[dict[str, Any], str], ...] = (
        ({"regex": "aZ"}, "regex"),  # found while it is used
        ({"regex": "Z"}, "regex"),  # found as it is compiled
        ({"grammar": 'start: "a" "Z"'}, "grammar"),
        ({"response_format": shape}, "response_format.json_schema.schema"),
        ({"tools": [{"type": "function", "function": {"name": "Z"}}], "tool_choice": "required"}, "tools"),
    )
    with running(engine, load=lambda: dataclasses.replace(served(engine), grammars=without("Z"))) as server:
        for fields, param in asked:
            answer = server.chat(**fields, max_tokens=90)
            assert (answer.status, answer.error["code"], answer.error["param"]) == (400, "invalid_grammar", param)
            said = answer.error["message"]
            assert said.endswith("no token of the model can follow") and said.startswith(param)
            assert "\n" not in said and "<state>" not in said
        assert server.chat(regex="a+", max_tokens=3).status == 200
