"""Make a model from its config, on a real device or, without a byte of weights, on the meta device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trivium.base.errors import ConfigError
from trivium.dist.mesh import Mesh
from trivium.models.config import DecoderConfig
from trivium.models.decoder import Decoder


def build(
    config: DecoderConfig,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    seed: int | None = None,
    mesh: Mesh | None = None,
    ep: int | Sequence[int] | None = None,
) -> Decoder:
    """A fresh decoder. ``device="meta"`` allocates nothing: shapes only, to plan with or to fill in shard by shard.

    Weights are drawn from torch's default generator, or from ``seed``, which leaves that generator as it was; so are
    the keys of the gates' random choices. With experts on several ranks (``mesh``, ``ep``: see `Decoder`) it is a
    collective, and ``seed`` must be given, the same on all.
    """
    if seed is None:
        if mesh is not None and config.moe is not None and mesh.size > 1:
            raise ConfigError("build a model with experts on several ranks with seed=: the ranks must draw alike")
        return Decoder(config, device=device, dtype=dtype, mesh=mesh, ep=ep)
    cuda = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        return Decoder(config, device=device, dtype=dtype, mesh=mesh, ep=ep)
