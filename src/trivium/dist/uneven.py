"""Send a different number of rows to every rank of an axis, or gather a different number from each.

DeepSpeed-MoE section 5.3: the steps that the all-to-all between tokens and experts is made of (`dist/exchange.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from trivium.base.errors import ConfigError
from trivium.dist.comm import Comm, Handle


def exchange_rows(
    comm: Comm, rows_RC: torch.Tensor, send: Sequence[int], receive: Sequence[int], phase: str
) -> torch.Tensor:
    """The rows that every rank sent here, by rank. Collective: each rank of ``comm`` calls it in the same order.

    ``rows_RC`` lies sorted by target: ``send[r]`` rows for rank r; ``receive[r]`` come from it (the ranks agreed on
    both before). Sends the bytes of all rows but this rank's own.
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
    comm.link.books.record("all_to_all", comm.axis, phase, (sum(send) - send[comm.rank]) * row_bytes, comm.size - 1)
    what, ready_at_s = f"all_to_all of rows on {comm.axis} ({phase})", comm.link.ready_at()
    # As bytes: the rows then travel in any dtype, whatever the backend can add.
    sent, got = (rows.view(torch.uint8).view(-1) for rows in (rows_RC, received_RC))
    splits = ([count * row_bytes for count in receive], [count * row_bytes for count in send])
    work = comm._start(what, dist.all_to_all_single, got, sent, *splits)
    Handle([work], comm.link, what, ready_at_s, (got, sent)).wait()
    return received_RC


def gather_rows(comm: Comm, rows_RC: torch.Tensor, counts: Sequence[int], phase: str) -> torch.Tensor:
    """Every rank's rows, ``counts[r]`` of rank r, one rank's after the other. Collective; see `exchange_rows`.

    Sends this rank's rows to each of the others.
    """
    if len(counts) != comm.size or counts[comm.rank] != len(rows_RC):
        raise ConfigError(
            f"{len(rows_RC)} rows and counts {list(counts)}: expected one count for each of {comm.size} ranks, this "
            "one's that of its rows"
        )
    if comm.size == 1:
        return rows_RC
    rows_RC = rows_RC.contiguous()
    everyone_RC = rows_RC.new_empty((sum(counts), *rows_RC.shape[1:]))
    row_bytes = rows_RC[:0].element_size() * rows_RC.shape[1:].numel()
    comm.link.books.record("all_gather", comm.axis, phase, (comm.size - 1) * len(rows_RC) * row_bytes, comm.size - 1)
    what, ready_at_s = f"all_gather of rows on {comm.axis} ({phase})", comm.link.ready_at()
    parts = [part.view(torch.uint8).view(-1) for part in torch.split(everyone_RC, list(counts))]
    mine = rows_RC.view(torch.uint8).view(-1)
    if comm.sends_rows:
        parts[comm.rank].copy_(mine)
        works = comm._send_rows([mine] * comm.size, parts, what)
    else:
        works = [comm._start(what, dist.all_gather, parts, mine)]
    Handle(works, comm.link, what, ready_at_s, (everyone_RC, rows_RC)).wait()
    return everyone_RC
