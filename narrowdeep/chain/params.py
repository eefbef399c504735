"""What a chain and its spans are made of: parameters, settings, and the numbers that a plan needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Affine(NamedTuple):
    """Weight and bias of one layer, or of many stacked: (rows, columns, *tap) and (rows,), behind (layers,) or not."""

    weight: Tensor
    bias: Tensor


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


class ChainParams(NamedTuple):
    """The parameters of a span. A missing end is None: the span then begins or ends with a state."""

    first: Affine | None
    """(n, in, *tap) and (n,)"""
    hidden: Affine
    """(layers, n, n, *tap) and (layers, n)"""
    last: Affine | None
    """(out, n, *tap) and (out,)"""

    @classmethod
    def of(cls, flat: Sequence[Any]) -> ChainParams:
        """From the six, in the order of the ops."""
        first, hidden, last = (Affine(*flat[i : i + 2]) for i in (0, 2, 4))
        return cls(None if first.weight is None else first, hidden, None if last.weight is None else last)

    def flat(self) -> tuple[Tensor | None, ...]:
        """The six, in the order of the ops."""
        return *(self.first or (None, None)), *self.hidden, *(self.last or (None, None))

    @property
    def layers(self) -> int:
        """Hidden layers."""
        return self.hidden.weight.shape[0]

    def part(self, begin: int, end: int, last: bool = True) -> ChainParams:
        """Hidden layers ``begin`` .. ``end - 1``, with the ends that they reach; ``last=False`` leaves out that one."""
        hidden = Affine(self.hidden.weight[begin:end], self.hidden.bias[begin:end])
        ends = (self.first if begin == 0 else None), (self.last if last and end == self.layers else None)
        return ChainParams(ends[0], hidden, ends[1])


class ChainSettings(NamedTuple):
    """What else an op reads of a span, in the order of the ops."""

    scale: float
    """C_L"""
    offset: bool
    """Whether the parameters hold W - E (offset form) or W (plain form)."""
    outputs: int
    """Of the whole network."""
    start: int
    """Number of the state before the first hidden layer."""


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
