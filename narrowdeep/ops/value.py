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
    """forward(words, h) -> their sum: of a state, whose value is h, with None for h; of its tangent, with h.

    A state's gradient is that of its pre-activation, so that of the sum passes h's ReLU here; any word may take it.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(words: Tensor, h: Tensor | None) -> Tensor:
        return autograd.below_autograd(_op, words)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor | None], output: Tensor) -> None:
        h = output if inputs[1] is None else inputs[1]
        ctx.save_for_backward(h)
        ctx.save_for_forward(h)
        ctx.words = inputs[0].shape[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _ValueGradient.apply(grad, ctx.saved_tensors[0], ctx.words), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return _Value.apply(tangent, ctx.saved_tensors[0])


class _ValueGradient(Function):
    """forward(gradient of the sum, h, number of words) -> that of the words; the mask of h's ReLU is a constant."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, h: Tensor, words: int) -> Tensor:
        zero = torch.zeros_like(grad)
        return torch.stack((*[zero] * (words - 1), behind_relu(h, grad, zero)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])
        ctx.words = inputs[2]

    @staticmethod
    def backward(ctx: Any, tangent: Tensor) -> tuple[Tensor, None, None]:  # of a gradient it is a tangent
        return _Value.apply(tangent, ctx.saved_tensors[0]), None, None

    @staticmethod
    def jvp(ctx: Any, grad: Tensor, *_: None) -> Tensor:
        return _ValueGradient.apply(grad, ctx.saved_tensors[0], ctx.words)


def _value(state: Tensor) -> Tensor:
    return _Value.apply(state, None)


autograd.register(library, "state_value", _value)


def state_value(state: Tensor) -> Tensor:
    """h = (base + hi) + lo, (n, *positions, B), of a state (3, n, *positions, B), or (1, n, *positions, B)."""
    inside = torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling()
    return _value(state) if inside else _op(state)
