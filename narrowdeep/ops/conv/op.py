"""The convolution chain's raw ops: ``narrowdeep::conv_forward``, ``conv_backward``, ``conv_jvp``, ``conv_advance``,
``conv_retreat``.

``x`` is (B, C, H, W); the six parameters are stacked as in ``narrowdeep.DeepNarrowCNN``. The CPU engine (``csrc/``) and
the Triton kernels implement them; ``reference.py`` says what they compute.
"""

from __future__ import annotations

from torch import Tensor

from narrowdeep.ops import chain, engine, triton_dispatch
from narrowdeep.ops.reference import saved_shape


def _saved_shape(x: Tensor, hidden_weight: Tensor, last_weight: Tensor, offset: bool, segment: int) -> tuple[int, ...]:
    state = (last_weight.shape[1], *x.shape[2:], x.shape[0])
    return saved_shape(hidden_weight.shape[0] + 2, state, offset, segment)


ops = chain.define("conv", _saved_shape)
engine.load()
