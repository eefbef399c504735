"""The convolution chain one layer at a time: a convolution of torch's a layer (see ``narrowdeep.ops.layered``)."""

from __future__ import annotations

from functools import partial

from torch import Tensor
from torch.nn.functional import conv2d, conv_transpose2d
from torch.nn.grad import conv2d_weight

from narrowdeep.ops import layered, layered_second


def _images(state: Tensor) -> Tensor:
    """(n, H, W, B) -> (B, n, H, W)."""
    return state.movedim(-1, 0).contiguous()


def _apply(weight: Tensor, h: Tensor, out: Tensor) -> Tensor:
    return out.copy_(conv2d(_images(h), weight, padding=weight.shape[-1] // 2).movedim(0, -1))


def _transpose(weight: Tensor, g: Tensor, out: Tensor) -> Tensor:
    return out.copy_(conv_transpose2d(_images(g), weight, padding=weight.shape[-1] // 2).movedim(0, -1))


def _weight_grad(g: Tensor, h: Tensor, out: Tensor) -> Tensor:
    if g.shape[-1] == 0:
        return out.zero_()
    return out.copy_(conv2d_weight(_images(h), out.shape, _images(g), padding=out.shape[-1] // 2))


CONVOLUTION = layered.Layer(apply=_apply, transpose=_transpose, weight_grad=_weight_grad)

cnn_forward = partial(layered.forward, CONVOLUTION)
cnn_backward = partial(layered.backward, CONVOLUTION)
cnn_jvp = partial(layered.jvp, CONVOLUTION)
cnn_backward_jvp = partial(layered_second.backward_jvp, CONVOLUTION)
