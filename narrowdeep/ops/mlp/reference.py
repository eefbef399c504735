"""The MLP chain in plain torch: one layer is a matrix product. ``narrowdeep.ops.reference`` holds what is around it."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from narrowdeep.ops import reference


def _apply(weight: Tensor, h: Tensor) -> Tensor:
    return weight @ h


def _transpose(weight: Tensor, g: Tensor) -> Tensor:
    return weight.t() @ g


def _weight_grad(weight: Tensor, g: Tensor, h: Tensor) -> Tensor:
    return g @ h.t()


LINEAR = reference.Affine(apply=_apply, transpose=_transpose, weight_grad=_weight_grad)

mlp_forward = partial(reference.forward, LINEAR)
mlp_backward = partial(reference.backward, LINEAR)
mlp_jvp = partial(reference.jvp, LINEAR)
mlp_advance = partial(reference.advance, LINEAR)
mlp_retreat = partial(reference.retreat, LINEAR)
