"""The raw ops of both families (MLP and convolution): schemas, fakes, vmap rules.

An op goes through a *span*: consecutive layers of a chain. A span may begin with the chain's first layer, and takes x
then, or with a state; it may end with the last layer, and gives f(x) then, or with a state. A whole network is one span
with both ends.

    forward(input, params, scale, offset, outputs, start, segment) -> (output, saved)
    backward(grad, input, params, saved, scale, offset, outputs, start, segment, need_input, need_params)
        -> (gradient of input, gradients of the six params)
    jvp(input, params, input_t, tangents of the six params, scale, offset, outputs, start) -> tangent of output
    backward_jvp(grad, grad_t, input, params, input_t, tangents of the six params, scale, offset, outputs, start,
        need_input, need_params) -> (tangent of the gradient of input, those of the gradients of the six params)

=====================  ================================================================================================
``input``              x, (B, in, *positions), where the first layer is there; else a state
``params``             six: first_weight (n, in, *tap), first_bias (n,), hidden_weight (m, n, n, *tap),
                       hidden_bias (m, n), last_weight (out, n, *tap), last_bias (out,); None where an end is missing
``output``             (B, out) where the last layer is there; else a state
state                  (3, n, *positions, B) in offset form, (1, n, *positions, B) in plain form: see ``reference``
``grad``               the gradient of ``output``, in its shape
``saved``              checkpoints: ``reference.saved_shape``
``scale``, ``offset``  C_L, and whether the parameters hold W - E (offset form) or W (plain form)
``outputs``            outputs of the whole network: with the width, which units are left, middle and right
``start``              number of the state before the first hidden layer: 0 where the first layer is there
``segment``            layers between two checkpoints; 1 saves every state, 0 none
=====================  ================================================================================================

What is not needed comes back empty, shape (0,). Their derivatives are in ``narrowdeep.ops.autograd``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from narrowdeep.ops import autograd
from narrowdeep.ops.reference import saved_shape

PARAMS = ("first_weight", "first_bias", "hidden_weight", "hidden_bias", "last_weight", "last_bias")

_HIDDEN = PARAMS[2:4]
_PARAMS = ", ".join(f"Tensor{'' if name in _HIDDEN else '?'} {name}" for name in PARAMS)
_TANGENTS = ", ".join(f"Tensor? {name}_t" for name in ("input", *PARAMS))
_GRADIENTS = ", ".join(["Tensor"] * 7)
_SETTINGS = "float scale, bool offset, int outputs, int start"
_SCHEMAS = {
    "forward": f"(Tensor input, {_PARAMS}, {_SETTINGS}, int segment) -> (Tensor, Tensor)",
    "backward": f"(Tensor grad, Tensor input, {_PARAMS}, Tensor saved, {_SETTINGS}, int segment, bool need_input, "
    f"bool need_params) -> ({_GRADIENTS})",
    "jvp": f"(Tensor input, {_PARAMS}, {_TANGENTS}, {_SETTINGS}) -> Tensor",
    "backward_jvp": f"(Tensor grad, Tensor? grad_t, Tensor input, {_PARAMS}, {_TANGENTS}, {_SETTINGS}, "
    f"bool need_input, bool need_params) -> ({_GRADIENTS})",
}

library = torch.library.Library("narrowdeep", "DEF")


@dataclass(frozen=True)
class ChainOps:
    """The raw ops of one family; callables with the schemas above."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    jvp: Callable[..., Any]
    backward_jvp: Callable[..., Any]


def define(family: str, title: str) -> ChainOps:
    """Define ``narrowdeep::{family}_forward``, ``_backward``, ``_jvp`` and ``_backward_jvp``, with fakes and rules.

    ``title`` is what a graph calls the family.
    """
    for name, schema in _SCHEMAS.items():
        library.define(f"{family}_{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    ops = ChainOps(**{name: getattr(torch.ops.narrowdeep, f"{family}_{name}").default for name in _SCHEMAS})

    def new_output(input: Tensor, first: Tensor | None, hidden: Tensor, last: Tensor | None, offset: bool) -> Tensor:
        batch = input.shape[-1] if first is None else input.shape[0]
        if last is not None:
            return input.new_empty(batch, last.shape[0])
        positions = input.shape[2:-1] if first is None else input.shape[2:]
        return input.new_empty(3 if offset else 1, hidden.shape[1], *positions, batch)

    def new_gradients(input: Tensor, params: tuple[Tensor | None, ...], need_input: bool, need_params: bool) -> Any:
        grads = [input.new_empty(p.shape if need_params and p is not None else 0) for p in params]
        return input.new_empty(input.shape if need_input else 0), *grads

    @torch.library.register_fake(f"narrowdeep::{family}_forward")
    def _(input, w1, b1, wh, bh, wl, bl, scale, offset, outputs, start, segment):
        state = tuple(new_output(input, w1, wh, None, offset).shape[1:])
        saved = saved_shape(wh.shape[0], state, offset, segment, w1 is not None, wl is not None)
        return new_output(input, w1, wh, wl, offset), input.new_empty(saved)

    @torch.library.register_fake(f"narrowdeep::{family}_backward")
    def _(grad, input, w1, b1, wh, bh, wl, bl, saved, scale, offset, outputs, start, segment, need_input, need_params):
        return new_gradients(input, (w1, b1, wh, bh, wl, bl), need_input, need_params)

    @torch.library.register_fake(f"narrowdeep::{family}_backward_jvp")
    def _(grad, grad_t, input, w1, b1, wh, bh, wl, bl, *rest):
        return new_gradients(input, (w1, b1, wh, bh, wl, bl), *rest[-2:])

    @torch.library.register_fake(f"narrowdeep::{family}_jvp")
    def _(input, w1, b1, wh, bh, wl, *rest):
        return new_output(input, w1, wh, wl, rest[9])

    _register_vmap(family, ops)
    _register_flops(family)
    autograd.register_chain(library, family, title, ops)
    return ops


def _register_flops(family: str) -> None:
    """What torch's flop counter says of a call: the products that eager layers take, once each, on shapes alone."""

    def formula(name: str, function: Callable[..., int]) -> None:
        register_flop_formula(getattr(torch.ops.narrowdeep, f"{family}_{name}"))(function)

    def products(input: Any, first: Any, *weights: Any) -> int:
        """One product of each weight that is there with states of the positions and the batch of ``input``."""
        size = math.prod(input) // (input[1] if first is not None else input[0] * input[1])
        return 2 * size * sum(math.prod(weight) for weight in weights if weight is not None)

    def forward(input: Any, w1: Any, b1: Any, wh: Any, bh: Any, wl: Any, *rest: Any, **_: Any) -> int:
        return products(input, w1, w1, wh, wl)

    def backward(grad: Any, input: Any, w1: Any, b1: Any, wh: Any, bh: Any, wl: Any, *rest: Any, **_: Any) -> int:
        need_input, need_params = rest[-2:]
        back = products(input, w1, wh, wl, w1 if need_input else None) if need_input or need_params else 0
        return back + (products(input, w1, w1, wh, wl) if need_params else 0)

    def jvp(input: Any, w1: Any, b1: Any, wh: Any, bh: Any, wl: Any, bl: Any, *rest: Any, **_: Any) -> int:
        input_t, w1_t, _b1_t, wh_t, _bh_t, wl_t, *_rest = rest
        return products(input, w1, wh, wl, None if input_t is None else w1, w1_t, wh_t, wl_t)

    def backward_jvp(grad: Any, grad_t: Any, input: Any, *rest: Any, **_: Any) -> int:
        """The jvp; both gradients through every layer; two products a weight."""
        (w1, _b1, wh, _bh, wl, _bl), tangents, (need_input, need_params) = rest[:6], rest[6:13], rest[-2:]
        if not (need_input or need_params):
            return 0
        ends = w1 if need_input else None, tangents[1] if need_input else None
        back = products(input, w1, *[wh, wl] * 2, tangents[3], tangents[5], *ends)
        sums = products(input, w1, *[w1, wh, wl] * 2) if need_params else 0
        return jvp(input, *rest[:6], *tangents) + back + sums

    for function in (forward, backward, jvp, backward_jvp):
        formula(function.__name__, function)


def _fold(tensor: Tensor, dim: int | None, size: int, batch_dim: int) -> Tensor:
    """Merge a vmapped dimension (or a broadcast one) into the batch dimension ``batch_dim``, vmapped index first.

    ``batch_dim`` counts in the tensor without the vmapped dimension; -1 is the last.
    """
    if batch_dim < 0:
        batch_dim += tensor.dim() - (dim is not None)
    if dim is None:
        tensor = tensor.unsqueeze(batch_dim).expand(
            *tensor.shape[:batch_dim], size, *tensor.shape[batch_dim:]
        )
    else:
        tensor = tensor.movedim(dim, batch_dim)
    return tensor.flatten(batch_dim, batch_dim + 1)


def _batch(tensor: Tensor, dim: int | None, batch_dim: int) -> int:
    """The size of the batch dimension ``batch_dim``, counted as in ``_fold``."""
    sizes = [size for d, size in enumerate(tensor.shape) if d != dim]
    return sizes[batch_dim]


def _unfold(tensor: Tensor, size: int, batch: int, batch_dim: int) -> tuple[Tensor, int]:
    """The way back: the tensor with its vmapped dimension, and where that is."""
    batch_dim %= tensor.dim()
    return tensor.unflatten(batch_dim, (size, batch)), batch_dim


def loop_vmap(op: Callable[..., Any], info: Any, in_dims: tuple, args: tuple) -> tuple[Any, Any]:
    """One call per vmapped index, results stacked: for whatever cannot be folded into the batch."""
    size = info.batch_size

    def one(a: Any, d: int | None, i: int) -> Any:
        if d is None or size:
            return a if d is None else a.select(d, i)
        return a.new_zeros(a.shape[:d] + a.shape[d + 1 :])  # over nothing: for the shapes of the results

    results = [op(*(one(a, d, i) for a, d in zip(args, in_dims, strict=True))) for i in range(max(1, size))]
    if isinstance(results[0], Tensor):
        return torch.stack(results)[:size], 0
    return tuple(torch.stack(r)[:size] for r in zip(*results, strict=True)), (0,) * len(results[0])


def _register_vmap(family: str, ops: ChainOps) -> None:
    """Samples are independent: a vmap over data alone is a larger batch; a vmap over parameters is a loop."""

    def batch_dims(params: tuple[Tensor | None, ...]) -> tuple[int, int]:
        """The batch dimension of the input and of the output: first of x and f(x), last of states."""
        return (-1 if params[0] is None else 0), (-1 if params[4] is None else 0)

    @torch.library.register_vmap(f"narrowdeep::{family}_forward")
    def _(info, in_dims, input, *rest):
        size = info.batch_size
        if any(d is not None for d in in_dims[1:]):
            return loop_vmap(ops.forward, info, in_dims, (input, *rest))
        before, after = batch_dims(rest[:6])
        out, saved = ops.forward(_fold(input, in_dims[0], size, before), *rest)
        batch = _batch(input, in_dims[0], before)
        (out, out_dim), (saved, saved_dim) = _unfold(out, size, batch, after), _unfold(saved, size, batch, -1)
        return (out, saved), (out_dim, saved_dim)

    @torch.library.register_vmap(f"narrowdeep::{family}_backward")
    def _(info, in_dims, grad, input, *rest):
        size, params, saved, need_input, need_params = info.batch_size, rest[:6], rest[6], rest[12], rest[13]
        if need_params or any(d is not None for d in in_dims[2:8]):
            return loop_vmap(ops.backward, info, in_dims, (grad, input, *rest))
        before, after = batch_dims(params)
        folded = (_fold(grad, in_dims[0], size, after), _fold(input, in_dims[1], size, before))
        grad_input, *empty = ops.backward(*folded, *params, _fold(saved, in_dims[8], size, -1), *rest[7:])
        grad_dim = None
        if need_input:
            grad_input, grad_dim = _unfold(grad_input, size, _batch(input, in_dims[1], before), before)
        return (grad_input, *empty), (grad_dim, *[None] * 6)

    @torch.library.register_vmap(f"narrowdeep::{family}_backward_jvp")
    def _(info, in_dims, grad, grad_t, input, *rest):
        size, params, input_t, need_input, need_params = info.batch_size, rest[:6], rest[6], rest[17], rest[18]
        if need_params or any(d is not None for i, d in enumerate(in_dims) if i not in (0, 1, 2, 9)):
            return loop_vmap(ops.backward_jvp, info, in_dims, (grad, grad_t, input, *rest))
        before, after = batch_dims(params)

        def fold(tensor: Tensor | None, dim: int | None, batch_dim: int) -> Tensor | None:
            return None if tensor is None else _fold(tensor, dim, size, batch_dim)

        folded = fold(grad, in_dims[0], after), fold(grad_t, in_dims[1], after), fold(input, in_dims[2], before)
        found, *empty = ops.backward_jvp(*folded, *params, fold(input_t, in_dims[9], before), *rest[7:])
        dim = None
        if need_input:
            found, dim = _unfold(found, size, _batch(input, in_dims[2], before), before)
        return (found, *empty), (dim, *[None] * 6)

    @torch.library.register_vmap(f"narrowdeep::{family}_jvp")
    def _(info, in_dims, input, *rest):
        size, input_t = info.batch_size, rest[6]
        if any(d is not None for i, d in enumerate(in_dims) if i not in (0, 7)):
            return loop_vmap(ops.jvp, info, in_dims, (input, *rest))
        before, after = batch_dims(rest[:6])
        if input_t is not None:
            input_t = _fold(input_t, in_dims[7], size, before)
        out = ops.jvp(_fold(input, in_dims[0], size, before), *rest[:6], input_t, *rest[7:])
        return _unfold(out, size, _batch(input, in_dims[0], before), after)
