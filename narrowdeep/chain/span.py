"""Spans of a chain as graph nodes. ``narrowdeep.functional`` checks arguments; here nothing is checked.

A whole network is one span, chunks of its hidden layers are several, each a node of its own: the gradient of a chunk's
parameters is then complete, used by a hook and freed before the next chunk's is begun. Between two spans goes a state
(``narrowdeep.ops.reference``). A binomial schedule runs the spans between its checkpoints inside one node.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from narrowdeep.chain.family import FAMILIES
from narrowdeep.chain.schedule import Binomial, Schedule
from narrowdeep.ops.autograd import EAGER_NODES, NODES, alone, below_autograd, nothing_saved
from narrowdeep.ops.chain import PARAMS
from narrowdeep.ops.params import Affine, ChainParams, ChainSettings


class _Walk:
    """Goes through a span from state to state, as a schedule says. ``kept`` holds states by their slot."""

    def __init__(
        self, family: str, input: Tensor, params: ChainParams, settings: ChainSettings, schedule: Schedule
    ) -> None:
        self.ops, self.params, self.settings, self.schedule = FAMILIES[family].ops, params, settings, schedule
        self.kept: dict[int, Tensor] = {}
        self.grad, self.grads, self.need_input = input, [input], False  # of a backward
        self.input, self.current, self.layer = input, input, 0

    # ---- what a schedule asks for ----

    def advance(self, segment: int) -> None:
        self._advance(segment * self.schedule.segment, last=False)

    def store(self, slot: int) -> None:
        self.kept[slot] = self.current

    def load(self, segment: int, slot: int) -> None:
        self.current, self.layer = self.kept[slot], segment * self.schedule.segment

    def free(self, slot: int) -> None:
        del self.kept[slot]

    def reverse(self, segment: int) -> None:
        begin = segment * self.schedule.segment
        end = min(begin + self.schedule.segment, self.params.layers)
        part, state = self.params.part(begin, end), self.current
        self.current = self.input  # nothing else holds a state that is gone through
        # As one segment: nothing within is saved, but of the first layer's state what its base does not say.
        words = 2 if self.settings.offset else 1
        if part.first is None:
            saved = state.new_empty(0, words, *state.shape[1:])
        else:
            first = part.part(0, 0, last=False).flat()
            saved = self.ops.forward(state, *first, *self.settings, 0)[0][-words:].unsqueeze(0)
        settings = self.settings._replace(start=self.settings.start + begin)
        args = (*part.flat(), saved, *settings, max(2, end - begin), self.need_input or begin > 0, bool(self.grads))
        self.grad, *found = self.ops.backward(self.grad, state, *args)
        for name, whole, value in zip(PARAMS, self.grads, found, strict=False):
            if value.numel():
                (whole[begin:end] if name.startswith("hidden") else whole).copy_(value)

    # ---- both ways ----

    def _advance(self, layer: int, last: bool) -> None:
        if layer > self.layer or last:
            part = self.params.part(self.layer, layer, last)
            settings = self.settings._replace(start=self.settings.start + self.layer)
            self.current, self.layer = self.ops.forward(self.current, *part.flat(), *settings, 0)[0], layer

    def to_output(self) -> Tensor:
        """The span's output; the states that the backward starts from are kept."""
        self.schedule.run_forward(self.params.layers, self)
        self._advance(self.params.layers, last=True)
        return self.current

    def back(self, grad: Tensor, need_input: bool, need_params: bool) -> tuple[Tensor | None, ...]:
        """Gradients of the input and of the six parameters, from what ``to_output`` has kept."""
        self.grad, self.need_input = grad, need_input
        empty = grad.new_empty(0)
        flat = self.params.flat() if need_params else ()
        self.grads = [empty if p is None else torch.empty_like(p) for p in flat]
        self.schedule.run_backward(self.params.layers, self)
        grads = self.grads or [empty] * len(PARAMS)
        return (self.grad if need_input else None, *(g if g.numel() else None for g in grads))


class _ScheduledSpan(torch.autograd.Function):
    """A span that keeps the states that a schedule says.

    forward(schedule, family, input, 6 params, scale, offset, outputs, start) -> output
    """

    @staticmethod
    def forward(ctx: Any, schedule: Schedule, family: str, input: Tensor, *args: Any) -> Tensor:
        ctx.settings = family, ChainSettings(*args[6:]), schedule
        ctx.save_for_backward(input, *args[:6])
        walk = _ScheduledSpan._walk(ctx, (input, *args[:6]))
        out = walk.to_output()
        del walk.kept[0]  # save_for_backward keeps it
        ctx.kept = walk.kept
        return out

    @staticmethod
    def _walk(ctx: Any, tensors: tuple[Any, ...]) -> _Walk:
        family, settings, schedule = ctx.settings
        return _Walk(family, tensors[0], ChainParams.of(tensors[1:]), settings, schedule)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:9]
        # Several grads at once (is_grads_batched=True), or a graph of what is linear in grad: the op knows of both.
        if torch._C._functorch.is_legacy_batchedtensor(grad) or not alone():
            family, settings, _ = ctx.settings
            rest = nothing_saved(tensors[0], tensors[1], tensors[3]), *settings, 0, needed[0], any(needed[1:])
            grads = FAMILIES[family].ops.backward(grad, *tensors, *rest)
        else:
            walk = _ScheduledSpan._walk(ctx, tensors)
            if ctx.kept is None:  # a second time (retain_graph=True): the first has dropped them
                walk.to_output()
            else:
                walk.kept, ctx.kept = {0: tensors[0], **ctx.kept}, None
            grads = walk.back(grad, needed[0], any(needed[1:]))
        return (None, None, *(g if n else None for g, n in zip(grads, needed, strict=True)), *(None,) * 4)


_SCHEDULED: dict[str, Any] = {
    # A graph shows the family, as it does where no schedule is.
    family: type(f"{node.__name__}Scheduled", (_ScheduledSpan,), {})
    for family, node in NODES.items()
}


def span(
    family: str, input: Tensor, params: ChainParams, settings: ChainSettings, segment: int, snapshots: int | None = None
) -> Tensor:
    """Output of a span: f(x), or a state.

    ``snapshots``: states kept at most, beside the first; compiled, transformed or in forward mode every checkpoint is.
    """
    tensors = (input, *params.flat())
    if torch.compiler.is_compiling():
        return FAMILIES[family].ops.forward(*tensors, *settings, segment)[0]
    if torch._C._are_functorch_transforms_active():
        return NODES[family].apply(*tensors, *settings, segment)[0]
    if forward_ad._current_level < 0:
        if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)):
            return below_autograd(FAMILIES[family].ops.forward, *tensors, *settings, 0)[0]
        if snapshots is not None and snapshots * segment < params.layers:
            return _SCHEDULED[family].apply(Binomial(segment, snapshots), family, *tensors, *settings)
    return EAGER_NODES[family].apply(*tensors, *settings, segment)[0]


def chain(
    family: str,
    x: Tensor,
    first: Affine,
    hidden: Sequence[Affine],
    last: Affine,
    scale: float,
    offset: bool,
    segment: int,
    snapshots: int | None = None,
) -> Tensor:
    """f(x), (B, out), of a chain whose hidden layers come in chunks, each a span; ``x`` is (B, in, *positions)."""
    state = x
    for params, settings in in_spans(first, hidden, last, scale, offset, last.weight.shape[0]):
        state = span(family, state, params, settings, segment, snapshots)
    return state


def in_spans(
    first: Affine | None,
    hidden: Sequence[Affine],
    last: Affine | None,
    scale: float,
    offset: bool,
    outputs: int,
    start: int = 0,
) -> Iterator[tuple[ChainParams, ChainSettings]]:
    """A span for each chunk of hidden layers, with the ends that there are; ``start`` is the state before the first."""
    for i, chunk in enumerate(hidden):
        params = ChainParams(first if i == 0 else None, chunk, last if i == len(hidden) - 1 else None)
        yield params, ChainSettings(scale, offset, outputs, start)
        start += params.layers
