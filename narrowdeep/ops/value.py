"""``narrowdeep::state_value``: the hidden state h that a span's state (``narrowdeep.ops.reference``) stands for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from narrowdeep.ops import autograd
from narrowdeep.ops.chain import library
from narrowdeep.ops.reference import behind_relu

library.define("state_value(Tensor state) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_op = torch.ops.narrowdeep.state_value.default


@torch.library.impl(library, "state_value", "CompositeExplicitAutograd")
def _(state: Tensor) -> Tensor:
    return state.sum(0) if state.shape[0] == 1 else (state[0] + state[1]) + state[2]


@torch.library.register_fake("narrowdeep::state_value")
def _(state: Tensor) -> Tensor:
    return state.new_empty(state.shape[1:])


@torch.library.register_vmap("narrowdeep::state_value")
def _(info: Any, in_dims: tuple[int | None], state: Tensor) -> tuple[Tensor, int]:
    return _op(state.movedim(in_dims[0] or 0, -1)), -1


class _Value(Function):
    """A state's gradient is that of its pre-activation, so h's passes the ReLU here; any word may take it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(state: Tensor) -> Tensor:
        return autograd.below_autograd(_op, state)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.words = inputs[0].shape[0]

    @staticmethod
    @autograd.differentiated_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor]:
        (h,) = ctx.saved_tensors
        zero = torch.zeros_like(grad)
        return (torch.stack((*[zero] * (ctx.words - 1), behind_relu(h, grad, zero))),)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent.sum(0)


autograd.register(library, "state_value", _Value.apply)


def state_value(state: Tensor) -> Tensor:
    """h = (base + hi) + lo, (n, *positions, B), of a state (3, n, *positions, B), or (1, n, *positions, B)."""
    inside = torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling()
    return _Value.apply(state) if inside else _op(state)
