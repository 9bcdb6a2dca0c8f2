"""One answer per request: bit-identical alone, in any batch, in any chunks, on any number of threads."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.steps import FORMATS, NATIVE, batch_of, caches, close, decoder, grid, native, routing_of, run
from trivium.kernels import registry
from trivium.kernels.matrix import Format
from trivium.kernels.program import Program

LENGTH = 90


def alone(program: Program, variant: str, request: int, dtype: torch.dtype) -> torch.Tensor:
    """The request's logits at every position, in one chunk, on one thread."""
    return run(native(program, variant), program, batch_of((request, 0, LENGTH)), dtype=dtype)[0].logits


@pytest.mark.parametrize(("variant", "format", "group", "moe"), grid(FORMATS, (False, True)))
def test_a_request_never_depends_on_its_company(variant: str, format: Format, group: int, moe: bool) -> None:
    program = decoder(format, group, "panels", moe=moe)
    wanted = alone(program, variant, 0, torch.float32)
    executor = native(program, variant, 2)
    # Chunks of 37 and 16, then token by token with 1, 7 and 31 neighbours.
    first, second, *steps = (
        batch_of((0, 0, 37), (1, 0, 20)),
        batch_of((1, 20, 3), (2, 0, 9), (0, 37, 16)),
        batch_of((0, 53, 1)),
        batch_of((3, 0, 1), (0, 54, 1)),
        batch_of(*((r, 5, 1) for r in range(1, 7)), (0, 55, 1), (7, 5, 1)),
        batch_of((0, 56, 1), (1, 23, 31)),
        batch_of((2, 9, 5), (0, 57, 33)),
    )
    held = caches(program)
    for page in held:
        # Neighbours that start at position 5 read what was never written: they may see anything finite.
        page.keys.zero_()
        if page.values is not None:
            page.values.zero_()
    assert torch.equal(executor.run(first, held).logits[:37], wanted[:37])
    assert torch.equal(executor.run(second, held).logits[12:], wanted[37:53])
    at = 53
    for step in steps:
        row = int((step.block_tables[:, 0] == batch_of((0, 0, 1)).block_tables[0, 0]).nonzero())
        mine = step.sequences == row
        got = executor.run(step, held).logits[mine]
        assert torch.equal(got, wanted[at : at + len(got)]), f"position {at}"
        at += len(got)
    assert at == LENGTH


@pytest.mark.parametrize("variant", NATIVE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("latent", [False, True], ids=["keys and values", "latent"])
def test_nor_with_other_caches(variant: str, dtype: torch.dtype, latent: bool) -> None:
    program = decoder("float32", 0, "panels", window=None if latent else 33, latent=latent)
    wanted = alone(program, variant, 0, dtype)
    steps = (batch_of((1, 0, 3), (0, 0, 41)), batch_of((0, 41, 48), (2, 0, 4)), batch_of((0, 89, 1), (1, 3, 1)))
    one, two, three = run(native(program, variant, 2), program, *steps, dtype=dtype)
    assert torch.equal(one.logits[3:], wanted[:41])
    assert torch.equal(two.logits[:48], wanted[41:89])
    assert torch.equal(three.logits[:1], wanted[89:])


@pytest.mark.parametrize("variant", NATIVE)
@pytest.mark.parametrize(("format", "group"), [("float32", 0), ("bfloat16", 0)])
def test_a_whole_step_against_the_reference(variant: str, format: Format, group: int) -> None:
    for moe in (False, True):
        step = batch_of((0, 0, 60), (1, 0, 9))
        plain = decoder(format, group, "plain", moe=moe)
        wanted = run(registry.executor(plain, backend="torch"), plain, step)[0]
        panels = decoder(format, group, "panels", moe=moe)
        got = run(native(panels, variant, 2), panels, step)[0]
        close(got.logits, wanted.logits, 2e-5)
        close(got.hidden, wanted.hidden, 2e-5)
        for (experts, weights), (their_experts, their_weights) in zip(routing_of(got), routing_of(wanted), strict=True):
            assert torch.equal(experts, their_experts)
            close(weights, their_weights, 2e-5)


@pytest.mark.parametrize("variant", NATIVE)
def test_the_reference_and_the_kernels_replay_routing(variant: str) -> None:
    from dataclasses import replace

    panels, plain = decoder("float32", 0, "panels", moe=True), decoder("float32", 0, "plain", moe=True)
    step = batch_of((0, 0, 12))
    forced = torch.tensor([[5, 0, 3]] * 12, dtype=torch.int32)
    replayed = replace(step, routing=(forced, forced))
    got = run(native(panels, variant), panels, replayed)[0]
    wanted = run(registry.executor(plain, backend="torch"), plain, replayed)[0]
    close(got.logits, wanted.logits, 2e-5)
    assert torch.equal(routing_of(got)[0][0], forced)
    free = run(native(panels, variant), panels, step)[0]
    assert not torch.equal(free.logits, got.logits)
    again = run(native(panels, variant), panels, replace(step, routing=tuple(r[0] for r in routing_of(free))))[0]
    assert torch.equal(again.logits, free.logits)
