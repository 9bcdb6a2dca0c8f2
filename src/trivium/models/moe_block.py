"""One layer of the decoder with experts: attention, then an MoE layer.

DeepSpeed-MoE sections 3.1 (every other feed-forward layer becomes one) and 4.1 (pyramid, residual).
Shapes: B batch, T sequence, C model width.
"""

from __future__ import annotations

import torch
from torch import nn

from trivium.base.errors import ConfigError
from trivium.dist.mesh import Mesh
from trivium.models.block import AttentionHalf, Rotary
from trivium.models.config import DecoderConfig
from trivium.models.moe_config import MoEConfig
from trivium.moe import Aux, GELUExpert, MoE, Routing
from trivium.nn import MLP, Attend


class MoEBlock(AttentionHalf):
    """``x + attention(norm(x))``, then ``x + moe(norm(x))``; the auxiliary losses are returned beside.

    ``ep``: over how many ranks of ``mesh`` the ``experts`` are spread; None: the mesh's degree.
    """

    def __init__(
        self,
        config: DecoderConfig,
        layer: int,
        experts: int,
        *,
        mesh: Mesh | None = None,
        ep: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config, layer, device=device, dtype=dtype)
        moe = config.moe
        if moe is None:
            raise ConfigError("a layer with experts needs a config that has `moe`")
        self.moe = MoE(
            config.dim,
            config.expert_dim,
            experts,
            top_k=moe.top_k,
            capacity_factor=moe.capacity,
            residual="add" if moe.shared else False if moe.residual == "none" else moe.residual,
            mesh=mesh,
            ep=ep,
            gate=moe.gate,
            expert=lambda number: make_expert(config, moe, number, dtype),
            balance_weight=moe.balance_weight,
            z_weight=moe.z_weight,
            init_std=config.init_std,
            layer=layer,
            exchange="auto" if mesh is None else moe.exchange,
            device=device,
            dtype=dtype,
        )

    def forward(
        self,
        x_BTC: torch.Tensor,
        rotary: Rotary,
        attend: Attend,
        routing: Routing | None = None,
        step: int | None = None,
    ) -> tuple[torch.Tensor, Aux]:
        """[B, T, C] → ([B, T, C], aux). ``routing`` fixes experts and drops; ``step`` keys what is drawn: the number
        of this micro-batch, another one on every rank."""
        x_BTC = self.attended(x_BTC, rotary, attend)
        y_BTC, aux = self.moe(self.mlp_norm(x_BTC), routing, step=step, first_token=0)
        return x_BTC + y_BTC, aux


def make_expert(config: DecoderConfig, moe: MoEConfig, number: int, dtype: torch.dtype | None) -> nn.Module:
    """Expert ``number`` of a layer; below 0 what every token passes, ``moe.shared`` experts wide. On the CPU."""
    width = config.expert_dim * (moe.shared if number < 0 and moe.shared else 1)
    if moe.expert == "swiglu":
        return MLP(config.dim, width, init_std=config.init_std, out_init_std=config.residual_init_std, dtype=dtype)
    made = GELUExpert(config.dim, width, init_std=config.init_std, dtype=dtype)
    made.down.init_std = config.residual_init_std
    made.down.reset_parameters()
    return made
