"""Differentiable deep narrow chains, as functions of their data and parameters.

One graph node for all layers, or one a chunk, on every device (``narrowdeep.chain.span``). It works under ``backward``,
``torch.autograd.grad``, ``torch.func.{grad, vjp, jvp, jacrev, jacfwd, hessian, linearize, vmap}``, ``make_fx`` and
``torch.compile(fullgraph=True)``. First and second derivatives, with the ReLUs' masks as constants; a third raises an
error that says so.

Under autocast a chain takes x of any lower floating dtype, cast up to that of its parameters, in which it computes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, Literal

import torch
from torch import Tensor

from narrowdeep.chain import span
from narrowdeep.chain.family import FAMILIES, Family
from narrowdeep.checks import shown
from narrowdeep.ops.params import Affine

Form = Literal["offset", "plain"]


def check_settings(*, scale: float, form: str, segment: int) -> None:
    """Raise TypeError or ValueError naming the argument, the rule and the value. Numbers may be numpy's."""
    if isinstance(scale, bool) or not isinstance(scale, (int, float, Real)):
        raise TypeError(f"scale must be a number, got {scale!r}")
    if not 0 < scale <= sys.float_info.max:  # no call to math: torch.compile takes scale for a symbol
        raise ValueError(f"scale must be finite and positive, got {shown(scale)}")
    if form not in ("offset", "plain"):
        raise ValueError(f"form must be 'offset' or 'plain', got {form!r}")
    if isinstance(segment, bool) or not isinstance(segment, (int, Integral)):
        raise TypeError(f"segment must be an int, got {segment!r}")
    if segment < 0:
        raise ValueError(f"segment must be at least 0, got {shown(segment)}")
    if segment >= 2**63:
        raise ValueError(f"segment must be below 2**63, got {shown(segment)}")


def check_snapshots(snapshots: int | None, segment: int) -> None:
    """Raise TypeError or ValueError naming the argument, the rule and the value."""
    if snapshots is None:
        return
    if isinstance(snapshots, bool) or not isinstance(snapshots, (int, Integral)):
        raise TypeError(f"snapshots must be an int or None, got {snapshots!r}")
    if snapshots < 1:
        raise ValueError(f"snapshots must be at least 1, got {shown(snapshots)}")
    if snapshots >= 2**63:
        raise ValueError(f"snapshots must be below 2**63, got {shown(snapshots)}")
    if segment < 1:
        raise ValueError(f"segment must be at least 1 where snapshots are given, got {segment}")


def check_tensor(name: str, value: Any) -> None:
    """A dense tensor. Raises: TypeError."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.is_nested or value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {'a nested one' if value.is_nested else value.layout}")


def check_tensors(x: Tensor, params: dict[str, Tensor]) -> None:
    """Dense tensors of one floating dtype (float32 or float64) on one device: x and every parameter."""
    check_tensor("x", x)
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x must be torch.float32 or torch.float64, got {x.dtype}")
    _check_alike(x, params)


def _check_alike(x: Tensor, params: dict[str, Tensor]) -> None:
    for name, param in params.items():
        check_tensor(name, param)
        if param.dtype != x.dtype:
            raise TypeError(f"x and {name} must have the same dtype, got {x.dtype} and {param.dtype}")
        if param.device != x.device:
            raise ValueError(f"x and {name} must be on the same device, got {x.device} and {param.device}")


def cast_up(x: Any, weight: Any) -> Any:
    """Under autocast, x of a lower floating dtype in that of the parameters, as torch's own float32 ops take it."""
    if not (isinstance(x, Tensor) and isinstance(weight, Tensor) and torch.amp.is_autocast_available(x.device.type)):
        return x
    if not (torch.is_autocast_enabled(x.device.type) and x.is_floating_point()) or x.is_nested:
        return x
    return x.to(weight.dtype) if torch.promote_types(x.dtype, weight.dtype) == weight.dtype else x


def _pairs(hidden_weight: Any, hidden_bias: Any) -> list[Affine]:
    """Pairs of a weight and a bias, one a chunk; one pair where both are tensors."""
    sequences = [isinstance(value, (list, tuple)) for value in (hidden_weight, hidden_bias)]
    if not any(sequences):
        return [Affine(hidden_weight, hidden_bias)]
    if not all(sequences) or len(hidden_weight) != len(hidden_bias) or not hidden_weight:
        raise ValueError(
            "hidden_weight and hidden_bias must both be tensors, or lists of as many chunks, at least one, got "
            f"{_length(hidden_weight)} and {_length(hidden_bias)}"
        )
    for i, weight in enumerate(hidden_weight):
        if isinstance(weight, Tensor) and weight.dim() and weight.shape[0] == 0:
            raise ValueError(f"hidden_weight[{i}] must have at least one layer, got shape {tuple(weight.shape)}")
    return [Affine(*pair) for pair in zip(hidden_weight, hidden_bias, strict=True)]


def _length(value: Any) -> str:
    return f"{len(value)} chunks" if isinstance(value, (list, tuple)) else type(value).__name__


def _check_ends(params: dict[str, Any], names: tuple[str, str], form: str, tap: tuple[int, ...]) -> tuple[int, int]:
    """Shapes of the first and the last layer agree; returns their inputs and outputs, called ``names`` in messages.

    ``tap`` is what follows (rows, columns) in a weight: () or (f, f).
    """
    first, last = params["first_weight"], params["last_weight"]
    size = "".join(f", {t}" for t in tap)
    if first.dim() != 2 + len(tap):
        raise ValueError(f"first_weight must have shape (n, {names[0]}{size}), got {tuple(first.shape)}")
    if last.dim() != 2 + len(tap):
        raise ValueError(f"last_weight must have shape ({names[1]}, n{size}), got {tuple(last.shape)}")
    width, inputs, outputs = first.shape[0], first.shape[1], last.shape[0]
    for name, weight in (("first_weight", first), ("last_weight", last)):
        if weight.numel() == 0:
            raise ValueError(f"{name} must not be empty, got shape {tuple(weight.shape)}")
    _check_shape("first_bias", params["first_bias"], (width,))
    _check_shape("last_weight", last, (outputs, width, *tap))
    _check_shape("last_bias", params["last_bias"], (outputs,))
    if form == "offset" and width != inputs + 1 + outputs:
        raise ValueError(
            f"first_weight must have {names[0]} + 1 + {names[1]} = {inputs + 1 + outputs} rows in offset form, "
            f"got {width}"
        )
    return inputs, outputs


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")


def _chain(
    family: Family,
    x: Tensor,
    params: dict[str, Any],
    *,
    scale: float,
    form: Form,
    segment: int,
    snapshots: int | None,
) -> Tensor:
    """Check the arguments of ``mlp_chain`` or ``conv_chain`` and run the chain."""
    pairs = _pairs(params["hidden_weight"], params["hidden_bias"])
    check_settings(scale=scale, form=form, segment=segment)
    check_snapshots(snapshots, segment)
    ends = {name: value for name, value in params.items() if not name.startswith("hidden")}
    x = cast_up(x, ends["first_weight"])
    check_tensors(x, ends)
    for weight, bias in pairs:
        _check_alike(x, {"hidden_weight": weight, "hidden_bias": bias})
    first, last = (Affine(ends[f"{end}_weight"], ends[f"{end}_bias"]) for end in ("first", "last"))
    size = first.weight.shape[-1] if first.weight.dim() else 0
    if family.tap_dims and first.weight.dim() == 4 and (size % 2 == 0 or first.weight.shape[-2] != size):
        raise ValueError(f"first_weight must have square filters of odd size, got shape {tuple(first.weight.shape)}")
    tap = (size,) * family.tap_dims
    inputs, outputs = _check_ends(ends, family.ends, form, tap)
    width = first.weight.shape[0]
    for weight, bias in pairs:
        layers = weight.shape[0] if weight.dim() else 0
        _check_shape("hidden_weight", weight, (layers, width, width, *tap))
        _check_shape("hidden_bias", bias, (layers, width))
    dims = family.sample_dims
    if x.dim() < dims or x.shape[-dims] != inputs:
        raise ValueError(_wrong_sample(family, x, inputs))
    sample = x.shape[x.dim() - dims :]
    if 0 in sample[1:]:
        raise ValueError(f"x must have images of at least 1x1 pixels, got {x.shape[-2]}x{x.shape[-1]}")
    settings = (float(scale), form == "offset", int(segment), snapshots)
    if x.dim() == dims + 1:  # x itself: of a view of it AOT autograd takes second derivatives for 0
        return span.chain(family.name, x, first, pairs, last, *settings)
    flat = x.reshape(math.prod(x.shape[:-dims]), *sample)
    return span.chain(family.name, flat, first, pairs, last, *settings).reshape(*x.shape[:-dims], outputs)


def _wrong_sample(family: Family, x: Tensor, inputs: int) -> str:
    if family.tap_dims:
        return f"x must have shape (*, {inputs}, H, W), got {tuple(x.shape)}"
    return f"x must have {inputs} features in its last dimension, got {x.shape[-1] if x.dim() else 'a scalar'}"


def mlp_chain(
    x: Tensor,
    first_weight: Tensor,
    first_bias: Tensor,
    hidden_weight: Tensor | Sequence[Tensor],
    hidden_bias: Tensor | Sequence[Tensor],
    last_weight: Tensor,
    last_bias: Tensor,
    *,
    scale: float,
    form: Form = "offset",
    segment: int = 64,
    snapshots: int | None = None,
) -> Tensor:
    """A deep narrow MLP, all ``L = hidden_weight.shape[0] + 2`` affine layers in one op (thesis section 3.1).

    Arguments:
        x: (*, in), float32 or float64; under autocast of any lower floating dtype as well.
        first_weight, first_bias: (n, in) and (n,).
        hidden_weight, hidden_bias: (L-2, n, n) and (L-2, n), L >= 2; or lists of chunks of consecutive layers, each a
            graph node of its own, so that their gradients never exist at once.
        last_weight, last_bias: (out, n) and (out,).
        scale: C_L, finite and positive. Read in offset form only.
        form: "offset": the parameters hold Delta = W - E and c, and n must be in + 1 + out. "plain": W and b.
        segment: layers between two saved states for the backward; 1 saves every state, 0 none (the backward then
            runs the forward again). Changes memory and time, on the CPU never a bit of the result.
        snapshots: states kept at most (in each chunk), at least 1, under a binomial schedule over the segments
            (Griewank and Walther, ACM TOMS 26(1), 2000). Compiled, in a transform of torch.func or in forward mode
            every checkpoint is kept. None: every checkpoint.

    Returns: (*, out), dtype and device of the parameters.

    Raises: TypeError for dtypes, ValueError for shapes, devices, scale, form and segment; NotImplementedError when
        differentiated three times.
    """
    params = {
        "first_weight": first_weight,
        "first_bias": first_bias,
        "hidden_weight": hidden_weight,
        "hidden_bias": hidden_bias,
        "last_weight": last_weight,
        "last_bias": last_bias,
    }
    settings: dict[str, Any] = {"scale": scale, "form": form, "segment": segment, "snapshots": snapshots}
    return _chain(FAMILIES["mlp"], x, params, **settings)


def conv_chain(
    x: Tensor,
    first_weight: Tensor,
    first_bias: Tensor,
    hidden_weight: Tensor | Sequence[Tensor],
    hidden_bias: Tensor | Sequence[Tensor],
    last_weight: Tensor,
    last_bias: Tensor,
    *,
    scale: float,
    form: Form = "offset",
    segment: int = 64,
    snapshots: int | None = None,
) -> Tensor:
    """A deep narrow CNN, all ``L = hidden_weight.shape[0] + 2`` convolutions in one op (thesis section 4).

    Each layer is a stride-1 correlation padded with zeros to the size of its input (``conv2d(padding=f // 2)``); the
    output is the mean of the last layer over H and W.

    Arguments:
        x: (*, c, H, W), of the dtypes that ``mlp_chain`` takes; H and W at least 1.
        first_weight, first_bias: (n, c, f, f) and (n,), f odd.
        hidden_weight, hidden_bias: (L-2, n, n, f, f) and (L-2, n), L >= 2; or lists of chunks.
        last_weight, last_bias: (k, n, f, f) and (k,).
        scale, form, segment, snapshots: as for ``mlp_chain``; in offset form n must be c + 1 + k.

    Returns: (*, k), dtype and device of the parameters.

    Raises: as ``mlp_chain``.
    """
    params = {
        "first_weight": first_weight,
        "first_bias": first_bias,
        "hidden_weight": hidden_weight,
        "hidden_bias": hidden_bias,
        "last_weight": last_weight,
        "last_bias": last_bias,
    }
    settings: dict[str, Any] = {"scale": scale, "form": form, "segment": segment, "snapshots": snapshots}
    return _chain(FAMILIES["cnn"], x, params, **settings)
