"""The decoder against its parts: documents, losses, hooks, bad input, activation checkpointing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from trivium.base.errors import ConfigError, DataError
from trivium.models import DecoderConfig, build
from trivium.nn import causal

SMALL = DecoderConfig(vocabulary=61, dim=24, layers=2, heads=4, kv_heads=2, ffn_dim=40, max_positions=32, init_std=0.2)


def tokens(rows: int = 2, length: int = 11) -> torch.Tensor:
    return torch.randint(0, SMALL.vocabulary, (rows, length), generator=torch.Generator().manual_seed(3))


def test_children_and_names():
    model = build(SMALL, seed=0)
    assert [name for name, _ in model.named_children()] == ["embed", "blocks", "norm", "head"]
    assert "blocks.1.attention.q.weight" in dict(model.named_parameters())
    assert not list(model.buffers())


def test_loss_is_the_cross_entropy_of_the_logits():
    model, ids = build(SMALL, seed=0), tokens()
    targets = ids.roll(-1, 1)
    targets[:, -1] = -100
    logits = model(ids)
    assert logits.shape == (2, 11, 61)
    for reduction in ("mean", "sum", "none"):
        expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)
        torch.testing.assert_close(model(ids, targets, reduction=reduction).flatten(), expected.flatten())


@pytest.mark.parametrize("tied", [False, True])
def test_chunked_loss_gives_the_same_gradients(tied):
    config = DecoderConfig(vocabulary=61, dim=24, layers=2, heads=4, ffn_dim=40, tied=tied, init_std=0.2)
    grads = []
    for chunk in (5, 1024):
        model = build(config, seed=0)
        model.head.chunk_tokens = chunk
        model(tokens(), tokens().roll(-1, 1)).backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-6)


def test_documents_equal_documents_alone():
    model, ids = build(SMALL, seed=0), tokens(1, 11)
    documents = torch.tensor([[4, 4, 4, 4, 7, 7, 7, 4, 4, 4, 4]])
    packed = model(ids, documents_BT=documents)
    alone = torch.cat([model(part) for part in ids.split([4, 3, 4], dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(packed, model(ids), rtol=1e-3, atol=1e-3)


def test_given_positions_are_used():
    model, ids = build(SMALL, seed=0), tokens(1, 6)
    usual = model(ids)
    torch.testing.assert_close(model(ids, positions_BT=torch.arange(6)[None] + 9), usual, rtol=1e-4, atol=1e-4)
    stretched = model(ids, positions_BT=torch.arange(6)[None] * 3)
    assert not torch.allclose(stretched, usual, rtol=1e-3, atol=1e-3)


def test_attend_and_run_block_are_called_for_every_layer():
    model, ids, layers, blocks = build(SMALL, seed=0), tokens(), [], []

    def attend(q, k, v, *, layer):
        layers.append(layer)
        return causal()(q, k, v, layer=layer)

    def run_block(block, x, rotary, attend):
        blocks.append(block)
        return checkpoint(block, x, rotary, attend, use_reentrant=False)

    loss = model(ids, ids, attend=attend, run_block=run_block)
    assert layers == [0, 1] and blocks == list(model.blocks)
    loss.backward()
    assert sorted(layers) == [0, 0, 1, 1]
    checkpointed = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model(ids, ids).backward()
    assert all(torch.equal(a, b.grad) for a, b in zip(checkpointed, model.parameters(), strict=True))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chunk", [4, 1024])
def test_parameters_are_used_only_inside_their_own_modules_forward(tied, chunk):
    """Every parameter is NaN except while its module runs: what ZeRO's hooks do at stage 3."""
    config = DecoderConfig(vocabulary=61, dim=24, layers=2, heads=4, ffn_dim=40, tied=tied)
    model = build(config, seed=0)
    model.head.chunk_tokens = chunk
    expected = model(tokens(), tokens())
    kept = {id(parameter): parameter.detach().clone() for parameter in model.parameters()}
    calls: list[str] = []

    def fill(module, args):
        for parameter in module.parameters(recurse=False):
            parameter.data.copy_(kept[id(parameter)])

    def empty(module, args, output):
        for parameter in module.parameters(recurse=False):
            parameter.data.fill_(float("nan"))
            calls.append(type(module).__name__)

    for module in model.modules():
        if any(True for _ in module.parameters(recurse=False)):
            empty(module, (), None)
            module.register_forward_pre_hook(fill)
            module.register_forward_hook(empty)
    calls.clear()
    with torch.no_grad():
        assert torch.equal(model(tokens(), tokens()), expected)
    assert calls.count("Head") == calls.count("Embedding") == 1


def test_tied_weight_is_one_parameter_under_two_names():
    model = build(DecoderConfig(vocabulary=61, dim=24, layers=1, heads=4, ffn_dim=40, tied=True), "meta")
    assert model.head.weight is model.embed.weight
    assert {"embed.weight", "head.weight"} <= set(model.state_dict())


def test_seeded_build_repeats_and_leaves_the_generator_alone():
    before = torch.random.get_rng_state()
    first, second, other = build(SMALL, seed=1), build(SMALL, seed=1), build(SMALL, seed=2)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(first.embed.weight, second.embed.weight)
    assert not torch.equal(first.embed.weight, other.embed.weight)


def test_bf16_runs_and_the_loss_is_fp32():
    model, ids = build(SMALL, dtype=torch.bfloat16, seed=0), tokens()
    assert model(ids).dtype == torch.bfloat16
    loss = model(ids, ids)
    assert loss.dtype == torch.float32
    exact = build(SMALL, seed=0)
    exact.load_state_dict(model.state_dict())
    torch.testing.assert_close(loss, exact(ids, ids), rtol=2e-2, atol=2e-2)


def test_bad_input_is_named():
    model, ids = build(SMALL, seed=0), tokens()
    with pytest.raises(ConfigError, match=r"sequence of 33 tokens: the model has max_positions=32"):
        model(tokens(1, 33))
    with pytest.raises(ConfigError, match=r"tokens have shape \(11,\)"):
        model(ids[0])
    with pytest.raises(ConfigError, match=r"tokens have shape \(2, 0\)"):
        model(ids[:, :0])
    with pytest.raises(ConfigError, match=r"documents have shape \(1, 11\), the tokens \(2, 11\)"):
        model(ids, documents_BT=ids[:1])
    wrong = ids.clone()
    wrong[1, 4] = 61
    with pytest.raises(DataError, match=r"token 61 at row 1, column 4 .1 such ids.: expected 0 to 60;"):
        model(wrong)
    wrong[1, 4] = -5
    with pytest.raises(DataError, match=r"target -5 at row 1, column 4 .1 such ids.: expected 0 to 60 or -100;"):
        model(ids, wrong)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own, while tracing
def test_a_block_compiles_without_graph_breaks():
    model = build(SMALL, seed=0)
    compiled = torch.compile(model.blocks[0], backend="eager", fullgraph=True)
    ids = tokens()
    expected = model(ids)
    out = model(ids, run_block=lambda block, *args: compiled(*args) if block is model.blocks[0] else block(*args))
    torch.testing.assert_close(out, expected)
