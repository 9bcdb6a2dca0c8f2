"""What the ranks run for tests/zero/test_order.py: the last rank issues its collectives in another order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import trivium as tv
from tests.clock import Since
from tests.zero import zoo
from tests.zero.cases import message_of


def sharded(mesh: Any, name: str, stage: int) -> tuple[Any, Any]:
    model = zoo.build(name)
    return tv.zero.shard(model, zoo.optimizer_for("adamw", model), mesh, stage=stage)


def other_orders(mesh: Any, stage: int) -> dict[str, tuple[str, float]]:
    """For each of ``CALLS``, the error that this rank gets and after how many seconds."""
    return {what: other_order(mesh, what, stage) for what in CALLS}


def other_order(mesh: Any, what: str, stage: int) -> tuple[str, float]:
    """All ranks are ready; the last one then makes its two calls the other way round."""
    calls = CALLS[what](mesh, stage)
    mesh.comm("dp").barrier()
    since = Since()
    said = message_of(lambda: [call() for call in (calls[::-1] if mesh.rank == mesh.size - 1 else calls)])
    return said, since.seconds()


def _two_shards(mesh: Any, stage: int) -> list[Callable[[], Any]]:
    return [lambda: sharded(mesh, "blocks", stage), lambda: sharded(mesh, "tied", stage)]


def _two_forwards(mesh: Any, stage: int) -> list[Callable[[], Any]]:
    first, second = sharded(mesh, "blocks", stage)[0], sharded(mesh, "plain", stage)[0]
    return [lambda: first(zoo.batch(0)).backward(), lambda: second(zoo.batch(0)).backward()]


def _two_steps(mesh: Any, stage: int) -> list[Callable[[], Any]]:
    pairs = [sharded(mesh, name, stage) for name in ("blocks", "plain")]
    for model, _ in pairs:
        model(zoo.batch(mesh.rank)).backward()
    return [pairs[0][1].step, pairs[1][1].step]


def _two_like_steps(mesh: Any, stage: int) -> list[Callable[[], Any]]:
    pairs = [sharded(mesh, "blocks", stage) for _ in range(2)]
    for model, _ in pairs:
        model(zoo.batch(mesh.rank)).backward()
    return [pairs[0][1].step, pairs[1][1].step]


def _two_reads(mesh: Any, stage: int) -> list[Callable[[], Any]]:
    first, second = sharded(mesh, "blocks", stage)[0], sharded(mesh, "plain", stage)[0]
    return [lambda: tv.zero.full_state_dict(first), lambda: tv.zero.full_state_dict(second)]


def _shard_or_train(mesh: Any, stage: int) -> list[Callable[[], Any]]:
    model, _ = sharded(mesh, "blocks", stage)
    return [lambda: sharded(mesh, "plain", stage), lambda: model(zoo.batch(0)).backward()]


def _read_or_train(mesh: Any, stage: int) -> list[Callable[[], Any]]:
    model, _ = sharded(mesh, "blocks", stage)
    return [lambda: tv.zero.full_state_dict(model), lambda: model(zoo.batch(0)).backward()]


def _clip_or_step(mesh: Any, stage: int) -> list[Callable[[], Any]]:
    model, optimizer = sharded(mesh, "blocks", stage)
    model(zoo.batch(mesh.rank)).backward()
    return [lambda: optimizer.clip_grad_norm_(1.0), optimizer.step]


CALLS: dict[str, Callable[[Any, int], list[Callable[[], Any]]]] = {
    "two shards": _two_shards,
    "two forwards": _two_forwards,
    "two steps": _two_steps,
    "two like steps": _two_like_steps,
    "two reads": _two_reads,
    "shard or train": _shard_or_train,
    "clip or step": _clip_or_step,
    "read or train": _read_or_train,  # the last: gradients are under way when it ends
}
