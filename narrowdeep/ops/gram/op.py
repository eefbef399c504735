"""The empirical tangent kernel's raw ops: ``narrowdeep::mlp_gram`` and ``narrowdeep::cnn_gram``.

``x1`` is (N1, in) or (N1, C, H, W) and ``x2`` alike; the six parameters are stacked as in the modules. The CPU engine
(``csrc/``) and the Triton kernels implement them; ``reference.py`` says what they compute, and what ``trainable`` and
``reduce`` mean. They have no derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from narrowdeep.ops import chain, engine, triton_dispatch
from narrowdeep.ops.gram import reference

SCHEMA = (
    "(Tensor x1, Tensor x2, Tensor first_weight, Tensor first_bias, Tensor hidden_weight, Tensor hidden_bias, "
    "Tensor last_weight, Tensor last_bias, float scale, bool offset, bool symmetric, int trainable, int reduce) "
    "-> Tensor"
)


def _define(name: str, family: reference.Family) -> Callable[..., Tensor]:
    chain.library.define(name + SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))

    @torch.library.register_fake(f"narrowdeep::{name}")
    def _(x1: Tensor, x2: Tensor, *rest: Any) -> Tensor:
        outputs, reduce = rest[4].shape[0], rest[10]
        shape = (x1.shape[0], x2.shape[0])
        if reduce != reference.TRACE:
            shape += (outputs,) if reduce == reference.DIAGONAL else (outputs, outputs)
        return x1.new_empty(shape, dtype=torch.float64)

    triton_dispatch.register(chain.library, name, "narrowdeep.ops.gram.triton", partial(reference.gram, family))
    return getattr(torch.ops.narrowdeep, name).default


mlp_gram = _define("mlp_gram", reference.MLP)
cnn_gram = _define("cnn_gram", reference.CNN)
engine.load()
