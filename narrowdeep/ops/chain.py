"""What the chain ops of both families (MLP and convolution) share: schemas, fakes, vmap rules.

Both families take the same arguments: ``x``, the six stacked parameters, ``scale`` (C_L), ``offset`` (offset or plain
form) and ``segment`` (layers between two saved states; 0 saves nothing, 1 saves every state). Both save states with
the batch in the last dimension. Autograd is not registered here: ``narrowdeep.functional`` wraps these ops in one
``autograd.Function``, which torch.func can transform and a registered formula cannot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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


_SPAN = "Tensor? first_weight, Tensor? first_bias, Tensor hidden_weight, Tensor hidden_bias, Tensor? last_weight, Tensor? last_bias"
_ENDS = "float scale, bool offset, int outputs, int start"
_SPANS = {
    "forward": f"(Tensor input, {_SPAN}, {_ENDS}, int segment) -> (Tensor, Tensor)",
    "backward": f"(Tensor grad, Tensor input, {_SPAN}, Tensor saved, {_ENDS}, int segment, bool need_input, "
    "bool need_params) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "jvp": f"(Tensor input, {_SPAN}, Tensor? input_t, {_TANGENT_SCHEMA.split(', ', 1)[1]}, {_ENDS}) -> Tensor",
}


def define(family: str, saved_shape: Callable[..., tuple[int, ...]]) -> ChainOps:
    """TEMPORARY: today's calls on the span ops."""
    from importlib import import_module

    name = {"conv": "cnn"}.get(family, family)
    for op, schema in _SPANS.items():
        library.define(f"{name}_{op}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    forward, backward, jvp = (getattr(torch.ops.narrowdeep, f"{name}_{op}").default for op in _SPANS)
    layered = import_module(f"narrowdeep.ops.{family}.layered")
    return ChainOps(
        forward=lambda *a: forward(*a[:9], a[5].shape[0], 0, a[9]),
        backward=lambda *a: backward(*a[:11], a[6].shape[0], 0, *a[11:]),
        jvp=lambda *a: jvp(*a, a[5].shape[0], 0),
        advance=getattr(layered, f"{family}_advance"),
        retreat=getattr(layered, f"{family}_retreat"),
    )


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
