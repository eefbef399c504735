"""Which layers a model stores where, and the numbers that a plan needs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class LayerSpan(NamedTuple):
    """Consecutive layers of a model whose weights and biases are stored together."""

    layers: range
    """Affine layers, counted from 0 to L - 1."""
    weight: Tensor
    """(rows, columns, *tap) of one end, (layers, n, n, *tap) of hidden layers."""
    bias: Tensor

    @property
    def trainable(self) -> tuple[bool, bool]:
        """Of the weight and of the bias."""
        return self.weight.requires_grad, self.bias.requires_grad


@dataclass(frozen=True)
class ChainShape:
    """A whole network and a batch in numbers: all that a plan of memory and time needs, no tensors."""

    batch: int
    inputs: int
    outputs: int
    width: int
    chunks: tuple[int, ...]
    """Hidden layers of each span."""
    image: tuple[int, ...]
    """(H, W); () for the MLP."""
    kernel_size: int
    """f of the filters f x f; 1 for the MLP."""
    offset: bool
    trained: bool
    """Whether any parameter requires gradients."""
    dtype: torch.dtype
    device: torch.device

    @property
    def layers(self) -> int:
        """Hidden layers."""
        return sum(self.chunks)

    @property
    def longest(self) -> int:
        """Hidden layers of the longest chunk."""
        return max(self.chunks)

    @property
    def positions(self) -> int:
        """H W, 1 for the MLP."""
        return math.prod(self.image)

    @property
    def taps(self) -> int:
        """Entries of a filter, 1 for the MLP."""
        return self.kernel_size**2

    @property
    def state(self) -> int:
        """Bytes of one word of a hidden state of the whole batch."""
        return self.width * self.positions * self.batch * self.dtype.itemsize

    @property
    def layer(self) -> int:
        """Bytes of the weight and the bias of one hidden layer."""
        return self.width * (self.width * self.taps + 1) * self.dtype.itemsize
