"""The hidden states of a model, in one pass, none kept but those that are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from narrowdeep import parts
from narrowdeep.checks import check_count
from narrowdeep.ops import layered


class _Value(torch.autograd.Function):
    """forward(x, state, outputs, scale, offset) -> the whole hidden state h, (n, *positions, B).

    A state's gradient is that of its pre-activation (``narrowdeep.parts``), so h's passes the ReLU here.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, state: Tensor, outputs: int, scale: float, offset: bool) -> Tensor:
        value = layered.entered(state, x.movedim(0, -1), outputs, scale, offset)
        h = value.full(out=torch.empty_like(value.a))
        ctx.save_for_backward(h)
        ctx.offset = offset
        return h

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (h,) = ctx.saved_tensors
        g = grad.masked_fill(h <= 0, 0)
        return None, torch.stack((torch.zeros_like(g), g) if ctx.offset else (g,)), None, None, None


def check_layers(layers: Iterable[int], depth: int) -> list[int]:
    """``layers`` as ints. Raises: TypeError or ValueError naming the argument, the rule and the value."""
    if isinstance(layers, (str, bytes)) or not isinstance(layers, Iterable):
        raise TypeError(f"layers must be a list or range of layer numbers, got {layers!r}")
    return [check_count(f"layers[{i}]", layer, 1, depth - 1) for i, layer in enumerate(layers)]


def _spans(
    weights: Sequence[Tensor], biases: Sequence[Tensor], stops: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The hidden layers of the chunks, cut at ``stops`` (state numbers) besides, up to the last of them."""
    first = 1
    for weight, bias in zip(weights, biases, strict=True):
        end = first + weight.shape[0]
        cuts = [first, *(s for s in stops if first < s < end), end]
        sizes = [b - a for a, b in pairwise(cuts)]
        for begin, pair in zip(cuts, zip(weight.split(sizes), bias.split(sizes), strict=True), strict=False):
            if begin >= stops[-1]:
                return
            yield pair
        first = end


def hidden_states(
    family: str,
    x: Tensor,
    params: tuple[Any, ...],
    layers: Sequence[int],
    scale: float,
    offset: bool,
    segment: int,
) -> list[Tensor]:
    """h after each of ``layers``, (B, n, *positions); ``x`` is (B, in, *positions), ``layers`` not empty."""
    first_weight, first_bias, hidden_weight, hidden_bias, last_weight, _ = params
    chunks = [list(p) if isinstance(p, (list, tuple)) else [p] for p in (hidden_weight, hidden_bias)]
    outputs, wanted = last_weight.shape[0], sorted(set(layers))
    found: dict[int, Tensor] = {}
    skip, state = parts._First.apply(family, x, first_weight, first_bias, outputs, scale, offset)
    number = 1
    spans = _spans(chunks[0], chunks[1], wanted)
    while True:
        if number in wanted:
            found[number] = _Value.apply(x, state, outputs, scale, offset).movedim(-1, 0)
        if number == wanted[-1]:
            return [found[layer] for layer in layers]
        weight, bias = next(spans)
        skip, state = parts._Hidden.apply(family, x, skip, state, weight, bias, scale, offset, number, segment)
        number += weight.shape[0]
