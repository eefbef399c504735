"""What the chain ops of both families (MLP and convolution) share: schemas, fakes, vmap rules.

Both families take the same arguments: ``x``, the six stacked parameters, ``scale`` (C_L), ``offset`` (offset or plain
form) and ``segment`` (layers between two saved states; 0 saves nothing, 1 saves every state). Both save states with
the batch in the last dimension. Their derivatives are in ``narrowdeep.ops.autograd``.
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
from narrowdeep.ops.reference import advance_saved_shape

_PARAMS = ("first_weight", "first_bias", "hidden_weight", "hidden_bias", "last_weight", "last_bias")
_PARAM_SCHEMA = ", ".join(f"Tensor {name}" for name in _PARAMS)
_TANGENT_SCHEMA = ", ".join(f"Tensor? {name}_t" for name in ("x", *_PARAMS))

FORWARD_SCHEMA = f"(Tensor x, {_PARAM_SCHEMA}, float scale, bool offset, int segment) -> (Tensor, Tensor)"
BACKWARD_SCHEMA = (
    f"(Tensor grad_out, Tensor x, {_PARAM_SCHEMA}, Tensor saved, float scale, bool offset, int segment, "
    "bool need_input, bool need_params) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
ADVANCE_SCHEMA = (
    "(Tensor state, Tensor x, Tensor hidden_weight, Tensor hidden_bias, int outputs, float scale, bool offset, "
    "int first, int segment) -> (Tensor, Tensor)"
)
RETREAT_SCHEMA = (
    "(Tensor grad_state, Tensor grad_out, Tensor state, Tensor x, Tensor hidden_weight, Tensor hidden_bias, "
    "Tensor saved, int outputs, float scale, bool offset, int first, int segment, bool need_params) -> "
    "(Tensor, Tensor, Tensor)"
)
JVP_SCHEMA = f"(Tensor x, {_PARAM_SCHEMA}, {_TANGENT_SCHEMA}, float scale, bool offset) -> Tensor"

library = torch.library.Library("narrowdeep", "DEF")


@dataclass(frozen=True)
class ChainOps:
    """The raw ops of one family; callables with the schemas above."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    jvp: Callable[..., Any]
    advance: Callable[..., Any]
    """Some of the hidden layers alone, from one state to another."""
    retreat: Callable[..., Any]
    """The way back of ``advance``."""


_SCHEMAS = {
    "forward": FORWARD_SCHEMA,
    "backward": BACKWARD_SCHEMA,
    "jvp": JVP_SCHEMA,
    "advance": ADVANCE_SCHEMA,
    "retreat": RETREAT_SCHEMA,
}


def define(
    family: str, title: str, saved_shape: Callable[[Tensor, Tensor, Tensor, bool, int], tuple[int, ...]]
) -> ChainOps:
    """Define ``narrowdeep::{family}_forward`` and its likes (``ChainOps``): fakes, vmap rules, derivatives.

    ``title`` is what a graph calls the family. ``saved_shape(x, hidden_weight, last_weight, offset, segment)`` is the
    shape of the forward's second output.
    """
    for name, schema in _SCHEMAS.items():
        library.define(f"{family}_{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    ops = ChainOps(**{name: getattr(torch.ops.narrowdeep, f"{family}_{name}").default for name in _SCHEMAS})

    @torch.library.register_fake(f"narrowdeep::{family}_forward")
    def _(x, w1, b1, wh, bh, wl, bl, scale, offset, segment):
        return x.new_empty(x.shape[0], wl.shape[0]), x.new_empty(saved_shape(x, wh, wl, offset, segment))

    @torch.library.register_fake(f"narrowdeep::{family}_backward")
    def _(grad_out, x, w1, b1, wh, bh, wl, bl, saved, scale, offset, segment, need_input, need_params):
        params = (w1, b1, wh, bh, wl, bl)
        grad_x = x.new_empty(x.shape) if need_input else x.new_empty(0)
        return (grad_x, *(p.new_empty(p.shape) if need_params else p.new_empty(0) for p in params))

    @torch.library.register_fake(f"narrowdeep::{family}_jvp")
    def _(x, w1, b1, wh, bh, wl, *rest):
        return x.new_empty(x.shape[0], wl.shape[0])

    @torch.library.register_fake(f"narrowdeep::{family}_advance")
    def _(state, x, wh, bh, outputs, scale, offset, first, segment):
        saved = advance_saved_shape(wh.shape[0], state.shape[1:], offset, segment)
        return x.new_empty(state.shape), x.new_empty(saved)

    @torch.library.register_fake(f"narrowdeep::{family}_retreat")
    def _(grad_state, grad_out, state, x, wh, bh, saved, outputs, scale, offset, first, segment, need_params):
        return (x.new_empty(state.shape), *(p.new_empty(p.shape if need_params else 0) for p in (wh, bh)))

    _register_vmap(family, ops)
    _register_flops(family)
    autograd.register_chain(library, family, title, ops)
    return ops


def _register_flops(family: str) -> None:
    """What torch's flop counter says of a call: the products that eager layers take, once each, on shapes alone."""

    def formula(name: str, function: Callable[..., int]) -> None:
        register_flop_formula(getattr(torch.ops.narrowdeep, f"{family}_{name}"))(function)

    def products(x: tuple[int, ...], *weights: tuple[int, ...]) -> int:
        """One product of each weight with states at the positions of x, (B, in, *positions)."""
        return 2 * math.prod(x) // x[1] * sum(math.prod(weight) for weight in weights)

    def forward(x: Any, w1: Any, b1: Any, wh: Any, bh: Any, wl: Any, *rest: Any, **_: Any) -> int:
        return products(x, w1, wh, wl)

    def backward(grad_out: Any, x: Any, w1: Any, b1: Any, wh: Any, bh: Any, wl: Any, *rest: Any, **_: Any) -> int:
        need_input, need_params = rest[-2:]
        back = products(x, wh, wl, *([w1] if need_input else [])) if need_input or need_params else 0
        return back + (products(x, w1, wh, wl) if need_params else 0)

    def jvp(x: Any, w1: Any, b1: Any, wh: Any, bh: Any, wl: Any, bl: Any, *rest: Any, **_: Any) -> int:
        x_t, w1_t, _b1_t, wh_t, _bh_t, wl_t, *_rest = rest
        pushed = products(x, wh, wl, *([] if x_t is None else [w1]))
        return pushed + products(x, *(t for t in (w1_t, wh_t, wl_t) if t is not None))

    def advance(state: Any, x: Any, wh: Any, *rest: Any, **_: Any) -> int:
        return products(x, wh)

    def retreat(grad_state: Any, grad_out: Any, state: Any, x: Any, wh: Any, *rest: Any, **_: Any) -> int:
        return products(x, wh) * (2 if rest[-1] else 1)

    for function in (forward, backward, jvp, advance, retreat):
        formula(function.__name__, function)


def _fold(tensor: Tensor, dim: int | None, size: int, batch_dim: int) -> Tensor:
    """Merge a vmapped dimension (or a broadcast one) into the batch dimension ``batch_dim``, vmapped index first."""
    if dim is None:
        tensor = tensor.unsqueeze(batch_dim).expand(
            *tensor.shape[:batch_dim], size, *tensor.shape[batch_dim:]
        )
    else:
        tensor = tensor.movedim(dim, batch_dim)
    return tensor.flatten(batch_dim, batch_dim + 1)


def _loop(op: Callable[..., Any], info: Any, in_dims: tuple, args: tuple) -> tuple[Any, Any]:
    """One call per vmapped index, results stacked: for whatever cannot be folded into the batch."""
    results = []
    for i in range(info.batch_size):
        results.append(op(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True))))
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(torch.stack(r) for r in zip(*results, strict=True)), (0,) * len(results[0])


def _register_vmap(family: str, ops: ChainOps) -> None:
    """Samples are independent: a vmap over data alone is a larger batch; a vmap over parameters is a loop."""

    @torch.library.register_vmap(f"narrowdeep::{family}_forward")
    def _(info, in_dims, x, *rest):
        if any(d is not None for d in in_dims[1:]):
            return _loop(ops.forward, info, in_dims, (x, *rest))
        out, saved = ops.forward(_fold(x, in_dims[0], info.batch_size, 0), *rest)
        batch = saved.shape[-1] // info.batch_size
        return (out.unflatten(0, (info.batch_size, batch)), saved.unflatten(-1, (info.batch_size, batch))), (
            0,
            saved.dim() - 1,
        )

    @torch.library.register_vmap(f"narrowdeep::{family}_backward")
    def _(info, in_dims, grad_out, x, *rest):
        params, (saved, scale, offset, segment, need_input, need_params) = rest[:6], rest[6:]
        if need_params or any(d is not None for d in in_dims[2:8]):
            return _loop(ops.backward, info, in_dims, (grad_out, x, *rest))
        saved_dim = in_dims[8]
        saved = _fold(saved, saved_dim, info.batch_size, saved.dim() - (1 if saved_dim is None else 2))
        grad_x, *empty = ops.backward(
            _fold(grad_out, in_dims[0], info.batch_size, 0),
            _fold(x, in_dims[1], info.batch_size, 0),
            *params,
            saved,
            scale,
            offset,
            segment,
            need_input,
            need_params,
        )
        if need_input:
            grad_x = grad_x.unflatten(0, (info.batch_size, grad_x.shape[0] // info.batch_size))
        return (grad_x, *empty), (0 if need_input else None, *[None] * 6)

    # Parts of a chain are never transformed (narrowdeep.functional), only differentiated for a batch of gradients.
    @torch.library.register_vmap(f"narrowdeep::{family}_advance")
    def _(info, in_dims, *args):
        return _loop(ops.advance, info, in_dims, args)

    @torch.library.register_vmap(f"narrowdeep::{family}_retreat")
    def _(info, in_dims, *args):
        return _loop(ops.retreat, info, in_dims, args)

    @torch.library.register_vmap(f"narrowdeep::{family}_jvp")
    def _(info, in_dims, x, *rest):
        x_t = rest[6]
        if any(d is not None for i, d in enumerate(in_dims) if i not in (0, 7)):
            return _loop(ops.jvp, info, in_dims, (x, *rest))
        if x_t is not None:
            x_t = _fold(x_t, in_dims[7], info.batch_size, 0)
        x = _fold(x, in_dims[0], info.batch_size, 0)
        out = ops.jvp(x, *rest[:6], x_t, *rest[7:])
        return out.unflatten(0, (info.batch_size, out.shape[0] // info.batch_size)), 0
