"""The layer: gate, drop, dispatch, experts, combine, and beside them a dense MLP if residual.

DeepSpeed-MoE sections 3.1 (the layer) and 4.1 (residual experts, per-layer degrees of expert parallelism).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

import torch
import torch.nn.functional as F
import xxhash
from torch import nn

from trivium.base.errors import ConfigError
from trivium.dist.comm import Comm
from trivium.dist.exchange import Exchange, ExchangeConfig, make_exchange
from trivium.dist.exchange import Kind as ExchangeKind
from trivium.dist.mesh import Mesh
from trivium.dist.shard import Placement
from trivium.moe import losses
from trivium.moe.capacity import CapacityConfig, capacity, keep
from trivium.moe.dispatch import owners, refuse, run_across, run_local
from trivium.moe.draw import key, uniform
from trivium.moe.experts import Experts, Kind, build, maker
from trivium.moe.gate import Gate, GateConfig, Gating, draw_key
from trivium.moe.routing import Routing
from trivium.nn import Linear

Residual = bool | Literal["add", "mix"]
Expert = Kind | Callable[[int], nn.Module]
_DENSE, _GATE, _MIX = -1, -2, -3  # places among the expert numbers that weights are drawn by
_M = TypeVar("_M", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class Aux:
    """What a call tells beside its output, of this rank's tokens alone.

    ``loss`` = balance_weight · ``balance`` + z_weight · ``z``: add it to the training loss. ``load`` (int64 [E]) counts
    choices before drops, ``dropped`` the choices that found their expert full; ``entropy`` is the tokens' mean, in
    nats, detached. ``routing`` may be passed in again.
    """

    loss: torch.Tensor
    balance: torch.Tensor
    z: torch.Tensor
    entropy: torch.Tensor
    load: torch.Tensor
    dropped: int
    routing: Routing


class MoE(nn.Module):
    """A feed-forward layer of ``num_experts`` experts of which each token takes ``top_k``.

    Args:
        capacity_factor: None drops nothing. A number, or a `CapacityConfig`, bounds the choices one expert takes of a
            rank's micro-batch; a token all of whose choices are dropped gets zeros.
        residual: True or ``"add"``: plus a dense MLP that every token passes (DeepSpeed-MoE 4.1); ``"mix"``: the two
            weighed by a learned softmax, as the paper's code does.
        mesh: needed when experts live on several ranks.
        ep: how many neighbouring data-parallel ranks share the experts; None: the mesh's ``ep``.
        gate: a `GateConfig`, or a module that does what `Gate` does.
        expert: ``"swiglu"``, ``"gelu"``, or a function from an expert's global number to a module [R, dim] → [R, dim].
        balance_weight, z_weight: of the two losses in ``aux.loss``.
        exchange: how tokens travel between ranks: ``"auto"``, ``"flat"``, ``"hierarchical"``, ``"coordinated"`` or an
            `ExchangeConfig`; results are equal bit for bit. Coordinated spreads experts over the tensor axis too.
        layer: the layer's number, for messages and seeds. seed: None draws one from torch's default generator.

    With ep above 1 construction and every call are collective: each rank calls forward, and backward, as often as the
    others, with any number of tokens.
    """

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        num_experts: int,
        top_k: int = 2,
        capacity_factor: float | CapacityConfig | None = None,
        residual: Residual = False,
        mesh: Mesh | None = None,
        ep: int | None = None,
        gate: GateConfig | nn.Module | None = None,
        expert: Expert | None = None,
        *,
        balance_weight: float = 0.01,
        z_weight: float = 0.0,
        init_std: float = 0.02,
        layer: int = 0,
        seed: int | None = None,
        exchange: ExchangeKind | ExchangeConfig = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes: dict[str, Any] = {"dim": dim, "ffn_dim": ffn_dim, "num_experts": num_experts, "top_k": top_k}
        _check_sizes(sizes, residual)
        _check_parts(gate, expert, capacity_factor, sizes)
        self.dim, self.num_experts, self.top_k, self.layer = dim, num_experts, top_k, layer
        self.balance_weight, self.z_weight = balance_weight, z_weight
        if isinstance(capacity_factor, int | float):
            capacity_factor = CapacityConfig(factor=capacity_factor)
        self.capacity = capacity_factor
        config = exchange if isinstance(exchange, ExchangeConfig) else ExchangeConfig(kind=exchange)
        sizes |= {"residual": residual, "capacity": repr(self.capacity), "exchange": repr(config), "seed": seed}
        sizes["gate"] = type(gate).__name__ if isinstance(gate, nn.Module) else repr(gate or GateConfig())
        self.exchange, placement = _exchange(
            mesh, ep, config, lambda comm: comm.require_equal(sizes, f"MoE layer {layer}")
        )
        self._data_rank = 0 if mesh is None else mesh.data_rank
        if num_experts < self.comm_size:
            raise ConfigError(
                f"num_experts={num_experts} on ep={self.comm_size} ranks: a rank would hold none; "
                f"lower ep to {num_experts} or less"
            )
        place = torch.device(torch.get_default_device() if device is None else device)
        self.seed, self._in_step = (
            _agreed_seed(seed, mesh, placement, place) if self.exchange and mesh else (_drawn(seed), True)
        )
        seed = self.seed
        make = maker("swiglu" if expert is None else expert, dim, ffn_dim, init_std, dtype)
        self.gate: nn.Module = (
            gate
            if isinstance(gate, nn.Module)
            else self._alike(
                _GATE, lambda: Gate(dim, num_experts, top_k, gate, seed=seed, layer=layer, dtype=dtype), place
            )
        )
        numbers = owners(num_experts, self.comm_size)[self.exchange.owner if self.exchange else 0]
        self.experts = Experts(numbers, make, seed=seed, layer=layer, placement=placement, device=device)
        self.dense: nn.Module | None = None
        self.mix: Linear | None = None
        if residual:
            self.dense = build(make, _DENSE, key(seed, layer, _DENSE), place)
        if residual == "mix":
            self.mix = self._alike(_MIX, lambda: Linear(dim, 2, bias=True, init_std=init_std, dtype=dtype), place)

    def _alike(self, part: int, make: Callable[[], _M], place: torch.device) -> _M:
        """``make()`` on ``place``: drawn as torch draws, or by the layer's seed where ranks' generators have parted."""
        if not self._in_step:
            return cast(_M, build(lambda _: make(), part, key(self.seed, self.layer, part), place))
        with place:
            return make()

    @property
    def comm_size(self) -> int:
        """Over how many ranks the experts are spread."""
        return self.exchange.owners if self.exchange else 1

    def forward(
        self,
        x: torch.Tensor,
        routing: Routing | None = None,
        *,
        step: int | None = None,
        first_token: int | None = None,
    ) -> tuple[torch.Tensor, Aux]:
        """[..., dim] → ([..., dim], aux).

        ``routing`` fixes which experts and drops, say those of an earlier call. ``step`` (the micro-batch's number) and
        ``first_token`` (the number of this rank's first token in that micro-batch; None: data_rank · tokens, right
        where ranks have equally many) key what is drawn in training; without random choices neither is needed.

        Raises:
            ConfigError: a wrong width, a routing for other tokens, or a user's gate that returns what `Gating.check`
                refuses.
            NonFiniteError: the router's logits or weights are not finite; with ep above 1 on every rank.
            MismatchError: another rank failed in its gate, or runs in another dtype.
        """
        try:
            if x.dim() == 0 or x.shape[-1] != self.dim or not x.is_floating_point():
                raise ConfigError(f"input of shape {list(x.shape)}, {x.dtype}: expected [..., {self.dim}] of floats")
            x_TC = x.reshape(-1, self.dim)
            if routing is not None:
                routing.check(len(x_TC), self.num_experts)
            first = self._data_rank * len(x_TC) if first_token is None else first_token
            place = {"first_token": first} if isinstance(self.gate, Gate) else {}
            chosen = None if routing is None else routing.experts_TK
            gating: Gating = self.gate(x_TC, experts_TK=chosen, step=step, **place)
            if type(self.gate) is not Gate:
                if not isinstance(gating, Gating):
                    raise ConfigError(f"gate= returned a {type(gating).__name__}: expected a trivium.moe.Gating")
                gating.check(len(x_TC), self.num_experts, self.top_k if chosen is None else chosen.shape[1])
            whole = routing is None and self.capacity is None
            routing = self._route(gating, routing, step, first)
        except Exception as error:  # whatever it is, the other ranks must not wait for this one
            if self.exchange is not None:
                refuse(self.exchange, self.num_experts, error)
            raise
        if self.exchange is None:
            y_TC = run_local(x_TC, routing, self.num_experts, self.experts)
        else:
            y_TC = run_across(x_TC, routing, self.num_experts, self.experts, self.exchange)
        return self._add_dense(x_TC, y_TC).view(x.shape), self._aux(gating, routing, whole=whole)

    def extra_repr(self) -> str:
        """The sizes, for ``print(model)``."""
        return f"dim={self.dim}, num_experts={self.num_experts}, top_k={self.top_k}, ep={self.comm_size}"

    def update_bias(self, load_E: torch.Tensor) -> None:
        """`Gate.update_bias`: once a step, with the sum of ``aux.load`` over its micro-batches and all ranks."""
        if not isinstance(self.gate, Gate):
            raise ConfigError(f"the gate of layer {self.layer} is the user's own: it moves its own bias")
        self.gate.update_bias(load_E)

    def _route(self, gating: Gating, forced: Routing | None, step: int | None, first: int) -> Routing:
        experts_TK, weights_TK = gating.experts_TK, gating.weights_TK
        if forced is not None:
            kept_TK = forced.kept_TK
        elif self.capacity is None:
            kept_TK = torch.ones_like(experts_TK, dtype=torch.bool)
        else:
            limit = capacity(len(experts_TK), self.num_experts, experts_TK.shape[1], self.capacity)
            drawn_T = None
            if self.capacity.policy == "random" and self.training:
                seed = draw_key(self.seed, step, self.layer, "drop", "drop_policy='random'")
                drawn_T = uniform(seed, first, len(experts_TK), 1, experts_TK.device).view(-1)
            kept_TK = keep(experts_TK, weights_TK, self.num_experts, limit, self.capacity.policy, drawn_T)
        return Routing(experts_TK=experts_TK, weights_TK=weights_TK, kept_TK=kept_TK)

    def _add_dense(self, x_TC: torch.Tensor, y_TC: torch.Tensor) -> torch.Tensor:
        if self.dense is None:
            return y_TC
        dense_TC: torch.Tensor = self.dense(x_TC)
        if self.mix is None:
            return y_TC + dense_TC
        parts_T2 = F.softmax(self.mix(x_TC).float(), dim=-1).to(y_TC.dtype)
        return y_TC * parts_T2[:, :1] + dense_TC * parts_T2[:, 1:]

    def _aux(self, gating: Gating, routing: Routing, *, whole: bool) -> Aux:
        balance = losses.load_balance(gating.probabilities_TE, routing.experts_TK)
        z = losses.z_loss(gating.logits_TE)
        return Aux(
            loss=self.balance_weight * balance + self.z_weight * z,
            balance=balance,
            z=z,
            entropy=losses.entropy(gating.probabilities_TE),
            load=torch.bincount(routing.experts_TK.reshape(-1), minlength=self.num_experts),
            dropped=0 if whole else int((~routing.kept_TK).sum()),
            routing=routing,
        )


def _exchange(
    mesh: Mesh | None, ep: int | None, config: ExchangeConfig, check: Callable[[Comm], None]
) -> tuple[Exchange | None, Placement]:
    """How the ranks that share the experts exchange rows (None: this one alone), and the axis of those with the same.

    A coordinated exchange spreads experts over the tensor axis too, where each then lives once.
    """
    alone = None, Placement()
    if ep is not None and ep < 1:
        raise ConfigError(f"ep={ep}: expected 1 or more, or None for the mesh's")
    if mesh is None:
        if ep is not None and ep > 1:
            raise ConfigError(f"ep={ep} needs mesh=: pass what tv.init(ep={ep}) returned")
        if config.kind in ("hierarchical", "coordinated"):
            raise ConfigError(
                f"exchange={config.kind!r} has no effect without mesh=: pass what tv.init(…) returned, or leave it out"
            )
        return alone
    apart = config.kind == "coordinated"
    if ep == 1 and not apart:
        return alone
    comm, across = _ranks(mesh, ep)
    if comm.size == 1 and not apart:
        return alone
    check(mesh.comm("dp"))
    if apart:
        check(mesh.comm("tp"))
    return make_exchange(mesh, comm, config), Placement(axis=across, apart="tp" if apart else None)


def _drawn(seed: int | None) -> int:
    return int(torch.randint(2**62, (), device="cpu")) if seed is None else seed


def _agreed_seed(seed: int | None, mesh: Mesh, placement: Placement, place: torch.device) -> tuple[int, bool]:
    """Rank 0's seed where none is given, and whether all ranks' generators stand at one place. Collective."""
    digest = xxhash.xxh3_64(torch.get_rng_state().numpy().data)
    if place.type == "cuda":
        digest.update(torch.cuda.get_rng_state(place).numpy().data)
    state = digest.intdigest() >> 1
    mine, alike = _drawn(seed), True
    for axis in ("dp", "tp") if placement.apart else ("dp",):
        rows = mesh.comm(axis).agree([mine, state, int(alike)], "seed of an MoE layer")
        alike = all(row[1:] == [state, 1] for row in rows)
        mine = rows[0][0]
    return mine, alike


def _check_sizes(sizes: Mapping[str, int], residual: Residual) -> None:
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name}={value!r}: expected a whole number, 1 or more")
    if sizes["top_k"] > sizes["num_experts"]:
        raise ConfigError(f"top_k={sizes['top_k']}: expected 1 to num_experts={sizes['num_experts']}")
    if residual not in (False, True, "add", "mix"):
        raise ConfigError(f"residual={residual!r}: expected False, True, 'add' or 'mix'")


def _check_parts(gate: object, expert: object, capacity_factor: object, sizes: Mapping[str, int]) -> None:
    if not (gate is None or isinstance(gate, GateConfig | nn.Module)):
        raise ConfigError(f"gate={gate!r}: expected a GateConfig, an nn.Module that does what Gate does, or None")
    if isinstance(gate, Gate):
        found = (*gate.weight.shape, gate.top_k)
        if found != (sizes["num_experts"], sizes["dim"], sizes["top_k"]):
            raise ConfigError(
                f"gate= is for {found[0]} experts, dim {found[1]} and top_k={found[2]}; the layer has "
                f"{sizes['num_experts']}, {sizes['dim']} and {sizes['top_k']}: make both of the same numbers"
            )
    if isinstance(expert, nn.Module) or not (expert is None or isinstance(expert, str) or callable(expert)):
        raise ConfigError(
            f"expert={expert!r}: expected 'swiglu', 'gelu' or a function that takes an expert's number and makes a "
            "module of its own, say lambda number: nn.Linear(8, 8)"
        )
    number = isinstance(capacity_factor, int | float) and not isinstance(capacity_factor, bool)
    if not (number or capacity_factor is None or isinstance(capacity_factor, CapacityConfig)):
        raise ConfigError(f"capacity_factor={capacity_factor!r}: expected a number, a CapacityConfig or None")


def _ranks(mesh: Mesh, ep: int | None) -> tuple[Comm, str]:
    """The ranks that share the experts, and the axis of those that hold the same ones."""
    if ep is None or ep == mesh.comm("ep").size:
        return mesh.comm("ep"), "edp"
    inside, across = mesh.split("dp", ep)
    return inside, across.axis
