"""The MLP chain in plain torch: one layer is a matrix product. ``narrowdeep.ops.reference`` holds what is around it."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from narrowdeep.ops import reference


def linear(weight: Tensor, h: Tensor) -> Tensor:
    """(rows, columns), (columns, B) -> (rows, B)."""
    return weight @ h


mlp_forward = partial(reference.forward, linear)
