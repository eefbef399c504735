"""A pass through a chunked narrow model that never holds the gradient of more than one chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from narrowdeep.chain.span import in_spans, span
from narrowdeep.ntk.network import Narrow
from narrowdeep.ops.params import Affine, ChainParams, ChainSettings


class ChunkwisePass:
    """Forward over all samples, which keeps a state between two chunks; then backward, which moves chunk after chunk.

    The gradient of a chunk is complete, over all batches of samples, before the next one's is begun: the numbers are
    those of a backward of the whole model.
    """

    def __init__(self, model: Narrow, samples: Tensor, batch_size: int) -> None:
        self._model, self._batches = model, samples.split(batch_size)
        self._inputs: list[list[Tensor]] = []
        """Of each chunk, a state for each batch."""

    def _chunks(self) -> Iterator[tuple[ChainParams, ChainSettings]]:
        model = self._model
        first, *hidden, last = (Affine(part.weight, part.bias) for part in model.spans())
        return in_spans(first, hidden, last, model.scale, model.form == "offset", last.weight.shape[0])

    def outputs(self, advance: Callable[[float], None]) -> Tensor:
        """(N, out)."""
        count = self._model.chunks
        states = list(self._batches)
        with torch.no_grad():
            for params, settings in self._chunks():
                self._inputs.append(states)
                states = []
                for state, batch in zip(self._inputs[-1], self._batches, strict=True):
                    states.append(span(self._model._family, state, params, settings, 0))
                    advance(len(batch) / count)
        return torch.cat(states)

    def backward(
        self, gradient: Tensor, move: Callable[[list[Tensor]], None], advance: Callable[[float], None]
    ) -> None:
        """``gradient`` (N, out) is that of the outputs; ``move`` gets the parameters of a chunk, and drops ``grad``."""
        batches, model = self._batches, self._model
        rows = list(gradient.to(model.last_weight.dtype).split(len(batches[0])))
        positions = batches[0][:, 0].numel()
        chunks = list(self._chunks())
        trained = [any(p is not None and p.requires_grad for p in params.flat()) for params, _ in chunks]
        for number, (params, settings) in reversed(list(enumerate(chunks))):
            states = self._inputs.pop()
            if not any(trained[: number + 1]):  # what is frozen at the begin needs no gradient
                advance(sum(map(len, batches)) / model.chunks)
                continue
            for i, batch in enumerate(batches):
                state = states.pop(0).detach().requires_grad_(any(trained[:number]))
                with torch.enable_grad():
                    out = span(model._family, state, params, settings, model.segment(positions))
                    out.backward(rows[i])
                if state.grad is not None:
                    rows[i] = state.grad
                advance(len(batch) / model.chunks)
            move([param for param in params.flat() if param is not None])
