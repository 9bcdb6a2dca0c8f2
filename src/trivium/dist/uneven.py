"""Send a different number of rows to every rank of an axis, and send the gradients back the way the rows came.

DeepSpeed-MoE section 5.3: the all-to-all between tokens and experts (flat).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from trivium.base.errors import ConfigError
from trivium.dist.comm import Comm, Handle


def exchange_rows(
    comm: Comm, rows_RC: torch.Tensor, send: Sequence[int], receive: Sequence[int], phase: str
) -> torch.Tensor:
    """The rows that every rank sent here, by rank. Collective: each rank of ``comm`` calls it in the same order.

    ``rows_RC`` lies sorted by target: ``send[r]`` rows for rank r; ``receive[r]`` come from it (the ranks agreed on
    both before). Sends the bytes of all rows but this rank's own. Not differentiable: see `ExchangeRows`.
    """
    if len(send) != comm.size or len(receive) != comm.size or sum(send) != len(rows_RC):
        raise ConfigError(
            f"{len(rows_RC)} rows, counts {list(send)} to send and {list(receive)} to receive: "
            f"expected one count for each of {comm.size} ranks, those to send adding up to the rows"
        )
    if comm.size == 1:
        return rows_RC
    rows_RC = rows_RC.contiguous()
    received_RC = rows_RC.new_empty((sum(receive), *rows_RC.shape[1:]))
    row_bytes = rows_RC[:0].element_size() * rows_RC.shape[1:].numel()
    comm.link.books.record("all_to_all", comm.axis, phase, (sum(send) - send[comm.rank]) * row_bytes)
    what, ready_at_s = f"all_to_all of rows on {comm.axis} ({phase})", comm.link.ready_at()
    # As bytes: the rows then travel in any dtype, whatever the backend can add.
    sent, got = (rows.view(torch.uint8).view(-1) for rows in (rows_RC, received_RC))
    splits = ([count * row_bytes for count in receive], [count * row_bytes for count in send])
    work = comm._start(what, dist.all_to_all_single, got, sent, *splits)
    Handle([work], comm.link, what, ready_at_s, (got, sent)).wait()
    return received_RC


class ExchangeRows(torch.autograd.Function):
    """`exchange_rows` whose backward is the reverse exchange.

    ``anchor`` is any tensor that requires a gradient on every rank or on none: it makes the backward, which is
    collective, run on ranks whose rows need none. It receives none itself.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows_RC: torch.Tensor,
        anchor: torch.Tensor,
        comm: Comm,
        send: Sequence[int],
        receive: Sequence[int],
        phase: str,
    ) -> torch.Tensor:
        """[rows to send, …] → [rows received, …]."""
        ctx.way_back = (comm, receive, send, f"{phase}.backward")
        out = exchange_rows(comm, rows_RC, send, receive, phase)
        return out.view_as(out) if out is rows_RC else out

    @staticmethod
    def backward(ctx: Any, grad_RC: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients of the rows, sent back to where the rows came from."""
        comm, send, receive, phase = ctx.way_back
        return exchange_rows(comm, grad_RC, send, receive, phase), None, None, None, None, None
