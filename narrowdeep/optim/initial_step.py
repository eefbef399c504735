"""The first Gauss-Newton step of a network that is at its initialisation: in closed form, without a backward."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from narrowdeep.distributed.ranks import Ranks
from narrowdeep.ntk.features import InitialFeatures, OutputGradients
from narrowdeep.ntk.network import Narrow, Ours
from narrowdeep.optim.parameters import Parameters


@dataclass
class InitialStep:
    """There every output is 0, and J^T v is the features times v, in the rows of the right units alone."""

    model: Narrow
    features: InitialFeatures
    rate: float
    _before: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Rows of the parameters, and what was in them."""

    @classmethod
    def of(cls, ours: Ours, features: InitialFeatures, params: Parameters) -> InitialStep | None:
        """None where the model is not what ``features`` are of, or where a hook or a parametrization sees gradients."""
        spans = ours.model.spans()
        trained = [p for span in spans for p in (span.weight, span.bias) if p.requires_grad]
        if params.momentum or {id(p) for p in trained} != {id(p) for p in params.params}:
            return None
        hooked = any(p._backward_hooks or (p.numel() and p._post_accumulate_grad_hooks) for p in trained)
        if hooked or not features.are_of(ours.model, ours):
            return None
        return cls(ours.model, features, params.rate)

    def outputs(self, x: Tensor) -> Tensor:
        """(N, out), all 0.

        Raises: ValueError for x that is not finite.
        """
        if not x.isfinite().all():
            raise ValueError("model must have finite outputs at x, got NaN or infinity")
        return x.new_zeros(len(x), self.features.outputs)

    @torch.no_grad()
    def move(self, x: Tensor, coefficients: Tensor, ranks: Ranks) -> None:
        """Parameters by ``rate J^T coefficients``.

        Raises: RuntimeError, before any moves, where that is not finite.
        """
        share = ranks.share(len(x))
        found = self.features.output_gradients(x[share], coefficients[share])
        ranks.sum_(*found)
        dtype = self.model.first_weight.dtype
        first, others, middle, bias = changes = OutputGradients(*((self.rate * part).to(dtype) for part in found))
        if not all(bool(part.isfinite().all()) for part in changes):
            raise RuntimeError("the step is not finite: the model is as it was (take a larger damping)")
        inputs, done = self.model.first_weight.shape[1], 0
        for span in self.model.spans():
            last = span.layers.stop == self.model.depth
            stacked = not last and span.layers.start > 0
            right = (slice(None),) * stacked + (slice(None) if last else slice(inputs + 1, None),)
            if span.bias.requires_grad:
                self._add(span.bias[right], bias)
            if not span.weight.requires_grad:
                continue
            rows = span.weight[right]  # (layers, out, n, *tap), or of one layer
            if span.layers.start == 0:
                self._add(rows, first.reshape(rows.shape))
                continue
            self._add(rows, others.reshape(rows.shape[stacked:]))
            count = len(span.layers)
            column = rows[:, :, inputs] if stacked else rows[None, :, inputs]
            column += middle[done : done + count].reshape(column.shape)
            done += count

    def _add(self, rows: Tensor, change: Tensor) -> None:
        self._before.append((rows, rows.clone()))
        rows += change

    @torch.no_grad()
    def restore(self) -> None:
        """The parameters as they were, bit for bit."""
        for rows, before in self._before:
            rows.copy_(before)
