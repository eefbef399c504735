"""The convolution chain in plain torch: one layer is a zero-padded, stride-1 correlation with an odd filter.

``narrowdeep.ops.reference`` holds the chain around it. States are (channels, H, W, B), weights (rows, columns, f, f).
The identity part of a weight is the centre tap, which never reaches into the padding: the base of left channels is
``scale relu(x)`` as an image, of right channels the constant ``scale``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from narrowdeep.ops import reference


def _patches(h: Tensor, size: int) -> Tensor:
    """(n, H, W, B) -> (n, f, f, H, W, B): what each filter tap (i, j) sees at each position, 0 outside the image."""
    height, width = h.shape[1:3]
    padded = torch.nn.functional.pad(h, (0, 0, size // 2, size // 2, size // 2, size // 2))
    rows = [torch.stack([padded[:, i : i + height, j : j + width] for j in range(size)], dim=1) for i in range(size)]
    return torch.stack(rows, dim=1)


def _apply(weight: Tensor, h: Tensor) -> Tensor:
    return torch.einsum("ocij,cijhwb->ohwb", weight, _patches(h, weight.shape[-1]))


def _transpose(weight: Tensor, g: Tensor) -> Tensor:
    return _apply(weight.flip(2, 3).transpose(0, 1), g)


def _weight_grad(weight: Tensor, g: Tensor, h: Tensor) -> Tensor:
    return torch.einsum("ohwb,cijhwb->ocij", g, _patches(h, weight.shape[-1]))


CONV = reference.Affine(apply=_apply, transpose=_transpose, weight_grad=_weight_grad)

conv_forward: Callable[..., Any] = partial(reference.forward, CONV)
conv_backward: Callable[..., Any] = partial(reference.backward, CONV)
conv_jvp: Callable[..., Any] = partial(reference.jvp, CONV)
conv_advance: Callable[..., Any] = partial(reference.advance, CONV)
conv_retreat: Callable[..., Any] = partial(reference.retreat, CONV)
