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
from narrowdeep.ops.params import BackwardArgs, BackwardJvpArgs, ChainParams, ForwardArgs, JvpArgs
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

    def new_output(input: Tensor, params: ChainParams, offset: bool) -> Tensor:
        first, hidden, last = params
        batch = input.shape[-1] if first is None else input.shape[0]
        if last is not None:
            return input.new_empty(batch, last.weight.shape[0])
        positions = input.shape[2:-1] if first is None else input.shape[2:]
        return input.new_empty(3 if offset else 1, hidden.weight.shape[1], *positions, batch)

    def new_gradients(call: BackwardArgs | BackwardJvpArgs) -> Any:
        input, needed = call.input, call.need_params
        grads = [input.new_empty(p.shape if needed and p is not None else 0) for p in call.params.flat()]
        return input.new_empty(input.shape if call.need_input else 0), *grads

    @torch.library.register_fake(f"narrowdeep::{family}_forward")
    def _(*args):
        input, params, settings, segment = ForwardArgs.of(args)
        state = tuple(new_output(input, params._replace(last=None), settings.offset).shape[1:])
        ends = params.first is not None, params.last is not None
        saved = saved_shape(params.layers, state, settings.offset, segment, *ends)
        return new_output(input, params, settings.offset), input.new_empty(saved)

    @torch.library.register_fake(f"narrowdeep::{family}_backward")
    def _(*args):
        return new_gradients(BackwardArgs.of(args))

    @torch.library.register_fake(f"narrowdeep::{family}_backward_jvp")
    def _(*args):
        return new_gradients(BackwardJvpArgs.of(args))

    @torch.library.register_fake(f"narrowdeep::{family}_jvp")
    def _(*args):
        call = JvpArgs.of(args)
        return new_output(call.input, call.params, call.settings.offset)

    _register_vmap(family, ops)
    _register_flops(family)
    autograd.register_chain(library, family, title, ops)
    return ops


def _register_flops(family: str) -> None:
    """What torch's flop counter says of a call: the products that eager layers take, once each, on shapes alone."""

    def formula(name: str, function: Callable[..., int]) -> None:
        register_flop_formula(getattr(torch.ops.narrowdeep, f"{family}_{name}"))(function)

    def weights(params: Any) -> list[Any]:
        first, hidden, last = params
        return [first and first.weight, hidden.weight, last and last.weight]

    def products(call: Any, *weights: Any) -> int:
        """One product of each weight that is there with states of the positions and the batch of the input."""
        size = math.prod(call.input) // (call.input[1] if call.params.first else call.input[0] * call.input[1])
        return 2 * size * sum(math.prod(weight) for weight in weights if weight is not None)

    def forward(*args: Any, **_: Any) -> int:
        call = ForwardArgs.of(args)
        return products(call, *weights(call.params))

    def backward(*args: Any, **_: Any) -> int:
        call = BackwardArgs.of(args)
        first, *others = weights(call.params)
        back = products(call, *others, first if call.need_input else None)
        sums = products(call, first, *others) if call.need_params else 0
        return sums + (back if call.need_input or call.need_params else 0)

    def jvp(*args: Any, **_: Any) -> int:
        return tangent(JvpArgs.of(args))

    def tangent(call: Any) -> int:
        (first, *others), t = weights(call.params), call.tangents
        weights_t = t.first_weight, t.hidden_weight, t.last_weight
        return products(call, first, *others, None if t.input is None else first, *weights_t)

    def backward_jvp(*args: Any, **_: Any) -> int:
        """The jvp; both gradients through every layer; two products a weight."""
        call = BackwardJvpArgs.of(args)
        if not (call.need_input or call.need_params):
            return 0
        (first, *others), t = weights(call.params), call.tangents
        ends = (first, t.first_weight) if call.need_input else ()
        back = products(call, *others * 2, t.hidden_weight, t.last_weight, *ends)
        sums = products(call, *[first, *others] * 2) if call.need_params else 0
        return tangent(call) + back + sums

    for function in (forward, backward, jvp, backward_jvp):
        formula(function.__name__, function)


def _fold(tensor: Tensor, dim: int | None, size: int, batch_dim: int) -> Tensor:
    """Merge a vmapped dimension (or a broadcast one) into the batch dimension ``batch_dim``, vmapped index first.

    ``batch_dim`` counts in the tensor without the vmapped dimension; -1 is the last.
    """
    if batch_dim < 0:
        batch_dim += tensor.dim() - (dim is not None)
    if dim is None:
        tensor = tensor.unsqueeze(batch_dim).expand(*tensor.shape[:batch_dim], size, *tensor.shape[batch_dim:])
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

    def batch_dims(params: ChainParams) -> tuple[int, int]:
        """The batch dimension of the input and of the output: first of x and f(x), last of states."""
        return (-1 if params.first is None else 0), (-1 if params.last is None else 0)

    @torch.library.register_vmap(f"narrowdeep::{family}_forward")
    def _(info, in_dims, input, *rest):
        size = info.batch_size
        if any(d is not None for d in in_dims[1:]):
            return loop_vmap(ops.forward, info, in_dims, (input, *rest))
        before, after = batch_dims(ForwardArgs.of((input, *rest)).params)
        out, saved = ops.forward(_fold(input, in_dims[0], size, before), *rest)
        batch = _batch(input, in_dims[0], before)
        (out, out_dim), (saved, saved_dim) = _unfold(out, size, batch, after), _unfold(saved, size, batch, -1)
        return (out, saved), (out_dim, saved_dim)

    @torch.library.register_vmap(f"narrowdeep::{family}_backward")
    def _(info, in_dims, *args):
        size, call = info.batch_size, BackwardArgs.of(args)
        dims: Any = BackwardArgs.of(in_dims)
        if call.need_params or any(d is not None for d in dims.params.flat()):
            return loop_vmap(ops.backward, info, in_dims, args)
        before, after = batch_dims(call.params)
        folded = (_fold(call.grad, dims.grad, size, after), _fold(call.input, dims.input, size, before))
        saved = _fold(call.saved, dims.saved, size, -1)
        needed = call.need_input, call.need_params
        grad_input, *empty = ops.backward(*folded, *call.params.flat(), saved, *call.settings, call.segment, *needed)
        grad_dim = None
        if call.need_input:
            grad_input, grad_dim = _unfold(grad_input, size, _batch(call.input, dims.input, before), before)
        return (grad_input, *empty), (grad_dim, *[None] * 6)

    @torch.library.register_vmap(f"narrowdeep::{family}_backward_jvp")
    def _(info, in_dims, *args):
        size, call = info.batch_size, BackwardJvpArgs.of(args)
        dims: Any = BackwardJvpArgs.of(in_dims)
        if call.need_params or any(d is not None for d in (*dims.params.flat(), *dims.tangents[1:])):
            return loop_vmap(ops.backward_jvp, info, in_dims, args)
        before, after = batch_dims(call.params)

        def fold(tensor: Tensor | None, dim: int | None, batch_dim: int) -> Tensor | None:
            return None if tensor is None else _fold(tensor, dim, size, batch_dim)

        grads = fold(call.grad, dims.grad, after), fold(call.grad_t, dims.grad_t, after)
        input = fold(call.input, dims.input, before)
        tangents = call.tangents._replace(input=fold(call.tangents.input, dims.tangents.input, before))
        needed = call.need_input, call.need_params
        found, *empty = ops.backward_jvp(*grads, input, *call.params.flat(), *tangents, *call.settings, *needed)
        dim = None
        if call.need_input:
            found, dim = _unfold(found, size, _batch(call.input, dims.input, before), before)
        return (found, *empty), (dim, *[None] * 6)

    @torch.library.register_vmap(f"narrowdeep::{family}_jvp")
    def _(info, in_dims, *args):
        size, call = info.batch_size, JvpArgs.of(args)
        dims: Any = JvpArgs.of(in_dims)
        if any(d is not None for d in (*dims.params.flat(), *dims.tangents[1:])):
            return loop_vmap(ops.jvp, info, in_dims, args)
        before, after = batch_dims(call.params)
        tangents = call.tangents
        if tangents.input is not None:
            tangents = tangents._replace(input=_fold(tangents.input, dims.tangents.input, size, before))
        input = _fold(call.input, dims.input, size, before)
        out = ops.jvp(input, *call.params.flat(), *tangents, *call.settings)
        return _unfold(out, size, _batch(call.input, dims.input, before), after)
