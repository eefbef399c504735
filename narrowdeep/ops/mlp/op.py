"""The MLP chain's raw ops: ``narrowdeep::mlp_forward``, ``mlp_backward``, ``mlp_jvp``, ``mlp_advance``,
``mlp_retreat``.

``x`` is (B, in); the six parameters are stacked as in ``narrowdeep.DeepNarrowMLP``. The CPU engine (``csrc/``) and the
Triton kernels implement them; ``reference.py`` says what they compute.
"""

from __future__ import annotations

from torch import Tensor

from narrowdeep.ops import chain, engine, triton_dispatch
from narrowdeep.ops.mlp.layered import mlp_advance, mlp_retreat
from narrowdeep.ops.reference import saved_shape


def _saved_shape(x: Tensor, hidden_weight: Tensor, last_weight: Tensor, offset: bool, segment: int) -> tuple[int, ...]:
    return saved_shape(hidden_weight.shape[0] + 2, (last_weight.shape[1], x.shape[0]), offset, segment)


ops = chain.define("mlp", _saved_shape)
engine.load()
