"""Differentiable deep narrow chains, as functions of their data and parameters.

One ``autograd.Function`` serves every family of chain ops and every device: one graph node for all layers. It works
under ``backward``, ``torch.autograd.grad``, ``torch.func.{grad, vjp, jvp, jacrev, jacfwd, vmap}`` and
``torch.compile(fullgraph=True)``. First derivatives only: a second one raises an error that says so.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from narrowdeep.ops.chain import ChainOps
from narrowdeep.ops.mlp.op import ops as _mlp_ops

Form = Literal["offset", "plain"]

_OPS: dict[str, ChainOps] = {"mlp": _mlp_ops}
_SECOND_ORDER = (
    "narrowdeep differentiates its chains once: second derivatives (create_graph=True, torch.func.hessian, jvp of grad) "
    "are not supported; use model.to_sequential() for them"
)


class _ChainBackward(torch.autograd.Function):
    """The backward op as a node of its own, so that differentiating it again raises instead of returning zeros."""

    generate_vmap_rule = True

    @staticmethod
    def forward(family: str, *args: Any) -> tuple[Tensor, ...]:
        return _OPS[family].backward(*args)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(_SECOND_ORDER)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Any:
        raise NotImplementedError(_SECOND_ORDER)


class _ChainJvp(torch.autograd.Function):
    """The jvp op as a node of its own, for the same reason."""

    generate_vmap_rule = True

    @staticmethod
    def forward(family: str, *args: Any) -> Tensor:
        return _OPS[family].jvp(*args)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(_SECOND_ORDER)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Any:
        raise NotImplementedError(_SECOND_ORDER)


class _Chain(torch.autograd.Function):
    """forward(family, x, 6 parameters, scale, offset, segment) -> (out, saved). Dynamo traces this one."""

    @staticmethod
    def forward(family: str, *args: Any) -> tuple[Tensor, Tensor]:
        return _OPS[family].forward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        ctx.family, ctx.settings = inputs[0], inputs[8:]
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[1:8], output[1])
        ctx.save_for_forward(*inputs[1:8])

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_saved: None) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            return (None,) * 11
        *inputs, saved = ctx.saved_tensors
        need_input = ctx.needs_input_grad[1]
        need_params = any(ctx.needs_input_grad[2:8])
        args = (grad_out, *inputs, saved, *ctx.settings, need_input, need_params)
        if torch.compiler.is_compiling():
            grads = _OPS[ctx.family].backward(*args)
        else:
            grads = _ChainBackward.apply(ctx.family, *args)
        needed = ctx.needs_input_grad[1:8]
        return (None, *(g if n else None for g, n in zip(grads, needed, strict=True)), None, None, None)


class _TransformableChain(_Chain):
    """Adds what torch.func needs and Dynamo refuses."""

    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Any) -> tuple[Tensor, None]:
        scale, offset, _segment = ctx.settings
        inputs = ctx.saved_tensors[:7]
        return _ChainJvp.apply(ctx.family, *inputs, *tangents[:7], scale, offset), None


def _apply(
    family: str, x: Tensor, params: tuple[Tensor, ...], scale: float, form: Form, segment: int
) -> Tensor:
    function = _Chain if torch.compiler.is_compiling() else _TransformableChain
    out, _ = function.apply(family, x, *params, float(scale), form == "offset", segment)
    return out


def check_settings(*, scale: float, form: str, segment: int) -> None:
    """Raise TypeError or ValueError naming the argument, the rule and the value."""
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a number, got {scale!r}")
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be finite and positive, got {scale}")
    if form not in ("offset", "plain"):
        raise ValueError(f"form must be 'offset' or 'plain', got {form!r}")
    if isinstance(segment, bool) or not isinstance(segment, int):
        raise TypeError(f"segment must be an int, got {segment!r}")
    if segment < 0:
        raise ValueError(f"segment must be at least 0, got {segment}")


def check_tensors(x: Tensor, params: dict[str, Tensor]) -> None:
    """Dtypes and devices: floating point (float32 or float64), the same for x and every parameter."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x must be torch.float32 or torch.float64, got {x.dtype}")
    for name, param in params.items():
        if param.dtype != x.dtype:
            raise TypeError(f"x and {name} must have the same dtype, got {x.dtype} and {param.dtype}")
        if param.device != x.device:
            raise ValueError(f"x and {name} must be on the same device, got {x.device} and {param.device}")


def mlp_chain(
    x: Tensor,
    first_weight: Tensor,
    first_bias: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    last_weight: Tensor,
    last_bias: Tensor,
    *,
    scale: float,
    form: Form = "offset",
    segment: int = 64,
) -> Tensor:
    """A deep narrow MLP, all ``L = hidden_weight.shape[0] + 2`` affine layers in one op (thesis section 3.1).

    Arguments:
        x: (*, in), float32 or float64.
        first_weight, first_bias: (n, in) and (n,).
        hidden_weight, hidden_bias: (L-2, n, n) and (L-2, n), L >= 2.
        last_weight, last_bias: (out, n) and (out,).
        scale: C_L, finite and positive. Read in offset form only.
        form: "offset": the parameters hold Delta = W - E and c, and n must be in + 1 + out. "plain": W and b.
        segment: layers between two saved states for the backward; 1 saves every state, 0 none (the backward then
            runs the forward again). Changes memory and time, never the result.

    Returns: (*, out), dtype and device of x.

    Raises: TypeError for dtypes, ValueError for shapes, devices, scale, form and segment; NotImplementedError when
        differentiated twice.
    """
    params = {
        "first_weight": first_weight,
        "first_bias": first_bias,
        "hidden_weight": hidden_weight,
        "hidden_bias": hidden_bias,
        "last_weight": last_weight,
        "last_bias": last_bias,
    }
    check_settings(scale=scale, form=form, segment=segment)
    check_tensors(x, params)
    if first_weight.dim() != 2:
        raise ValueError(f"first_weight must have shape (n, in), got {tuple(first_weight.shape)}")
    if last_weight.dim() != 2:
        raise ValueError(f"last_weight must have shape (out, n), got {tuple(last_weight.shape)}")
    width, in_features = first_weight.shape
    out_features = last_weight.shape[0]
    layers = hidden_weight.shape[0] if hidden_weight.dim() else 0
    expected = {
        "first_bias": (width,),
        "hidden_weight": (layers, width, width),
        "hidden_bias": (layers, width),
        "last_weight": (out_features, width),
        "last_bias": (out_features,),
    }
    for name, shape in expected.items():
        if tuple(params[name].shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(params[name].shape)}")
    if form == "offset" and width != in_features + 1 + out_features:
        raise ValueError(
            f"first_weight must have in + 1 + out = {in_features + 1 + out_features} rows in offset form, got {width}"
        )
    if x.dim() == 0 or x.shape[-1] != in_features:
        got = x.shape[-1] if x.dim() else "a scalar"
        raise ValueError(f"x must have {in_features} features in its last dimension, got {got}")
    out = _apply("mlp", x.reshape(-1, in_features), tuple(params.values()), scale, form, segment)
    return out.reshape(*x.shape[:-1], out_features)
