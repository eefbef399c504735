"""The parameters that a step moves, and how they come back where it has not helped."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_BLOCK = 1 << 24
"""Entries of a parameter that move at a time."""


class Parameters:
    """Moved by ``rate`` times their ``grad``; with momentum by a part of the velocity, which that adds to.

    ``velocity`` is where they are to go: a move takes 1 - momentum of it, and leaves momentum of it for the next. None
    before the first move, and always without momentum.
    """

    def __init__(self, params: Sequence[Tensor], rate: float, momentum: float) -> None:
        self.params, self.rate, self.momentum = list(params), rate, momentum
        self.velocity: list[Tensor] | None = None

    def gradients_are_finite(self) -> bool:
        return all(param.grad is None or bool(param.grad.isfinite().all()) for param in self.params)

    @torch.no_grad()
    def move(self) -> None:
        """``grad`` holds the parameters as they were from then on, so that no third copy is needed."""
        if self.momentum and self.velocity is None:
            self.velocity = [torch.zeros_like(param) for param in self.params]
        for i, param in enumerate(self.params):
            if param.grad is None:
                continue
            if self.velocity is not None:
                velocity = self.velocity[i].mul_(self.momentum).add_(param.grad, alpha=self.rate)
                param.grad.copy_(param)
                param.add_(velocity, alpha=1 - self.momentum)
                continue
            rows = max(1, _BLOCK // max(1, param[:1].numel())) if param.dim() else 1
            for now, grad in zip(_rows(param, rows), _rows(param.grad, rows), strict=True):
                after = torch.add(now, grad, alpha=self.rate)
                grad.copy_(now)
                now.copy_(after)

    @torch.no_grad()
    def restore(self) -> None:
        """Take the last move back. There is no velocity after it."""
        self.velocity = None
        for param in self.params:
            if param.grad is not None:
                param.copy_(param.grad)

    def drop_gradients(self) -> None:
        for param in self.params:
            param.grad = None

    @torch.no_grad()
    def move_for_good(self, params: Sequence[Tensor]) -> None:
        """Some of them, whose gradients go; without momentum.

        Raises: RuntimeError, before one of these moves, where a gradient is not finite.
        """
        moved = [param for param in params if param.grad is not None]
        if not all(param.grad.isfinite().all() for param in moved if param.grad is not None):
            raise RuntimeError(
                "the step is not finite, and the chunks after this one have taken it: begin with a new model and a "
                "larger damping"
            )
        for param in moved:
            if param.grad is not None:
                param.add_(param.grad, alpha=self.rate)
                param.grad = None


def _rows(tensor: Tensor, count: int) -> tuple[Tensor, ...]:
    return tensor.split(count) if tensor.dim() else (tensor,)
