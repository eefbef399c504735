"""What a network keeps for its backward: as it is told, or as a plan has it."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from narrowdeep.chain.params import LayerSpan
from narrowdeep.checks import check_count, is_integer, shown
from narrowdeep.memory.planning import Optimizer, check_optimizer, plan
from narrowdeep.memory.sizes import parse_bytes
from narrowdeep.memory.step import auto_segment

Checkpoint = int | Literal["auto", "none"] | tuple[int, int]

NO_TORCHSCRIPT = (
    "TorchScript takes no narrow networks: torch.export.export(model, (x,)) does, and narrowdeep.export turns what it "
    "gives into ONNX"
)


class Checkpointing(nn.Module):
    """``checkpoint``, ``budget`` and ``optimizer`` of a network, and what they mean for a call."""

    depth: int
    _inputs: int
    _outputs: int
    _tap: tuple[int, ...]
    """What follows (rows, columns) in a weight: () for a linear layer, (f, f) for a convolution."""
    first_weight: nn.Parameter
    _checkpoint: Checkpoint = "auto"
    _budget: int | None = None
    _optimizer: Optimizer = "sgd"
    _plan: tuple[Any, Any] | None = None

    def spans(self) -> list[LayerSpan]:
        """Which layers are stored in which parameters."""
        raise NotImplementedError

    @property
    def checkpoint(self) -> Checkpoint:
        """What the backward keeps: "none" every hidden state, an int one state every so many layers, a pair (segment,
        snapshots) at most so many states, one every ``segment`` layers or fewer; "auto" chooses, within ``budget``."""
        return self._checkpoint

    @checkpoint.setter
    def checkpoint(self, value: Any) -> None:
        chosen: Checkpoint
        if isinstance(value, (tuple, list)):
            if len(value) != 2:
                raise ValueError(f"checkpoint must be a pair (segment, snapshots), got {value!r}")
            chosen = (check_count("checkpoint[0]", value[0], 1), check_count("checkpoint[1]", value[1], 1))
        elif is_integer(value):
            if value < 1:
                raise ValueError(f"checkpoint must be at least 1 layer a segment, got {shown(int(value))}")
            chosen = check_count("checkpoint", value, 1)
        elif not isinstance(value, str):
            raise TypeError(f"checkpoint must be 'auto', 'none' or an int, got {value!r}")
        elif value == "auto" or value == "none":
            chosen = value  # type: ignore[assignment]
        else:
            raise ValueError(f"checkpoint must be 'auto', 'none' or an int, got {value!r}")
        if self._budget is not None and chosen != "auto":
            raise ValueError(
                f"checkpoint must be 'auto' while budget is {self._budget}, got {value!r}: set budget to None first"
            )
        self._checkpoint = chosen

    @property
    def budget(self) -> int | None:
        """Bytes that a training step may take under ``checkpoint="auto"``; None: no limit. May be set to text."""
        return self._budget

    @budget.setter
    def budget(self, value: int | str | None) -> None:
        parsed = None if value is None else parse_bytes(value)
        if parsed is not None and self._checkpoint != "auto":
            raise ValueError(f"budget needs checkpoint='auto', got checkpoint={self._checkpoint!r}")
        self._budget = parsed

    @property
    def optimizer(self) -> Optimizer:
        """What updates the parameters, for ``budget``, which counts what it keeps: as ``narrowdeep.memory.plan``."""
        return self._optimizer

    @optimizer.setter
    def optimizer(self, value: str) -> None:
        self._optimizer = check_optimizer(value)

    def segment(self, positions: int) -> int:
        """Layers between saved states for a call on ``positions`` (batch size, times H W for images); 0 saves none.

        Under ``torch.no_grad()`` nothing is saved. ``checkpoint="auto"`` is the plan without a budget
        (``narrowdeep.memory``): every state of a network so wide that running its layers again costs more than keeping
        their states, as eager layers do, while all of them are at most 2**27 numbers, or as many as the parameters and
        their gradients; otherwise one in 64 layers, or in the square root of the depth.
        """
        if not torch.is_grad_enabled():
            return 0
        if self._checkpoint == "none":
            return 1
        if isinstance(self._checkpoint, tuple):
            return min(self._checkpoint[0], self.depth)
        return self._auto_segment(positions) if self._checkpoint == "auto" else min(self._checkpoint, self.depth)

    def _checkpointing(self, x: Any, sample_dims: int) -> tuple[int, int | None]:
        """(segment, snapshots) for a call on ``x``, whose last ``sample_dims`` dimensions are one sample.

        Raises: BudgetError, before anything runs, where ``budget`` cannot be met; NotImplementedError in
            torch.jit.trace.
        """
        if torch.jit.is_tracing():
            raise NotImplementedError(NO_TORCHSCRIPT)
        if not isinstance(x, Tensor) or x.dim() < sample_dims or x.numel() == 0:
            return self.segment(0), None  # the chain says what is wrong, or has nothing to do
        positions = x.numel() // self._inputs
        if not torch.is_grad_enabled():
            return self.segment(positions), None
        chosen = self._checkpoint
        if self._budget is not None and x.shape[-sample_dims] == self._inputs:
            planned = self._planned
            if torch.compiler.is_compiling():  # not a decorator: it would load the compiler with this module
                planned = torch.compiler.disable(
                    planned, reason="a budget is planned for the batch at hand: compile with the plan's checkpoint"
                )
            chosen = planned(x, sample_dims)
        if isinstance(chosen, tuple):
            return min(chosen[0], self.depth), chosen[1]
        return (1 if chosen == "none" else self.segment(positions) if chosen == "auto" else chosen), None

    def _planned(self, x: Tensor, sample_dims: int) -> Any:
        shape = tuple(x.shape[x.dim() - sample_dims :])
        batch = x.numel() // math.prod(shape)
        frozen = not any(any(span.trainable) for span in self.spans())
        weight = self.first_weight
        schedules = not torch._C._are_functorch_transforms_active() and forward_ad._current_level < 0
        settings = self._budget, self._optimizer, schedules
        key = (batch, shape, settings, frozen, weight.dtype, weight.device, torch.get_num_threads())
        if self._plan is None or self._plan[0] != key:  # one shape after another is rare, and a plan takes milliseconds
            model: Any = self
            self._plan = key, plan(model, batch_size=batch, input_shape=shape, schedules=schedules).checkpoint
        return self._plan[1]

    def _auto_segment(self, positions: int) -> int:
        # No rule on the batch size while compiling: it would be a guard, and forbid a dynamic batch.
        batch = None if torch.compiler.is_compiling() else positions
        return auto_segment(self.depth, self._inputs, self._outputs, math.prod(self._tap), batch)
