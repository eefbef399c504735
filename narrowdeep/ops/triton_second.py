"""What starts the Triton kernels of a second derivative: the tangent of a span's backward (``triton_tangents.py``)."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from narrowdeep.ops import layered_second
from narrowdeep.ops.params import BackwardJvpArgs
from narrowdeep.ops.triton_chain import Family, initial_words, layers_a_group, samples, span, words
from narrowdeep.ops.triton_common import empty
from narrowdeep.ops.triton_tangents import chain_backward_jvp, chain_tangents


def backward_jvp(family: Family, *args: Any) -> tuple[Tensor, ...]:
    """Tangents of a span's gradients; arguments as ``narrowdeep.ops.chain`` has them.

    Keeps sqrt(layers) states and tangents; a group of segments has h, T, G and G' of its layers beside them.
    """
    grad, grad_t, input, params, tangents, settings, need_input, need_params = BackwardJvpArgs.of(args)
    (scale, offset, outputs, _), (first, hidden, last) = settings, params
    if not family.supported("backward_jvp", samples(input, first), hidden.weight):
        return layered_second.backward_jvp(family.layer, *args)
    if grad_t is None:
        grad_t = torch.zeros_like(grad)
    grads = [input.new_empty(0 if p is None or not need_params else p.shape) for p in params.flat()]
    these = span(family, input, params, settings)
    layers, weight = these.layers, these.hidden[0]
    hidden_t, has = these.tangents(tangents)
    state, tangent = initial_words(family, input, first, tangents.first, scale, offset, outputs)
    shape = state[2].shape

    segment = max(2, math.isqrt(layers))
    kept = empty(grad, triton.cdiv(layers, segment) - 1, 4 if offset else 2, *shape)

    def through(begin: int, count: int, parallel: int, store: bool, h: Tensor, t: Tensor) -> None:
        """``count`` segments, from each of ``parallel`` ones that begin with number ``begin``."""
        tensors = (*state, *tangent, *these.hidden, *hidden_t, kept, h, t)
        numbers = (layers, segment, these.phase, begin, count)
        these.run(chain_tangents, "tangents", tensors, numbers, segments=parallel, STORE=store, **has)

    if len(kept):
        through(0, len(kept), 1, False, kept, kept)
    step = layers_a_group(grad.new_empty(2, *shape, device="meta"), segment, grad.device)
    g, g_t = grad, grad_t
    for begin in range((layers - 1) // step * step, -1, -step):
        end = min(begin + step, layers)
        h, t = (empty(grad, end - begin + (end == layers), *shape) for _ in range(2))
        through(begin // segment, 1, triton.cdiv(end - begin, segment), True, h, t)
        masked = end < layers or last is None
        if masked or last is None:
            before = *words(g), *words(g_t)
        else:
            ends = grads[4:] if need_params else []
            top = grad, grad_t, h[-1], t[-1], last.weight, tangents, offset, ends
            above, above_t = layered_second.last_gradient_tangents(family.layer, *top)
            before = *words(above), *words(above_t)
        g, g_t = (empty(grad, these.words, *shape) for _ in range(2))
        full, full_t = (empty(grad, end - begin, *shape) if need_params else h for _ in range(2))
        these.run(
            chain_backward_jvp,
            "backward_jvp",
            (*before, weight, hidden_t[0], h, g, g_t, full, full_t),
            (layers, these.phase, begin, end, int(masked)),
            HAS_WEIGHT_T=has["HAS_WEIGHT_T"],
            STORE=need_params,
        )
        if need_params:  # G T^T + G' h^T; the bias's is G' alone
            weight_grad, bias_grad = grads[2][begin:end], grads[3][begin:end]
            other = torch.empty_like(weight_grad)
            family.sum_weight_gradients(full, t[: end - begin], other, bias_grad)
            family.sum_weight_gradients(full_t, h[: end - begin], weight_grad, bias_grad)
            weight_grad.add_(other)
    if first is None:
        return g_t if need_input else input.new_empty(0), *grads
    full, full_t = ((w[0] + w[1]) + w[2] if offset else w[0] for w in (g, g_t))
    bottom = full, full_t, input, first.weight, tangents, grads[:2] if need_params else [], scale, offset, need_input
    return layered_second.first_gradient_tangents(family.layer, *bottom), *grads
