"""What the ranks run for tests/zero/test_adapter.py: a LoRA on a sharded base, written as PEFT writes it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

import trivium as tv
from tests.zero import oracle
from tests.zero.works_with_cases import _hugging_face, _language_loss


def exported(mesh: Any, folder: str, stage: int) -> list[str]:
    """Two steps, PEFT's own save_pretrained on rank 0, and its from_pretrained onto the bare base: what differs."""
    import peft

    warnings.simplefilter("ignore")
    model: Any = _hugging_face("llama", True)
    trained = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=1e-2)
    model, optimizer = tv.zero.shard(model, trained, mesh, stage=stage)
    for step in range(2):
        _language_loss(model, step * mesh.size + mesh.rank).backward()
        optimizer.step()
        optimizer.zero_grad()
    with tv.zero.gathered(model):
        if mesh.rank == 0:
            model.save_pretrained(folder)
        expected = {name: tensor.clone() for name, tensor in peft.get_peft_model_state_dict(model).items()}
    mesh.comm("world").barrier()
    found = [] if expected else ["nothing was trained"]
    files = sorted(path.name for path in Path(folder).iterdir())
    if not {"adapter_config.json", "adapter_model.safetensors"} <= set(files):
        found.append(f"files {files}")
    base: Any = _hugging_face("llama", False)
    before = base(input_ids=torch.arange(9)[None]).logits
    again = peft.PeftModel.from_pretrained(base, folder)
    read = peft.get_peft_model_state_dict(again)
    found += [name for name in expected if name not in read or not oracle.same(read[name], expected[name])]
    with torch.no_grad():
        theirs, ours = (one.eval()(input_ids=torch.arange(9)[None]).logits for one in (again, model))
    if not oracle.same(theirs, ours):
        found.append("other logits than the sharded model")
    if oracle.same(theirs, before):
        found.append("the logits of the bare base")
    return found
