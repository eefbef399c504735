"""The first Gauss-Newton step of a network that is at its initialisation: in closed form, without a backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from narrowdeep.distributed.ranks import Ranks
from narrowdeep.ntk.features import InitialFeatures, OutputGradients
from narrowdeep.ntk.network import Narrow, find
from narrowdeep.optim.parameters import Parameters


@dataclass
class InitialStep:
    """There every output is 0, and J^T v is the features times v, in the rows of the right units alone."""

    model: Narrow
    features: InitialFeatures
    rate: float
    adaptive: bool
    """Whether it may be taken back, for which it keeps the rows that it moves."""
    _before: tuple[tuple[Tensor, Tensor], ...] = ()
    """Rows of the parameters, and what was in them."""

    @classmethod
    def of(
        cls, model: nn.Module, features: InitialFeatures, params: Parameters, adaptive: bool, *samples: Tensor
    ) -> InitialStep | None:
        """None where ``model`` is not what the features are of, where a state of ``samples`` overflows, and where
        something else than the parameters may see their gradients, or other outputs than the network's come out."""
        if params.momentum or any(isinstance(part, DistributedDataParallel) for part in model.modules()):
            return None
        try:
            ours = find(model)
        except ValueError:  # hooks
            return None
        if ours is None or ours.family is None:
            return None
        trained = [p for span in ours.model.spans() for p in (span.weight, span.bias) if p.requires_grad]
        if {id(p) for p in trained} != {id(p) for p in params.params}:
            return None
        hooked = any(p._backward_hooks or (p.numel() and p._post_accumulate_grad_hooks) for p in trained)
        if hooked or not features.are_of(model, ours) or not all(map(features.are_finite, samples)):
            return None
        return cls(ours.model, features, params.rate, adaptive)

    def outputs(self, x: Tensor) -> Tensor:
        """(N, out), all 0."""
        return x.new_zeros(len(x), self.features.outputs)

    @torch.no_grad()
    def move(self, x: Tensor, coefficients: Tensor, ranks: Ranks, advance: Callable[[float], None]) -> None:
        """Parameters by ``rate J^T coefficients``.

        Raises: RuntimeError, before any moves, where that is not finite.
        """
        share = ranks.share(len(x))
        found = self.features.output_gradients(x[share], coefficients[share], advance)
        ranks.sum_(*found)
        dtype = self.model.first_weight.dtype
        changes = OutputGradients(*((self.rate * part).to(dtype) for part in found))
        if not all(bool(part.isfinite().all()) for part in changes):
            raise RuntimeError("the step is not finite: the model is as it was (take a larger damping)")
        moves = list(self._moves(changes))
        if self.adaptive:
            self._before = tuple((rows, rows.clone()) for rows, _, whole in moves if whole)
        for rows, change, _ in moves:
            rows += change

    def _moves(self, changes: OutputGradients) -> Iterator[tuple[Tensor, Tensor, bool]]:
        """(rows of a parameter, what is added, whether it is all of them and not the middle unit's column alone)."""
        inputs, done = self.model.first_weight.shape[1], 0
        for span in self.model.spans():
            last = span.layers.stop == self.model.depth
            stacked = not last and span.layers.start > 0
            right = (slice(None),) * stacked + (slice(None) if last else slice(inputs + 1, None),)
            if span.bias.requires_grad:
                yield span.bias[right], changes.bias, True
            if not span.weight.requires_grad:
                continue
            rows = span.weight[right]  # (layers, out, n, *tap), or of one layer
            if span.layers.start == 0:
                yield rows, changes.first.reshape(rows.shape), True
                continue
            yield rows, changes.others.reshape(rows.shape[stacked:]), True
            count = len(span.layers)
            column = rows[:, :, inputs] if stacked else rows[None, :, inputs]
            yield column, changes.middle[done : done + count].reshape(column.shape), False
            done += count

    @torch.no_grad()
    def restore(self) -> None:
        """The parameters as they were, bit for bit."""
        for rows, before in self._before:
            rows.copy_(before)
