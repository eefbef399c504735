"""What the ops take, as records: here alone are they laid out flat and read back.

The order is that of the fields; ``narrowdeep.ops.chain`` has the meaning of each argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor


class Affine(NamedTuple):
    """Weight and bias of one layer, or of many stacked: (rows, columns, *tap) and (rows,), behind (layers,) or not."""

    weight: Tensor
    bias: Tensor


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
        there = [any(part is not None for part in end) for end in (first, last)]
        return cls(first if there[0] else None, hidden, last if there[1] else None)

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


class ChainTangents(NamedTuple):
    """Tangents of a span's input and parameters; None stands for 0."""

    input: Tensor | None
    first_weight: Tensor | None
    first_bias: Tensor | None
    hidden_weight: Tensor | None
    hidden_bias: Tensor | None
    last_weight: Tensor | None
    last_bias: Tensor | None

    @property
    def first(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of all that the first state depends on: the input, and the first layer where there is one."""
        return self.input, self.first_weight, self.first_bias

    @property
    def hidden(self) -> tuple[Tensor | None, Tensor | None]:
        return self.hidden_weight, self.hidden_bias

    @property
    def last(self) -> tuple[Tensor | None, Tensor | None]:
        return self.last_weight, self.last_bias


class ForwardArgs(NamedTuple):
    """Of ``forward``."""

    input: Tensor
    params: ChainParams
    settings: ChainSettings
    segment: int

    @classmethod
    def of(cls, args: Sequence[Any]) -> ForwardArgs:
        return cls(args[0], ChainParams.of(args[1:7]), ChainSettings(*args[7:11]), args[11])


class BackwardArgs(NamedTuple):
    """Of ``backward``."""

    grad: Tensor
    input: Tensor
    params: ChainParams
    saved: Tensor
    settings: ChainSettings
    segment: int
    need_input: bool
    need_params: bool

    @classmethod
    def of(cls, args: Sequence[Any]) -> BackwardArgs:
        grad, input, *params, saved = args[:9]
        return cls(grad, input, ChainParams.of(params), saved, ChainSettings(*args[9:13]), *args[13:])


class JvpArgs(NamedTuple):
    """Of ``jvp``."""

    input: Tensor
    params: ChainParams
    tangents: ChainTangents
    settings: ChainSettings

    @classmethod
    def of(cls, args: Sequence[Any]) -> JvpArgs:
        return cls(args[0], ChainParams.of(args[1:7]), ChainTangents(*args[7:14]), ChainSettings(*args[14:]))


class BackwardJvpArgs(NamedTuple):
    """Of ``backward_jvp``."""

    grad: Tensor
    grad_t: Tensor | None
    input: Tensor
    params: ChainParams
    tangents: ChainTangents
    settings: ChainSettings
    need_input: bool
    need_params: bool

    @classmethod
    def of(cls, args: Sequence[Any]) -> BackwardJvpArgs:
        grad, grad_t, *rest, need_input, need_params = args
        return cls(grad, grad_t, *JvpArgs.of(rest), need_input, need_params)
