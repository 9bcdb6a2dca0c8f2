"""What happens to a sharded model between the first forward and the optimizer's step.

ZeRO sections 5.2 and 5.3: gradients go to their owner as soon as a unit's are complete, parameters are dropped.

[Note: order of reduction]
Flats are reduced in one order on every rank: that in which rank 0 completed them in the first backward. A flat is
launched as soon as it is complete here and all before it have been launched; the rest follow at the end of backward,
when the ranks have told each other which parameters were used. What nobody used is not reduced and is skipped.

[Note: when to wait for a reduction]
Before a backward pass the ranks compare what their graphs will use. Where it is the same (and the same as when the
gathers were recorded) a hook may wait for buffers: every peer launches the same flats. Where gathers are announced one
by one, reductions proceed at these meetings, as far as every rank has launched. Otherwise they wait for the end.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import torch
from torch import nn

from trivium.base.errors import ConfigError
from trivium.dist.comm import Comm
from trivium.memory.meter import Meter
from trivium.zero.bucket import Reducer
from trivium.zero.conductor import Conductor, Meeting, Rows
from trivium.zero.flat import Flat
from trivium.zero.placement import ZeroConfig
from trivium.zero.scale import LossScale
from trivium.zero.torch_private import at_end_of_backward, backward_id
from trivium.zero.unit import Unit
from trivium.zero.usage import Places


class Engine:
    """The sharded states of one model and the passes over them. ``places``: where usage stands for each flat."""

    def __init__(
        self,
        units: Sequence[Unit],
        data: Comm,
        control: Comm,
        config: ZeroConfig,
        meter: Meter,
        scale: LossScale,
        places: Places,
    ) -> None:
        self.units, self.config, self.meter, self.scale = tuple(units), config, meter, scale
        self.data, self.control = data, control
        self.flats = tuple(flat for unit in units for flat in unit.flats)
        self.trainable = tuple(flat for flat in self.flats if flat.trainable)
        self.reducer = Reducer(config, meter, self.trainable, control.size)
        self.syncs = self.finite = True
        self._places = places
        self.conductor = Conductor(
            units,
            control,
            1 + max(1, places.num_words),
            config.prefetch,
            len(units) if config.keep_gathered else 2,
            progress=self._progress,
            drive=self.reducer.drive,
            join=self._reduce_with,
        )
        self._order = list(reversed(range(len(self.trainable))))
        self._completed: list[int] = []
        self._launched = self._micro_batches = 0
        self._ready: set[int] = set()
        self._has_sum: set[int] = set()
        self._marked: set[int] = set()
        self._used: dict[int, set[int]] = {}
        self._number = {id(flat): number for number, flat in enumerate(self.trainable)}
        self._unit_of = {id(flat): unit for unit in self.units for flat in unit.flats}
        self._order_known = self._in_backward = False
        self._waits = self._with_gradient = False
        self._nested: set[int] = set()
        self._backward_id, self._deferred = -1, False
        self._accumulating: bool | None = None
        self.scale_in_use, self._counted = scale.value, True

    # ------------------------------------------------------------------ forward

    def begin_forward(self) -> None:
        """The root module is about to run."""
        if self.recomputing:
            return
        if self._in_backward:
            self._forget_backward()
        for flat in self.flats:
            if not flat.trainable and any(param.requires_grad for param in flat.params):
                raise ConfigError(
                    f"{flat.names[0]} was frozen when the model was sharded and requires a gradient now: "
                    "set requires_grad before calling shard"
                )
        self._with_gradient = torch.is_grad_enabled()
        self.conductor.begin(Meeting.FORWARD, "forward with gradient" if self._with_gradient else "forward")

    def end_forward(self) -> None:
        """The root module has run."""
        if self.recomputing:
            return
        self.conductor.end()
        self._with_gradient = False
        if not torch.is_grad_enabled():
            self.release(keep=False)

    @property
    def recomputing(self) -> bool:
        """Whether a forward that runs now is part of a backward pass."""
        return self._in_backward and backward_id() != -1

    def enter(self, unit: Unit) -> None:
        """``unit`` is about to run."""
        self.conductor.need(unit)

    def leave(self, unit: Unit, *, hooked: bool) -> None:
        """``unit`` has run. Unless ``hooked``, nothing announces its backward: it stays gathered meanwhile."""
        if self.recomputing:
            return
        with_gradient = self._with_gradient or torch.is_grad_enabled()
        if with_gradient and (not hooked or unit.keep or self.config.keep_gathered):
            return
        unit.release()
        self.conductor.top_up()

    def release(self, *, keep: bool) -> None:
        """Drop gathered parameters; with ``keep`` not those that stay until backward."""
        for unit in self.units:
            if unit.held and not (keep and unit.keep):
                unit.release()

    # ------------------------------------------------------------------ backward

    def begin_backward(self) -> None:
        """The first hook of a backward pass; harmless when it has begun already."""
        if self._in_backward:
            return
        self._in_backward, self._backward_id, self._deferred = True, backward_id(), False
        at_end_of_backward(self.end_backward)
        self._unmark()
        if self.syncs:
            self._begin_reduction()
        for unit in self.units:
            unit.expect()
        expected = [
            param in (self._unit_of[id(flat)].expected or ())
            for flat in self.trainable
            if flat.shared
            for param in flat.params
        ]
        profile = zlib.crc32(repr([self.syncs, expected]).encode())
        self._waits = self.conductor.begin(Meeting.BACKWARD, "backward", profile) and self.syncs

    def enter_backward(self, unit: Unit) -> None:
        """A gradient has reached ``unit``'s outputs."""
        self.begin_backward()
        self.conductor.need(unit)
        nested = backward_id() != self._backward_id and not unit.expected and unit.pending_inputs == 0
        if nested and id(unit) not in self._nested:
            self._nested.add(id(unit))
            at_end_of_backward(lambda: self._end_nested(unit))

    def _end_nested(self, unit: Unit) -> None:
        """A backward pass inside the backward pass (reentrant checkpointing) has finished with ``unit``."""
        self._nested.discard(id(unit))
        unit.release()
        self.conductor.top_up()

    def pass_inputs(self, unit: Unit) -> None:
        """The gradients of one call's inputs are done: nothing before them reads ``unit`` any more."""
        unit.pending_inputs -= 1
        self._check(unit)

    def arrive(self, unit: Unit, flat: Flat, index: int) -> None:
        """The gradient of one parameter has been accumulated."""
        self.begin_backward()
        param = flat.params[index]
        if backward_id() != self._backward_id:
            self._deferred = True
        if self.syncs and not flat.row.gradient and param.grad is not None:
            flat.gradient_memory(self.reducer.gradient_dtype(flat))
            view = flat.gradient_views[index]
            if param in unit.arrived:
                view.add_(param.grad)
            else:
                view.copy_(param.grad)
            param.grad = None
        unit.arrived.add(param)
        self._check(unit)

    def end_backward(self) -> None:
        """All gradients of this backward pass are here."""
        self.conductor.end()
        if self.syncs:
            self._reduce_with(self.conductor.meet(Meeting.REDUCE, self._words()))
        for unit in self.units:
            unit.reset()
        self.release(keep=False)
        self._in_backward = False

    # ------------------------------------------------------------------ between backward and step

    def come_to(self, meeting: Meeting) -> None:
        """Wait until all ranks have done with their backward passes; take part in those that this rank has not."""
        rows = self.conductor.meet(meeting, self.unreduced())
        for rank, row in enumerate(rows):
            if any(row[2:]):
                raise ConfigError(
                    f"rank {self.control.ranks[rank]} has gradients of backward passes under no_sync that were never "
                    f"reduced, and no more backward comes before this {meeting.name.lower()}: run the last one of a "
                    "step outside of no_sync, or call zero_grad to drop them"
                )

    def zero_grad(self, flats: Sequence[Flat]) -> None:
        """Forget reduced and local gradients of ``flats``; where they are sharded, their memory is given back."""
        if self._in_backward and not self.recomputing:
            self._forget_backward()  # what it has sent comes back into that memory
        for flat in flats:
            number = self._number[id(flat)]
            self._has_sum.discard(number)
            self._marked.discard(number)
            self._used.pop(number, None)
            self._clear_segments(flat)
            for param in flat.params:
                param.grad = None
            flat.drop_gradient()
        if not self._has_sum:
            self.finite = True
        self._learn_accumulation()

    def used_parts(self, flats: Sequence[Flat]) -> list[torch.Tensor]:
        """What this rank reduced of the flats that have a gradient: each element of the model on one rank only."""
        return [flat.own_part() for flat in flats if self._used.get(self._number[id(flat)])]

    def after_step(self, *, finite: bool) -> None:
        """A step was taken (``finite``) or skipped, the first of possibly several optimizers': free what only
        accumulation needs, unless gradients accumulate here."""
        if not self._counted:
            self._counted = True
            self.scale.update(finite=finite)
        self._learn_accumulation()
        if not self._accumulating:
            self.reducer.drop_sums()

    def _learn_accumulation(self) -> None:
        """Once several micro-batches were reduced for one step, undivided sums are kept for good."""
        if self._micro_batches:
            self._accumulating = bool(self._accumulating) or self._micro_batches > 1
            self._micro_batches = 0

    def _unmark(self) -> None:
        for number in self._marked:
            flat = self.trainable[number]
            if all(param.grad is None for param in flat.params):
                self._has_sum.discard(number)
            for param in flat.params:
                param.grad = None
        self._marked.clear()

    def _begin_reduction(self) -> None:
        keep = self.config.average and self._accumulating is not False
        self._launched, self._ready = 0, set()
        self.reducer.begin_pass()
        for number, flat in enumerate(self.trainable):
            accumulate = number in self._has_sum
            if not accumulate:
                self._used.pop(number, None)
                self._clear_segments(flat)
            self.reducer.begin(flat, accumulate=accumulate, keep_sum=keep, divided=self.config.average)
        if not self._has_sum:
            self.finite = True

    def _clear_segments(self, flat: Flat) -> None:
        for segment in flat.segments:
            if segment is not None:
                segment.grad = None

    def _check(self, unit: Unit) -> None:
        if self._deferred or not unit.complete:
            return
        if self.syncs:
            for flat in unit.flats:
                if flat.trainable:
                    self._ready.add(self._number[id(flat)])
                    self._completed.append(self._number[id(flat)])
            while self._launched < len(self._order) and self._order[self._launched] in self._ready:
                self._launch(self._order[self._launched])
            if self._waits:
                self.reducer.drive()
            else:
                self.reducer.offer()
        unit.release()
        self.conductor.top_up()

    def _launch(self, number: int) -> None:
        flat = self.trainable[number]
        unit = self._unit_of[id(flat)]
        gradients = [param.grad for param in flat.params]
        if not flat.row.gradient:
            flat.gradient_memory(self.reducer.gradient_dtype(flat))
            for index, (param, gradient) in enumerate(zip(flat.params, gradients, strict=True)):
                if gradient is not None:
                    flat.gradient_views[index].copy_(gradient)
                elif param not in unit.arrived:
                    flat.gradient_views[index].fill_(-0.0)
        self.reducer.reduce(flat, gradients)
        if self._in_backward:  # gradients that only an earlier pass under no_sync left count as used
            unit.arrived.update(p for p, gradient in zip(flat.params, gradients, strict=True) if gradient is not None)
        for param in flat.params:
            param.grad = None
        self._launched += 1

    def _words(self) -> list[int]:
        """How far this rank has launched, and a bit per parameter that has a gradient here."""
        return [self._launched, *self._pack(lambda unit, param: param in unit.arrived or param.grad is not None)]

    def unreduced(self) -> list[int]:
        """Words like those of a reduction, for gradients that backward passes under `no_sync` left on this rank."""
        marked = {id(param) for number in self._marked for param in self.trainable[number].params}
        return [0, *self._pack(lambda unit, param: param.grad is not None and id(param) not in marked)]

    def _pack(self, bit: Callable[[Unit, nn.Parameter], bool]) -> list[int]:
        return self._places.pack(
            [[bit(self._unit_of[id(flat)], param) for param in flat.params] for flat in self.trainable]
        )

    def _progress(self) -> int:
        """How many flats this rank has launched in the backward pass under way."""
        return self._launched if self._in_backward and self.syncs else 0

    def _reduce_with(self, rows: Rows) -> None:
        """Finish the reduction that all ranks have come to; a rank without a backward of its own joins with nothing."""
        self._micro_batches += 1
        if not self._in_backward:
            self._unmark()
            self._begin_reduction()
        reducing = [row for row in rows if row[0] == Meeting.REDUCE]
        end = 2 + self._places.num_words
        told = [row[2:end] if row[0] in (Meeting.REDUCE, Meeting.STEP, Meeting.CLIP) else [] for row in rows]
        used = self._places.used(told)
        for number in self._order[self._launched : max(row[1] for row in reducing)]:
            self._launch(number)
        for number in self._order[self._launched :]:
            if used[number]:
                self._launch(number)
        self._launched = len(self._order)
        self.reducer.finish()
        self._complete(used)
        self.scale_in_use, self._counted = self.scale.value, False
        self._learn_order()

    def _complete(self, used: Sequence[set[int]]) -> None:
        handles = [self.reducer.complete(flat) for flat, indices in zip(self.trainable, used, strict=True) if indices]
        for handle in handles:
            if handle is not None:
                handle.wait()
        self.finite = self.control.all_reduce_ints([int(not self.reducer.finite)], "max")[0] == 0 and self.finite
        for number, (flat, indices) in enumerate(zip(self.trainable, used, strict=True)):
            if indices:
                self._used.setdefault(number, set()).update(indices)
                self._has_sum.add(number)
            everything = self._used.get(number)
            if everything:
                self._mark(number, flat, everything)

    def _mark(self, number: int, flat: Flat, used: set[int]) -> None:
        """Show the reduced gradient where users look: whole on the parameters at stage 0, else on the segments."""
        if not self.finite:
            for gradient in flat.gradient_views or (flat.gradient_memory(flat.dtype),):
                gradient.fill_(float("nan"))  # not the padding of a whole buffer: it is sent again
        for index in used:
            segment = flat.segments[index]
            if segment is not None:
                if flat.low_precision:
                    segment.grad_dtype = self.reducer.gradient_dtype(flat)
                segment.grad = flat.gradient_of(index)
            param = flat.params[index]
            if flat.low_precision and not flat.row.optimizer:
                param.grad_dtype = None  # shown in the dtype it is kept in; what autograd accumulates stays as it is
            param.grad = flat.nan_views[index] if flat.row.optimizer else flat.gradient_views[index]
        self._marked.add(number)

    def _learn_order(self) -> None:
        if self._order_known:
            return
        seen = dict.fromkeys(self._completed)
        self._order = self.control.broadcast_json([*seen, *(number for number in self._order if number not in seen)])
        self._order_known = True

    def _forget_backward(self) -> None:
        """A backward pass broke off with an error: drop what it left."""
        self.conductor.end()  # what it has begun to gather arrives before it is released
        self.reducer.forget()
        self._nested.clear()
        for unit in self.units:
            unit.reset()
        self.release(keep=False)
        self._in_backward = False
