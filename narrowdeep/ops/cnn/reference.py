"""The convolution chain in plain torch: one layer is a zero-padded, stride-1 correlation with an odd filter.

``narrowdeep.ops.reference`` holds the chain around it. States are (channels, H, W, B), weights (rows, columns, f, f).
The identity part of a weight is the centre tap, which never reaches into the padding: the base of left channels is
``scale relu(x)`` as an image, of right channels the constant ``scale``.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from narrowdeep.ops import reference


def patches(h: Tensor, size: int) -> Tensor:
    """(n, H, W, B) -> (n, f, f, H, W, B): what each filter tap (i, j) sees at each position, 0 outside the image."""
    height, width = h.shape[1:3]
    padded = torch.nn.functional.pad(h, (0, 0, size // 2, size // 2, size // 2, size // 2))
    rows = [torch.stack([padded[:, i : i + height, j : j + width] for j in range(size)], dim=1) for i in range(size)]
    return torch.stack(rows, dim=1)


def convolution(weight: Tensor, h: Tensor) -> Tensor:
    """(rows, columns, f, f), (columns, H, W, B) -> (rows, H, W, B)."""
    return torch.einsum("ocij,cijhwb->ohwb", weight, patches(h, weight.shape[-1]))


cnn_forward = partial(reference.forward, convolution)
