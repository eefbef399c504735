"""The two families of chains, in one table."""

from __future__ import annotations

from dataclasses import dataclass

from narrowdeep.ops.chain import ChainOps
from narrowdeep.ops.cnn.op import ops as _cnn
from narrowdeep.ops.mlp.op import ops as _mlp


@dataclass(frozen=True)
class Family:
    """What chains of one kind of layer differ in, beyond their kernels."""

    name: str
    ops: ChainOps
    sample_dims: int
    """Dimensions of one sample: (in,) or (C, H, W)."""
    tap_dims: int
    """Dimensions of a weight behind (rows, columns): none, or (f, f)."""
    ends: tuple[str, str]
    """How messages call the numbers of inputs and of outputs."""


FAMILIES = {
    "mlp": Family("mlp", _mlp, sample_dims=1, tap_dims=0, ends=("in", "out")),
    "cnn": Family("cnn", _cnn, sample_dims=3, tap_dims=2, ends=("c", "k")),
}
