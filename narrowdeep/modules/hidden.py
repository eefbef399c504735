"""The hidden states of a model, in one pass, none kept but those that are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

from narrowdeep.chain.span import span
from narrowdeep.checks import check_count
from narrowdeep.ops.params import Affine, ChainParams, ChainSettings
from narrowdeep.ops.value import state_value


def check_layers(layers: Iterable[int], depth: int) -> list[int]:
    """``layers`` as ints. Raises: TypeError or ValueError naming the argument, the rule and the value."""
    if isinstance(layers, (str, bytes)) or not isinstance(layers, Iterable):
        raise TypeError(f"layers must be a list or range of layer numbers, got {layers!r}")
    return [check_count(f"layers[{i}]", layer, 1, depth - 1) for i, layer in enumerate(layers)]


def _spans(first: Affine, chunks: Sequence[Affine], stops: Sequence[int]) -> Iterator[tuple[int, ChainParams]]:
    """(number of the state it ends with, span): the chunks up to the last of ``stops``, cut at each of them besides.

    The first layer stands in a span of its own where state 0 is one of them, or nothing else is left.
    """
    none = Affine(chunks[0].weight[:0], chunks[0].bias[:0])
    begin = 0
    head: Affine | None = first
    if stops[0] == 0:
        yield 0, ChainParams(head, none, None)
        head = None
    for chunk in chunks:
        layers = chunk.weight.shape[0]
        cuts = [*(stop - begin for stop in stops if begin < stop < begin + layers), layers]
        done = 0
        for cut in cuts:
            if begin + done >= stops[-1]:
                return
            yield begin + cut, ChainParams(head, Affine(chunk.weight[done:cut], chunk.bias[done:cut]), None)
            head, done = None, cut
        begin += layers


def hidden_states(
    family: str, x: Tensor, params: tuple[Any, ...], layers: Sequence[int], scale: float, offset: bool, segment: int
) -> list[Tensor]:
    """h after each of ``layers``, (B, n, *positions); ``x`` is (B, in, *positions), ``layers`` not empty."""
    first_weight, first_bias, *hidden, last_weight, _ = params
    weights, biases = (list(p) if isinstance(p, (list, tuple)) else [p] for p in hidden)
    chunks = [Affine(*pair) for pair in zip(weights, biases, strict=True)]
    wanted = sorted({layer - 1 for layer in layers})  # states are numbered from 0
    found: dict[int, Tensor] = {}
    state, start = x, 0
    for end, part in _spans(Affine(first_weight, first_bias), chunks, wanted):
        state = span(family, state, part, ChainSettings(scale, offset, last_weight.shape[0], start), segment)
        start = end
        if end in wanted:
            found[end] = state_value(state).movedim(-1, 0)
    return [found[layer - 1] for layer in layers]
