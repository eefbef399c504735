"""Derivatives of the raw ops, on their Autograd keys: reached with autograd on, an op differentiates or raises.

A chain's derivative is one op, ``forward -> backward`` and ``forward -> jvp``. Each of these two is linear in what it
is given beside the chain's inputs (``grad_out``, the tangents), where its derivative is the other one; with respect to
the inputs it is ``backward_jvp`` for both, as the second derivative of <grad_out, f> is symmetric. There it ends.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import Function

THIRD_ORDER = (
    "narrowdeep differentiates its chains twice: third derivatives are not supported; use model.to_sequential() for"
    " them (inside torch.compile, whose backward is one derivative more, take second ones under torch.no_grad())"
)
FORWARD_TWICE = (
    "narrowdeep has no forward mode over forward mode: take second derivatives by torch.func.hessian, by forward over "
    "reverse (jvp of grad) or by reverse over forward (grad of jvp)"
)
_INPUTS = 7
"""The span's input, x or a state, and the six parameters."""

_SETTINGS = 5
"""scale, offset, outputs, start, segment; a jvp has no segment."""

_SECOND = 2 + 2 * _INPUTS
"""Tensors of a second derivative: grad_out and its tangent, the inputs and theirs."""

NODES: dict[str, type[Function]] = {}
"""The forward's node of each family, whose arguments are the op's."""

EAGER_NODES: dict[str, type[Function]] = {}
"""The same for calls outside transforms, which cost less."""


class Once(Function):
    """Tensors as they are, with respect to which a second derivative is differentiated no more."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise NotImplementedError(THIRD_ORDER)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        raise NotImplementedError(THIRD_ORDER)


def alone() -> bool:
    """Whether nothing but numbers is wanted: no graph, no tangent, no transform."""
    return not (
        torch.is_grad_enabled() or forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()
    )


def below_autograd(op: Callable[..., Any], *args: Any) -> Any:
    """The op from inside its own node: not by way of the Autograd key again, which costs a third of a small call."""
    if torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling():
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def eager(node: type[Function]) -> type[Function]:
    """A node for calls outside transforms of torch.func.

    Torch binds the arguments of a forward without a context to its signature at every call, 8 of its 18 microseconds.
    """

    def forward(ctx: Any, *args: Any) -> Any:
        output = node.forward(*args)
        node.setup_context(ctx, args, output)
        return output

    members = {"forward": staticmethod(forward), "setup_context": Function.setup_context, "generate_vmap_rule": False}
    return type(node.__name__, (node,), members)


def nothing_saved(input: Tensor, first_weight: Tensor | None, hidden_weight: Tensor) -> Tensor:
    """What a backward takes in place of ``saved`` with segment 0: it runs the forward again."""
    places = input.shape[2:] if first_weight is None else (*input.shape[2:], input.shape[0])
    return input.new_empty(0, 1, hidden_weight.shape[1], *places)


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
    message = f"narrowdeep::{name} has no derivative"

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
            tensors = *inputs[:_INPUTS], output[1]  # the same for both: a generated vmap rule mixes them up
            ctx.save_for_backward(*tensors)
            ctx.save_for_forward(*tensors)

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
                grads = Backward.apply(grad_out, *inputs, *rest)
            return (*(g if n else None for g, n in zip(grads, needed, strict=True)), *[None] * _SETTINGS)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, None]:
            return Jvp.apply(*ctx.saved_tensors[:_INPUTS], *tangents[:_INPUTS], *ctx.settings[:-1]), None

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
            tensors = inputs[: _INPUTS + 2]
            ctx.save_for_backward(*tensors)
            ctx.save_for_forward(*tensors)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            *settings, _segment, need_input, need_params = ctx.settings
            grad_out, *inputs, _saved = ctx.saved_tensors
            tangents = present(grads, inputs, need_input, need_params)
            found: Any = [None] * (_INPUTS + 1)
            needed = ctx.needs_input_grad[: _INPUTS + 1]
            if any(t is not None for t in tangents):
                if needed[0]:
                    found[0] = Jvp.apply(*inputs, *tangents, *settings)
                if any(needed[1:]):
                    found[1:] = curvature(grad_out, inputs, tangents, settings, needed[1:])
            return (*found, *[None] * (_SETTINGS + 3))

        @staticmethod
        def jvp(ctx: Any, grad_out_t: Tensor | None, *tangents: Any) -> tuple[Tensor, ...]:
            grad_out, *tensors = ctx.saved_tensors
            *settings, _segment, need_input, need_params = ctx.settings
            if all(t is None for t in tangents[:_INPUTS]):
                return Backward.apply(grad_out_t, *tensors, *ctx.settings)
            args = *tensors[:_INPUTS], *tangents[:_INPUTS], *settings
            return second_derivative(grad_out, grad_out_t, *args, need_input, need_params)

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
            ctx.save_for_backward(*inputs[: 2 * _INPUTS])
            ctx.save_for_forward(*inputs[: 2 * _INPUTS])

        @staticmethod
        def backward(ctx: Any, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
            inputs, tangents = ctx.saved_tensors[:_INPUTS], ctx.saved_tensors[_INPUTS:]
            needed = ctx.needs_input_grad[:_INPUTS], ctx.needs_input_grad[_INPUTS : 2 * _INPUTS]
            found: Any = [None] * (2 * _INPUTS)
            if grad_out is not None and any(needed[0]):
                found[:_INPUTS] = curvature(grad_out, inputs, tangents, ctx.settings, needed[0])
            if grad_out is not None and any(needed[1]):
                saved = nothing_saved(inputs[0], inputs[1], inputs[3])
                settings = (*ctx.settings, 0, needed[1][0], any(needed[1][1:]))
                grads = Backward.apply(grad_out, *inputs, saved, *settings)
                found[_INPUTS:] = [g if n else None for g, n in zip(grads, needed[1], strict=True)]
            return (*found, *[None] * (_SETTINGS - 1))

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Tensor:
            if any(t is not None for t in tangents[:_INPUTS]):
                raise NotImplementedError(FORWARD_TWICE)
            return Jvp.apply(*ctx.saved_tensors[:_INPUTS], *tangents[_INPUTS : 2 * _INPUTS], *ctx.settings)

    class Second(Function):
        """Linear in ``grad_out_t`` and in the tangents; there it is its own transpose, and the jvp."""

        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> tuple[Tensor, ...]:
            return below_autograd(ops.backward_jvp, *args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
            ctx.settings = inputs[_SECOND:]
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(inputs[0], *inputs[2 : 2 + _INPUTS])
            ctx.save_for_forward(inputs[0], *inputs[2 : 2 + _INPUTS])

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            *settings, need_input, need_params = ctx.settings
            grad_out, *inputs = ctx.saved_tensors
            tangents = present(grads, inputs, need_input, need_params)
            needed = ctx.needs_input_grad
            grad_out_t, found = None, [None] * _INPUTS
            if any(t is not None for t in tangents):
                if needed[1]:
                    grad_out_t = Jvp.apply(*inputs, *tangents, *settings)
                if any(needed[2 + _INPUTS : _SECOND]):
                    found = curvature(grad_out, inputs, tangents, settings, needed[2 + _INPUTS : _SECOND])
            return (None, grad_out_t, *[None] * _INPUTS, *found, *[None] * (_SETTINGS + 1))

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
            grad_out, *inputs = ctx.saved_tensors
            return second_derivative(grad_out, tangents[1], *inputs, *tangents[2 + _INPUTS : _SECOND], *ctx.settings)

    def second_derivative(grad_out: Tensor, grad_out_t: Tensor | None, *args: Any) -> Any:
        if alone():
            return below_autograd(ops.backward_jvp, grad_out, grad_out_t, *args)
        primals = grad_out, *args[:_INPUTS]
        if torch.is_grad_enabled() or forward_ad._current_level >= 0:
            tied = iter(Once.apply(*(t for t in primals if t is not None)))
            primals = tuple(None if t is None else next(tied) for t in primals)
        return Second.apply(primals[0], grad_out_t, *primals[1:], *args[_INPUTS:])

    def present(grads: Any, inputs: Any, need_input: bool, need_params: bool) -> list[Tensor | None]:
        """Gradients of what an op gave; None for what came back empty."""
        given = (need_input, *(need_params and p is not None for p in inputs[1:]))
        return [g if p else None for g, p in zip(grads, given, strict=True)]

    def curvature(grad_out: Tensor, inputs: Any, tangents: Any, settings: Any, needed: Any) -> list[Any]:
        """The second derivative of <grad_out, f(inputs)> along ``tangents``, for the inputs that are ``needed``."""
        grads = second_derivative(grad_out, None, *inputs, *tangents, *settings, needed[0], any(needed[1:]))
        return [g if n else None for g, n in zip(grads, needed, strict=True)]

    nodes: tuple[tuple[str, type[Function], Callable[..., Any], str], ...] = (
        ("forward", Chain, Chain.apply, title),
        ("backward", Backward, Backward.apply, f"{title}Gradient"),
        ("jvp", Jvp, Jvp.apply, f"{title}Tangent"),
        ("backward_jvp", Second, second_derivative, f"{title}SecondDerivative"),
    )
    for op, node, apply, name in nodes:
        setattr(node.forward, "__signature__", inspect.signature(node.forward))  # noqa: B010 (torch asks at every call)
        node.__name__ = name  # in profilers; the name of the grad_fn is that of a class that torch has made of it
        node._backward_cls.__name__ = f"{name}Backward"
        register(library, f"{family}_{op}", apply)
    NODES[family], EAGER_NODES[family] = Chain, eager(Chain)
    EAGER_NODES[family]._backward_cls.__name__ = Chain._backward_cls.__name__
