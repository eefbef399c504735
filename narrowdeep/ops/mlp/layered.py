"""The MLP chain one layer at a time: a matrix product a layer (see ``narrowdeep.ops.layered``)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from narrowdeep.ops import layered, layered_second


def _apply(weight: Tensor, h: Tensor, out: Tensor) -> Tensor:
    return torch.mm(weight, h, out=out)


def _transpose(weight: Tensor, g: Tensor, out: Tensor) -> Tensor:
    return torch.mm(weight.t(), g, out=out)


def _weight_grad(g: Tensor, h: Tensor, out: Tensor) -> Tensor:
    return torch.mm(g, h.t(), out=out)


LINEAR = layered.Layer(apply=_apply, transpose=_transpose, weight_grad=_weight_grad)

mlp_forward = partial(layered.forward, LINEAR)
mlp_backward = partial(layered.backward, LINEAR)
mlp_jvp = partial(layered.jvp, LINEAR)
mlp_backward_jvp = partial(layered_second.backward_jvp, LINEAR)
