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
from torch.autograd.function import FunctionCtx, once_differentiable

from narrowdeep.chain.family import FAMILIES
from narrowdeep.chain.params import Affine, ChainParams, ChainSettings
from narrowdeep.chain.schedule import Action, Op, binomial, resumed
from narrowdeep.ops.chain import PARAMS

_SECOND_ORDER = (
    "narrowdeep differentiates its chains once: second derivatives (create_graph=True, torch.func.hessian, jvp of grad)"
    " are not supported; use model.to_sequential() for them"
)


class _Once(torch.autograd.Function):
    """An op that differentiates a span, as a node of its own: differentiating it again raises, it returns no zeros."""

    generate_vmap_rule = True

    @staticmethod
    def forward(op: Any, *args: Any) -> Any:
        return op(*args)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(_SECOND_ORDER)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Any:
        raise NotImplementedError(_SECOND_ORDER)


class _Span(torch.autograd.Function):
    """forward(family, input, 6 params, scale, offset, outputs, start, segment) -> (output, saved). Dynamo traces it."""

    @staticmethod
    def forward(family: str, *args: Any) -> tuple[Tensor, Tensor]:
        return FAMILIES[family].ops.forward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        ctx.family, ctx.settings = inputs[0], inputs[8:]
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[1:8], output[1])
        ctx.save_for_forward(*inputs[1:8])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 13
        needed = ctx.needs_input_grad[1:8]
        args = (grad, *ctx.saved_tensors, *ctx.settings, needed[0], any(needed[1:]))
        op = FAMILIES[ctx.family].ops.backward
        grads = op(*args) if torch.compiler.is_compiling() else _Once.apply(op, *args)
        return (None, *(g if n else None for g, n in zip(grads, needed, strict=True)), *(None,) * 5)


class _TransformableSpan(_Span):
    """Adds what torch.func needs and Dynamo refuses."""

    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Any) -> tuple[Tensor, None]:
        args = (*ctx.saved_tensors[:7], *tangents[:7], *ctx.settings[:-1])
        return _Once.apply(FAMILIES[ctx.family].ops.jvp, *args), None


class _Walk:
    """Goes through a span from state to state as a binomial schedule says. ``kept`` holds states by their slot."""

    def __init__(
        self,
        family: str,
        input: Tensor,
        params: ChainParams,
        settings: ChainSettings,
        segment: int,
        snapshots: int,
    ) -> None:
        self.ops, self.params, self.settings = FAMILIES[family].ops, params, settings
        self.segment, self.length, self.snapshots = segment, -(-params.layers // segment), snapshots
        self.kept: dict[int, Tensor] = {}
        self.input, self.current, self.layer = input, input, 0

    def advance(self, layer: int, last: bool = False) -> Tensor:
        """The state before ``layer``, or with ``last`` the span's output."""
        if layer > self.layer or last:
            part = self.params.part(self.layer, layer, last)
            settings = self.settings._replace(start=self.settings.start + self.layer)
            self.current, self.layer = self.ops.forward(self.current, *part.flat(), *settings, 0)[0], layer
        return self.current

    def keep_or_go(self, op: Op, segment: int, slot: int) -> None:
        """Every action but REVERSE."""
        if op == Op.ADVANCE:
            self.advance(segment * self.segment)
        elif op == Op.STORE:
            self.kept[slot] = self.current
        elif op == Op.LOAD:
            self.current, self.layer = self.kept[slot], segment * self.segment
        else:
            del self.kept[slot]

    def actions(self) -> Iterator[Action]:
        return resumed(binomial(self.length, self.snapshots))

    def to_output(self) -> Tensor:
        """The first sweep: the states that the backward starts from are kept."""
        for action in self.actions():
            if action.op == Op.LOAD:
                break
            self.keep_or_go(action.op, action.segment, action.slot)
        return self.advance(self.params.layers, last=True)

    def back(self, grad: Tensor, need_input: bool, need_params: bool) -> tuple[Tensor | None, list[Tensor | None]]:
        """The backward, from what ``to_output`` has kept: the gradients of the input and of the six parameters."""
        params = self.params.flat()
        grads = [torch.empty_like(p) if need_params and p is not None else None for p in params]
        reversing = False
        for action in self.actions():
            reversing = reversing or action.op == Op.LOAD
            if not reversing:  # done by to_output
                continue
            if action.op != Op.REVERSE:
                self.keep_or_go(action.op, action.segment, action.slot)
                continue
            begin = action.segment * self.segment
            end = min(begin + self.segment, self.params.layers)
            grad, *found = self._back(begin, end, grad, need_input or begin > 0, need_params)
            for i, (whole, value) in enumerate(zip(grads, found, strict=True)):
                if whole is not None and value.numel():
                    (whole[begin:end] if PARAMS[i].startswith("hidden") else whole).copy_(value)
        return grad if need_input else None, grads

    def _back(self, begin: int, end: int, grad: Tensor, need_input: bool, need_params: bool) -> tuple[Tensor, ...]:
        part, state = self.params.part(begin, end), self.current
        self.current = self.input  # nothing else holds a state that is gone through
        if part.first is None:  # as one segment: nothing is saved
            segment = max(2, end - begin)
            saved = state.new_empty(0, 2 if self.settings.offset else 1, *state.shape[1:])
        else:
            segment, saved = 0, state.new_empty(0)
        settings = self.settings._replace(start=self.settings.start + begin)
        return self.ops.backward(grad, state, *part.flat(), saved, *settings, segment, need_input, need_params)


class _ScheduledSpan(torch.autograd.Function):
    """As ``_Span``, with at most ``snapshots`` states kept: a binomial schedule over segments of ``segment`` layers.

    forward(family, input, 6 params, scale, offset, outputs, start, segment, snapshots) -> output
    """

    @staticmethod
    def forward(ctx: Any, family: str, input: Tensor, *args: Any) -> Tensor:
        params, ctx.walk = args[:6], (family, ChainSettings(*args[6:10]), *args[10:])
        ctx.save_for_backward(input, *params)
        walk = _ScheduledSpan._walk(ctx, (input, *params))
        out = walk.to_output()
        del walk.kept[0]  # save_for_backward keeps it
        ctx.kept = walk.kept
        return out

    @staticmethod
    def _walk(ctx: Any, tensors: tuple[Any, ...]) -> _Walk:
        family, settings, *schedule = ctx.walk
        return _Walk(family, tensors[0], ChainParams.of(tensors[1:]), settings, *schedule)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        walk = _ScheduledSpan._walk(ctx, tensors)
        if ctx.kept is None:  # a second time (retain_graph=True): the first has dropped them
            walk.to_output()
        else:
            walk.kept, ctx.kept = {0: tensors[0], **ctx.kept}, None
        needed = ctx.needs_input_grad[1:8]
        grad_input, grads = walk.back(grad, needed[0], any(needed[1:]))
        found = (g if n else None for g, n in zip((grad_input, *grads), needed, strict=True))
        return (None, *found, *(None,) * 6)


def span(
    family: str, input: Tensor, params: ChainParams, settings: ChainSettings, segment: int, snapshots: int | None = None
) -> Tensor:
    """Output of a span: f(x), or a state. Differentiable once, under every transform.

    ``snapshots``: states kept at most, beside the first. Compiled or transformed, every checkpoint is kept.
    """
    compiling = torch.compiler.is_compiling()
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    tensors = (input, *params.flat())
    args = (*settings, segment)
    if not transformed and not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)):
        return FAMILIES[family].ops.forward(*tensors, *settings, 0)[0]
    if snapshots is not None and snapshots * segment < params.layers and not compiling and not transformed:
        return _ScheduledSpan.apply(family, *tensors, *args, snapshots)
    function = _Span if compiling else _TransformableSpan
    return function.apply(family, *tensors, *args)[0]


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
    state, start, outputs = x, 0, last.weight.shape[0]
    for i, chunk in enumerate(hidden):
        params = ChainParams(first if i == 0 else None, chunk, last if i == len(hidden) - 1 else None)
        state = span(family, state, params, ChainSettings(scale, offset, outputs, start), segment, snapshots)
        start += params.layers
    return state
