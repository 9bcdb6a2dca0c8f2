"""The engine on its own thread: every request ends with a delta, whatever happens to it or to the engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from tests.inference.toy import ToyExecutor, ask, engine
from trivium.base.errors import SetupError
from trivium.inference.request import Delta, RequestError
from trivium.inference.thread import EngineThread, _Listener


class Slow(ToyExecutor):
    """Takes its time, outside the interpreter's lock."""

    step_s = 0.005

    def run(self, batch, caches):  # type: ignore[no-untyped-def]
        time.sleep(self.step_s)
        return super().run(batch, caches)


class Box:
    def __init__(self) -> None:
        self.deltas: list[Delta] = []
        self.left = threading.Semaphore(0)

    def __call__(self, delta: Delta) -> None:
        self.deltas.append(delta)
        if delta.finish_reason is not None:
            self.left.release()

    def wait(self, choices: int = 1) -> list[str | None]:
        for _ in range(choices):
            assert self.left.acquire(timeout=240), "no last delta came"
        return [delta.finish_reason for delta in self.deltas if delta.finish_reason is not None]

    @property
    def tokens(self) -> list[int]:
        return [token for delta in self.deltas for token in delta.token_ids]


@pytest.fixture
def thread() -> Iterator[EngineThread]:
    running = EngineThread(engine(Slow()))
    yield running
    running.close()
    running._engine.check()
    assert not running.alive


def test_answers_from_several_threads(thread: EngineThread) -> None:
    boxes = [Box() for _ in range(8)]
    callers = [
        threading.Thread(target=thread.submit, args=(ask(str(i), [i + 1, 2]), box)) for i, box in enumerate(boxes)
    ]
    for caller in callers:
        caller.start()
    for i, box in enumerate(boxes):
        assert box.wait() == ["length"]
        assert box.tokens == ToyExecutor().greedy([i + 1, 2], 8)
    assert thread.idle and thread.stats.generated_tokens == 64


def test_submit_refuses_what_is_wrong(thread: EngineThread, monkeypatch: pytest.MonkeyPatch) -> None:
    box = Box()
    monkeypatch.setattr(Slow, "step_s", 0.1)
    thread.submit(ask("a", [1], max_tokens=100), box)
    with pytest.raises(RequestError, match="being answered"):
        thread.submit(ask("a", [1]), box)
    with pytest.raises(RequestError, match="no tokens"):
        thread.submit(ask("b", []), box)
    thread.cancel("a")
    assert box.wait() == ["abort"]
    monkeypatch.undo()
    thread.submit(ask("a", [1], n=2), box)
    assert box.wait(2)[1:] == ["length", "length"]


def test_p7_cancel_frees_within_a_step(thread: EngineThread) -> None:
    box = Box()
    thread.submit(ask("a", [1] * 20, max_tokens=150), box)
    while not box.deltas:
        time.sleep(0.001)
    thread.cancel("a")
    thread.cancel("unknown")
    box.wait()
    deadline = time.monotonic() + 120
    while thread.stats.blocks_free != thread.stats.blocks_total and time.monotonic() < deadline:
        time.sleep(0.001)
    assert thread.stats.blocks_free == thread.stats.blocks_total


def test_a_listener_that_raises_loses_its_request_alone(thread: EngineThread) -> None:
    def bad(delta: Delta) -> None:
        raise ValueError("gone")

    box = Box()
    thread.submit(ask("bad", [1], max_tokens=100), bad)
    thread.submit(ask("good", [1]), box)
    assert box.wait() == ["length"]
    assert thread.alive and thread.stats.finished["abort"] == 1


def test_close_drains_then_aborts() -> None:
    toy = Slow()
    toy.step_s = 0.02
    running = EngineThread(engine(toy))
    short, long = Box(), Box()
    running.submit(ask("short", [1], max_tokens=3), short)
    running.submit(ask("long", [2], max_tokens=190), long)
    running.close(drain_s=2.0)
    assert short.wait() == ["length"] and long.wait() == ["abort"]
    with pytest.raises(SetupError, match="the engine has stopped"):
        running.submit(ask("late", [1]), Box())
    running.close()


def test_close_ends_a_request_that_is_just_being_handed_in() -> None:
    running, box = EngineThread(engine()), Box()
    running._listeners["late"] = _Listener(box, {0, 1})
    running.close()
    assert box.left.acquire(timeout=240), "no last delta came"
    assert box.wait() == ["abort", "abort"]


def test_a_broken_executor_ends_all_requests_with_an_error() -> None:
    toy = Slow()
    toy.step_s = 0.05
    running = EngineThread(engine(toy))
    one, two = Box(), Box()
    running.submit(ask("a", [1], max_tokens=100), one)
    running.submit(ask("b", [1], n=2, max_tokens=100), two)
    while not one.deltas:
        time.sleep(0.001)
    toy.raises = RuntimeError("the kernel is gone")
    assert one.wait()[-1] == "error" and two.wait(2) == ["error", "error"]
    assert "the kernel is gone" in str(one.deltas[-1].error)
    running._thread.join(240)
    assert not running.alive and isinstance(running.error, RuntimeError)
    with pytest.raises(SetupError, match="the kernel is gone"):
        running.submit(ask("c", [1]), one)


def test_work_between_steps(thread: EngineThread) -> None:
    seen: list[str] = []
    thread.between_steps(lambda engine: seen.append(threading.current_thread().name))
    assert seen == ["trivium-engine"]
    with pytest.raises(ZeroDivisionError):
        thread.between_steps(lambda engine: 1 / 0)  # type: ignore[arg-type,return-value]
    before = thread.last_step_s
    deadline = time.monotonic() + 120
    while thread.last_step_s <= before:
        assert time.monotonic() < deadline, "an idle engine shows no sign of life"
        time.sleep(0.01)
