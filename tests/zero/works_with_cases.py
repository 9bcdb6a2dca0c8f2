"""What the ranks run for tests/zero/test_works_with.py: sharding beside the rest of torch and transformers."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

import trivium as tv
from tests.zero import oracle, zoo
from tests.zero.oracle import Cell, compare
from trivium.zero.api import engine_of


def schedulers(mesh: Any, built: str) -> list[str]:
    """A schedule built before or after shard gives the learning rates, so the bits, of one process."""
    cell = Cell(stage=2, steps=1)
    model, alone = zoo.build("blocks"), zoo.build("blocks")
    optimizer, expected = zoo.optimizer_for("adamw", model), zoo.optimizer_for("adamw", alone)
    if built == "before":
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=9)
    groups = optimizer.param_groups
    model, optimizer = tv.zero.shard(model, optimizer, mesh, stage=2)
    if built == "after":
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=9)
    alone_schedule = torch.optim.lr_scheduler.OneCycleLR(expected, max_lr=0.1, total_steps=9)
    for step in range(6):
        oracle.zoo_loss(model, step * mesh.size + mesh.rank).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        gradients = oracle.summed_gradients(mesh.size, cell, alone, list(alone.parameters()), step, oracle.zoo_loss)
        for param, gradient in zip(alone.parameters(), gradients, strict=True):
            param.grad = None if gradient is None else gradient / mesh.size
        expected.step()
        alone_schedule.step()
    found = oracle.differences(model, optimizer, alone, expected)
    if schedule.get_last_lr() != alone_schedule.get_last_lr():
        found.append(f"{schedule.get_last_lr()} instead of {alone_schedule.get_last_lr()}")
    if not all(mine is theirs for mine, theirs in zip(optimizer.param_groups, groups, strict=True)):
        found.append("the groups are not the user's own")
    return found


def evaluation(mesh: Any) -> list[str]:
    """Evaluation between steps, with and without inference mode, changes nothing and agrees with one process."""
    found = []
    for stage in range(4):
        model, plain = zoo.build("odd"), zoo.build("odd")
        oracle.train_sharded(mesh, Cell(stage=stage), plain, zoo.optimizer_for("adamw", plain))
        model, watched = tv.zero.shard(model, zoo.optimizer_for("adamw", model), mesh, stage=stage)
        for step in range(2):
            number = oracle.number_of(step, 0, mesh.rank, mesh.size, 1)
            with torch.no_grad():
                before = model(zoo.batch(99))
            oracle.zoo_loss(model, number).backward()
            with torch.no_grad():
                if not oracle.same(before, model.eval()(zoo.batch(99))):
                    found.append(f"stage {stage}: evaluation differs across a backward")
            model.train()
            watched.step()
            watched.zero_grad()
        mine, theirs = tv.zero.full_state_dict(model), tv.zero.full_state_dict(plain)
        found += [f"stage {stage}: {name}" for name in mine if not oracle.same(mine[name], theirs[name])]
        if tv.zero.meter_of(model).live_bytes("gathered"):
            found.append(f"stage {stage}: something stayed gathered")
    return found


def grad_scaler(mesh: Any) -> list[Any]:
    """torch's GradScaler under fp16 autocast: an overflow on one rank is a skip on all; scales stay equal."""
    model = zoo.build("blocks")
    model, optimizer = tv.zero.shard(model, zoo.optimizer_for("adamw", model), mesh, stage=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    scales, changed = [], []
    for step in range(4):
        before = {name: tensor.clone() for name, tensor in tv.zero.iter_full(model)}
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(zoo.batch(step * mesh.size + mesh.rank))
        if step == 1 and mesh.rank == 1:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        optimizer.clip_grad_norm_(1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
        changed.append(any(not oracle.same(tensor, before[name]) for name, tensor in tv.zero.iter_full(model)))
    return [scales, changed]


def half(mesh: Any, dtype: torch.dtype, gradient_dtype: str) -> list[str]:
    """16-bit parameters with fp32 masters: all stages equal; the master follows fp32 arithmetic of the gradients."""
    results = []
    for stage in range(4):
        model = zoo.build("blocks", dtype)
        options: dict[str, Any] = {"stage": stage, "gradient_dtype": gradient_dtype, "bucket_bytes": 1024}
        model, optimizer = tv.zero.shard(model, zoo.optimizer_for("adamw", model), mesh, **options)
        scales = []
        for step in range(3):
            model(zoo.batch(step * mesh.size + mesh.rank, dtype)).backward()
            optimizer.clip_grad_norm_(0.5)
            optimizer.step()
            optimizer.zero_grad()
            scales.append(optimizer.loss_scale)
        meter = tv.zero.meter_of(model).by_label()
        results.append((tv.zero.full_state_dict(model), scales, meter))
    first = results[0]
    found = [
        f"stage {stage}: {name}"
        for stage, (full, scales, _) in enumerate(results)
        for name in full
        if not oracle.same(full[name], first[0][name]) or scales != first[1]
    ]
    start = zoo.build("blocks", dtype).state_dict()
    if first[0] and all(oracle.same(first[0][name], start[name]) for name in start):
        found.append("nothing was learned")
    return found


def overflow(mesh: Any) -> list[Any]:
    """fp16 parameters: a gradient too large halves the scale on every rank and skips the step."""
    model = zoo.build("blocks", torch.float16)
    model, optimizer = tv.zero.shard(model, zoo.optimizer_for("adamw", model), mesh, stage=3)
    scales = [optimizer.loss_scale]
    for step in range(3):
        loss = model(zoo.batch(step, torch.float16))
        (loss * (60000.0 if step == 1 and mesh.rank == 0 else 0.001)).backward()
        optimizer.step()
        optimizer.zero_grad()
        scales.append(optimizer.loss_scale)
    return [scales, optimizer.num_skipped_steps]


def on_meta(mesh: Any) -> dict[str, Any]:
    """Weights of a meta-device build, by reset_parameters and by init, and of a plain resume-like second build."""

    def fill(name: str, tensor: torch.Tensor) -> None:
        tensor.normal_(std=0.5 if name.endswith("weight") else 0.1)

    found = {}
    for stage in (1, 3):
        for kind, init in (("reset", None), ("init", fill)):
            with torch.device("meta"):
                model = zoo.ZOO["tied"]()
            optimizer = torch.optim.AdamW(model.parameters())
            model, optimizer = tv.zero.shard(model, optimizer, mesh, stage=stage, init=init, seed=7)
            model(zoo.batch(0)).backward()
            full = tv.zero.full_state_dict(model)
            found[f"{kind} at stage {stage}"] = full
    return found


def two_models(mesh: Any) -> list[str]:
    """A student and a frozen teacher, and two students in turn, beside each other."""
    teacher, _ = tv.zero.shard(zoo.build("tied").requires_grad_(False), None, mesh, stage=3)
    found = []
    models = [zoo.build("blocks"), zoo.build("sometimes")]
    optimizers = []
    for model, stage in zip(models, (3, 2), strict=True):
        optimizers.append(tv.zero.shard(model, zoo.optimizer_for("adamw", model), mesh, stage=stage)[1])
    for step in range(2):
        with torch.no_grad():
            wanted = teacher(zoo.batch(step))
        for model, optimizer in zip(models, optimizers, strict=True):
            number = oracle.number_of(step, 0, mesh.rank, mesh.size, 1)
            (oracle.zoo_loss(model, number) + 0.0 * wanted).backward()
            optimizer.step()
            optimizer.zero_grad()
    for model, optimizer, name in zip(models, optimizers, ("blocks", "sometimes"), strict=True):
        alone = zoo.build(name)
        alone_optimizer = zoo.optimizer_for("adamw", alone)
        oracle.train_alone(mesh.size, Cell(), alone, alone_optimizer)
        found += oracle.differences(model, optimizer, alone, alone_optimizer)
    return found


def reading(mesh: Any) -> list[str]:
    """gathered, iter_full and full_state_dict at every stage: values, order of keys, writing, and after training."""
    found = []
    for stage in range(4):
        bare = zoo.build("odd")
        model = zoo.build("odd")
        model, _ = tv.zero.shard(model, zoo.optimizer_for("adamw", model), mesh, stage=stage)
        full, expected = tv.zero.full_state_dict(model), bare.state_dict()
        if mesh.rank == 0 and (
            list(full) != list(expected) or any(not oracle.same(full[k], expected[k]) for k in full)
        ):
            found.append(f"stage {stage}: full_state_dict")
        if mesh.rank and full:
            found.append(f"stage {stage}: full_state_dict on rank {mesh.rank}")
        seen = {name: tensor.clone() for name, tensor in tv.zero.iter_full(model)}
        if sorted(seen) != sorted(expected) or any(not oracle.same(seen[k], expected[k]) for k in seen):
            found.append(f"stage {stage}: iter_full")
        with tv.zero.gathered(model.twice), torch.no_grad():
            model.twice.weight.fill_(3.0)  # type: ignore[union-attr, operator]
        with torch.no_grad():
            bare.twice.weight.fill_(3.0)  # type: ignore[union-attr, operator]
        if not oracle.same(model(zoo.batch(1)), bare(zoo.batch(1))):
            found.append(f"stage {stage}: what was written is not computed with")
    return found


def object_outputs(mesh: Any) -> list[str]:
    """Blocks that return plain objects, and tuples inside dictionaries."""

    class Answer:
        def __init__(self, value: torch.Tensor) -> None:
            self.value = value

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = zoo.Block(zoo.DIM, 8)

        def forward(self, x: Any) -> Any:
            return Answer(self.block(x.value if isinstance(x, Answer) else x["x"][0]))

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Wrapped() for _ in range(3))

        def forward(self, x: torch.Tensor, number: int = 0) -> torch.Tensor:
            y: Any = {"x": (x,)}
            for layer in self.layers:
                y = layer(y)
            loss: torch.Tensor = y.value.square().mean()
            return loss

    torch.manual_seed(0)
    model = Chain()
    torch.manual_seed(0)
    alone = Chain()
    cell = Cell(stage=3, steps=3)
    optimizer, _ = oracle.train_sharded(mesh, cell, model, torch.optim.AdamW(model.parameters()))
    expected = torch.optim.AdamW(alone.parameters())
    oracle.train_alone(mesh.size, cell, alone, expected)
    return oracle.differences(model, optimizer, alone, expected)


def native(mesh: Any) -> float:
    """The largest difference between the backend's own reduce-scatter and the ordered one."""
    results = []
    for reduce in ("ordered", "native"):
        model = zoo.build("blocks")
        model, optimizer = tv.zero.shard(
            model, torch.optim.SGD(model.parameters(), lr=0.1), mesh, stage=2, reduce=reduce, bucket_bytes=4096
        )
        model(zoo.batch(mesh.rank)).backward()
        optimizer.step()
        results.append(dict((name, tensor.clone()) for name, tensor in tv.zero.iter_full(model)))
    return max((results[0][name] - results[1][name]).abs().max().item() for name in results[0])


def _hugging_face(kind: str, adapted: bool) -> nn.Module:
    import transformers

    torch.manual_seed(11)
    shape = {
        "vocab_size": 61,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "max_position_embeddings": 64,
        "tie_word_embeddings": kind == "llama",
    }
    if kind == "llama":
        model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    else:
        experts = {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "output_router_logits": True,
        }
        model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**shape, **experts))
    if adapted:
        import peft

        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian")
        model = peft.get_peft_model(model, config)
    model.train()
    result: nn.Module = model
    return result


def _language_loss(model: nn.Module, number: int) -> torch.Tensor:
    ids = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(number))
    loss: torch.Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def hugging_face(mesh: Any, kind: str, adapted: bool, stage: int) -> list[str]:
    """Twenty steps of a transformers model against one process; under PEFT the adapter comes back as well."""
    warnings.simplefilter("ignore")
    model, alone = _hugging_face(kind, adapted), _hugging_face(kind, adapted)
    cell = Cell(stage=stage, steps=20, bucket_bytes=1 << 14)
    optimizer, _ = oracle.train_sharded(
        mesh, cell, model, torch.optim.AdamW(model.parameters(), lr=1e-3), _language_loss
    )
    expected = torch.optim.AdamW(alone.parameters(), lr=1e-3)
    oracle.train_alone(mesh.size, cell, alone, expected, _language_loss)
    found = oracle.differences(model, optimizer, alone, expected)
    if engine_of(model).conductor.num_detours:
        found.append(f"{engine_of(model).conductor.num_detours} detours")
    if adapted:
        found += _adapter_differences(model, alone)
    return found


def _adapter_differences(model: Any, alone: Any) -> list[str]:
    import peft

    with tv.zero.gathered(model):
        mine = {name: tensor.clone() for name, tensor in peft.get_peft_model_state_dict(model).items()}
    theirs = peft.get_peft_model_state_dict(alone)
    found = [f"adapter {name}" for name in theirs if name not in mine or not oracle.same(mine[name], theirs[name])]
    fresh: Any = _hugging_face("llama" if "Llama" in type(alone.base_model.model).__name__ else "qwen", True)
    peft.set_peft_model_state_dict(fresh, mine)
    reloaded = peft.get_peft_model_state_dict(fresh)
    return found + [f"reloaded {name}" for name in theirs if not oracle.same(reloaded[name], theirs[name])]


__all__ = ["compare"]
