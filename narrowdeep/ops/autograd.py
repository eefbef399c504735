"""Derivatives of the raw ops, on their Autograd keys: reached with autograd on, an op differentiates or raises.

A chain's derivative is one op, ``forward -> backward`` and ``forward -> jvp``, and each of these two is linear in what
it is given beside the chain's inputs (``grad_out``, the tangents), where its derivative is the other one: three nodes
that refer to each other. With respect to the inputs they would be second derivatives of the chain, which it does not
have: the inputs go through ``Once``, a node that raises when a derivative reaches it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import Function

SECOND_ORDER = (
    "narrowdeep differentiates its chains once: second derivatives (create_graph=True, torch.func.hessian, jvp of grad)"
    " are not supported; use model.to_sequential() for them, or Gauss-Newton products (curvlinops' GGNLinearOperator,"
    " torch.func.vjp of torch.func.jvp), which take first derivatives alone"
)
_INPUTS = 7
"""The span's input, x or a state, and the six parameters."""

_SETTINGS = 5
"""scale, offset, outputs, start, segment; a jvp has no segment."""

NODES: dict[str, type[Function]] = {}
"""The forward's node of each family, whose arguments are the op's."""


class Once(Function):
    """Tensors as they are, to be differentiated no more."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise NotImplementedError(SECOND_ORDER)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        raise NotImplementedError(SECOND_ORDER)


def once(inputs: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The inputs of a derivative of a chain; None where an end is missing."""
    if not (torch.is_grad_enabled() or forward_ad._current_level >= 0):
        return inputs
    tied = iter(Once.apply(*(t for t in inputs if t is not None)))
    return tuple(None if t is None else next(tied) for t in inputs)


def alone() -> bool:
    """Whether nothing but numbers is wanted: no graph, no tangent, no transform."""
    return not (
        torch.is_grad_enabled() or forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()
    )


def below_autograd(op: Callable[..., Any], *args: Any) -> Any:
    """The op from inside its own node: not by way of the Autograd key again, which costs a third of a small call."""
    if torch._C._are_functorch_transforms_active():
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def nothing_saved(input: Tensor, first_weight: Tensor | None, hidden_weight: Tensor) -> Tensor:
    """What a backward takes in place of ``saved`` with segment 0: it runs the forward again."""
    places = input.shape[2:] if first_weight is None else (*input.shape[2:], input.shape[0])
    return input.new_empty(0, 1, hidden_weight.shape[1], *places)


def differentiated_once(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., Any]:
    """For the backward of a node: what it returns raises when it is differentiated, with respect to anything.

    ``torch.autograd.function.once_differentiable`` asks only whether the gradients require gradients themselves: of a
    sum's gradient, which does not, it makes a constant.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return found
        tensors = [t for t in found if t is not None]
        saved = [t for t in ctx.saved_tensors if t is not None]
        tied = iter(Once.apply(*tensors, *grads, *saved)[: len(tensors)])
        return tuple(None if t is None else next(tied) for t in found)

    return run


def _dual(value: Any) -> bool:
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None


def _inside_transform() -> Any:
    """Inside a transform of torch.func an Autograd kernel runs without the keys that the next transform needs."""
    keys = torch._C.DispatchKey
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    included = included.add(keys.FuncTorchDynamicLayerFrontMode)
    for key in (
        keys.FuncTorchDynamicLayerFrontMode,
        keys.FuncTorchGradWrapper,
        keys.FuncTorchBatched,
        keys.FuncTorchVmapMode,
    ):
        excluded = excluded.remove(key)
    return torch._C._ForceDispatchKeyGuard(included, excluded)


def register(library: torch.library.Library, name: str, apply: Callable[..., Any]) -> None:
    """``apply`` of a node, whose forward calls the op again, for calls of op ``name`` that autograd has to know of."""
    op = getattr(torch.ops.narrowdeep, name).default

    def kernel(keys: torch._C.DispatchKeySet, *args: Any) -> Any:
        transformed = torch._C._are_functorch_transforms_active()
        if forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled() and any(map(_dual, args)):
            if transformed:
                raise NotImplementedError(
                    f"narrowdeep::{name} has no torch.func.jvp, nor has a graph that was traced from it: take that of "
                    "a model or of narrowdeep.functional's chains"
                )
            return apply(*args)
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            with _inside_transform() if transformed else nullcontext():
                return apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keys & torch._C._after_autograd_keyset, *args)

    library.impl(name, kernel, "Autograd", with_keyset=True)


def register_without_derivative(library: torch.library.Library, name: str) -> None:
    """Results of op ``name`` raise when they are differentiated."""
    op = getattr(torch.ops.narrowdeep, name).default
    message = f"narrowdeep::{name} has no derivative: {SECOND_ORDER}"

    class WithoutDerivative(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> Any:
            return below_autograd(op, *args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            raise NotImplementedError(message)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            raise NotImplementedError(message)

    register(library, name, WithoutDerivative.apply)


def register_chain(library: torch.library.Library, family: str, title: str, ops: Any) -> None:
    """Register the derivatives of a family's ops; ``title`` is what graphs and profilers show."""

    class Chain(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> tuple[Tensor, Tensor]:
            return below_autograd(ops.forward, *args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
            ctx.settings = inputs[_INPUTS:]
            ctx.mark_non_differentiable(output[1])
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*inputs[:_INPUTS], output[1])
            ctx.save_for_forward(*inputs[:_INPUTS])

        @staticmethod
        def backward(ctx: Any, grad_out: Tensor | None, grad_saved: None) -> tuple[Tensor | None, ...]:
            needed = ctx.needs_input_grad[:_INPUTS]
            if grad_out is None:
                return (None,) * (_INPUTS + _SETTINGS)
            *inputs, saved = ctx.saved_tensors
            rest = saved, *ctx.settings, needed[0], any(needed[1:])
            if alone():
                grads = below_autograd(ops.backward, grad_out, *inputs, *rest)
            else:
                grads = apply_backward(grad_out, *inputs, *rest)
            return (*(g if n else None for g, n in zip(grads, needed, strict=True)), *[None] * _SETTINGS)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, None]:
            return apply_jvp(*ctx.saved_tensors[:_INPUTS], *tangents[:_INPUTS], *ctx.settings[:-1]), None

    class Backward(Function):
        """Linear in ``grad_out``; there its transpose is the jvp."""

        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> tuple[Tensor, ...]:
            return below_autograd(ops.backward, *args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
            ctx.settings = inputs[_INPUTS + 2 :]
            ctx.set_materialize_grads(False)
            tensors = inputs[1 : _INPUTS + 2]
            ctx.save_for_backward(*tensors)
            ctx.save_for_forward(*tensors)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            *settings, _segment, need_input, need_params = ctx.settings
            inputs = ctx.saved_tensors[:_INPUTS]
            present = (need_input, *(need_params and p is not None for p in inputs[1:]))
            tangents = [g if p else None for g, p in zip(grads, present, strict=True)]
            found = None
            if ctx.needs_input_grad[0] and any(t is not None for t in tangents):
                found = apply_jvp(*inputs, *tangents, *settings)
            return (found, *[None] * (_INPUTS + 1 + _SETTINGS + 2))

        @staticmethod
        def jvp(ctx: Any, grad_out_t: Tensor | None, *tangents: Any) -> tuple[Tensor, ...]:
            if any(t is not None for t in tangents[:_INPUTS]):
                raise NotImplementedError(SECOND_ORDER)
            return apply_backward(grad_out_t, *ctx.saved_tensors, *ctx.settings)

    class Jvp(Function):
        """Linear in the tangents; there its transpose is the backward."""

        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> Tensor:
            return below_autograd(ops.jvp, *args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
            ctx.settings = inputs[2 * _INPUTS :]
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*inputs[:_INPUTS])
            ctx.save_for_forward(*inputs[:_INPUTS])

        @staticmethod
        def backward(ctx: Any, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
            needed = ctx.needs_input_grad[_INPUTS : 2 * _INPUTS]
            grads: Any = [None] * _INPUTS
            if grad_out is not None and any(needed):
                input, first_weight, _, hidden_weight = ctx.saved_tensors[:4]
                saved = nothing_saved(input, first_weight, hidden_weight)
                settings = (*ctx.settings, 0, needed[0], any(needed[1:]))
                grads = apply_backward(grad_out, *ctx.saved_tensors, saved, *settings)
                grads = [g if n else None for g, n in zip(grads, needed, strict=True)]
            return (*[None] * _INPUTS, *grads, *[None] * (_SETTINGS - 1))

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Tensor:
            if any(t is not None for t in tangents[:_INPUTS]):
                raise NotImplementedError(SECOND_ORDER)
            return apply_jvp(*ctx.saved_tensors, *tangents[_INPUTS : 2 * _INPUTS], *ctx.settings)

    def apply_backward(grad_out: Tensor | None, *args: Any) -> Any:
        return Backward.apply(grad_out, *once(args[:_INPUTS]), *args[_INPUTS:])

    def apply_jvp(*args: Any) -> Any:
        return Jvp.apply(*once(args[:_INPUTS]), *args[_INPUTS:])

    nodes: tuple[tuple[str, type[Function], Callable[..., Any], str], ...] = (
        ("forward", Chain, Chain.apply, title),
        ("backward", Backward, apply_backward, f"{title}Gradient"),
        ("jvp", Jvp, apply_jvp, f"{title}Tangent"),
    )
    for op, node, apply, name in nodes:
        setattr(node.forward, "__signature__", inspect.signature(node.forward))  # noqa: B010 (torch asks at every call)
        node.__name__ = name  # in profilers; the name of the grad_fn is that of a class that torch has made of it
        node._backward_cls.__name__ = f"{name}Backward"
        register(library, f"{family}_{op}", apply)
    NODES[family] = Chain
