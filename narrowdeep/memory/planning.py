"""How much memory one training step takes, and the checkpointing that fits a budget, before anything runs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from narrowdeep.chain import schedule
from narrowdeep.chain.params import ChainShape
from narrowdeep.checks import LARGEST, check_count, is_integer
from narrowdeep.memory.sizes import format_bytes, parse_bytes
from narrowdeep.memory.step import Step, usual_segment

if TYPE_CHECKING:  # models plan by what is here, not the other way round
    from narrowdeep.modules.base import DeepNarrowBase

Optimizer = Literal["sgd", "momentum", "adam", "fused-sgd", "fused-momentum"]

OPTIMIZER_TENSORS: dict[Optimizer, int] = {"sgd": 0, "momentum": 1, "adam": 2, "fused-sgd": 0, "fused-momentum": 1}
"""Tensors of the parameters' size that an optimizer keeps. The fused ones are ``narrowdeep.optim.FusedSGD``: the
gradients of one chunk of layers exist at a time."""


class BudgetError(ValueError):
    """No checkpointing fits the budget. ``smallest`` is the least number of bytes that one does.

    Examples:
        >>> from narrowdeep import DeepNarrowMLP
        >>> from narrowdeep.memory import BudgetError, plan
        >>> try:
        ...     plan(DeepNarrowMLP(2, 1, depth=1000), batch_size=128, budget="100kB")
        ... except BudgetError as error:
        ...     print(error.smallest > 100_000)
        True
    """

    def __init__(self, budget: int, smallest: int) -> None:
        super().__init__(
            f"budget must be at least {format_bytes(smallest)} ({smallest} bytes) for this step, got "
            f"{format_bytes(budget)} ({budget} bytes)"
        )
        self.smallest = smallest


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of one training step (forward, backward, update) at its peak, in bytes by part. ``str()`` is a table.

    ``checkpoint`` is the value to give to ``model.checkpoint``.

    Examples:
        >>> from narrowdeep import DeepNarrowMLP
        >>> from narrowdeep.memory import plan
        >>> planned = plan(DeepNarrowMLP(2, 1, depth=1000), batch_size=128, optimizer="adam")
        >>> planned.parts["optimizer state"] == 2 * planned.parts["parameters"]
        True
        >>> planned.total == sum(planned.parts.values())
        True
    """

    segment: int
    """Layers between two saved states; 1 saves every state."""
    schedule: schedule.Schedule | None
    """What to save and to run again when fewer than all boundaries are kept. None: every boundary is kept."""
    snapshots: int
    """States that are kept from the forward to the backward; of more than one chunk, in each."""
    parts: dict[str, int]
    """Bytes at the peak. "parameters", "gradients", "optimizer state"; "input and output": x, f(x) and its gradient;
    "boundaries": the states saved for the backward; "backward state": what the backward carries from segment to
    segment; "workspace": what each thread needs within a segment."""
    forward_sweeps: float
    """How often a step runs the layers forward; 1 when every state is saved."""
    slow_down: float
    """Predicted time of a step over that of one that saves every state."""
    budget: int | None

    @property
    def checkpoint(self) -> int | Literal["none"] | tuple[int, int]:
        """The value that makes a model do as planned when given to its ``checkpoint``."""
        if self.segment == 1:
            return "none"
        return self.segment if self.schedule is None else (self.segment, self.snapshots)

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())

    @property
    def activations(self) -> int:
        """Bytes of what checkpointing decides: boundaries, backward state and workspace."""
        return sum(self.parts[name] for name in ("boundaries", "backward state", "workspace"))

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, lists and text, for JSON."""
        return {
            "segment": self.segment,
            "snapshots": self.snapshots,
            "schedule": None if self.schedule is None else str(self.schedule),
            "bytes": dict(self.parts),
            "activation_bytes": self.activations,
            "total_bytes": self.total,
            "forward_sweeps": self.forward_sweeps,
            "slow_down": self.slow_down,
            "budget_bytes": self.budget,
        }

    def __str__(self) -> str:
        saved = str(self.schedule or schedule.Uniform(self.segment))
        rows = [(name, format_bytes(size)) for name, size in self.parts.items()]
        rows.append(("total", format_bytes(self.total)))
        if self.budget is not None:
            rows.append(("budget", format_bytes(self.budget)))
        rows += [
            ("saved", saved),
            ("forward sweeps", f"{self.forward_sweeps:.3g}"),
            ("slow-down", f"{self.slow_down:.2f}"),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def check_optimizer(name: Any) -> Optimizer:
    """A name of ``OPTIMIZER_TENSORS``. Raises: ValueError."""
    if not isinstance(name, str) or name not in OPTIMIZER_TENSORS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZER_TENSORS)}, got {name!r}")
    return name


def check_device(name: Any) -> torch.device:
    """``torch.device(name)`` of a kind that a chain runs on. Raises: ValueError."""
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {name!r}")
    return device


def plan(
    model: DeepNarrowBase,
    *,
    batch_size: int,
    input_shape: tuple[int, ...] | None = None,
    budget: int | str | None = None,
    optimizer: str | None = None,
    schedules: bool = True,
    device: torch.device | str | None = None,
) -> MemoryPlan:
    """The memory of one training step, and the checkpointing that fits ``budget`` at the least slow-down.

    Checkpointing trades memory for running the chain forward again: every state saved (nothing runs twice), or one
    state in ``segment`` layers, a segment's own states being recomputed where they are used (everything runs twice).
    Where that does not fit, or takes longer, fewer boundaries than segments, under a binomial schedule (Griewank and
    Walther, ACM TOMS 26(1), 2000): what lies between two of them is run more often.

    Arguments:
        model: a DeepNarrowMLP or DeepNarrowCNN, which is only read.
        batch_size: samples a step, at least 1.
        input_shape: of one sample. (in,) for an MLP, which needs none; (C, H, W) for a CNN.
        budget: bytes of the whole step, parameters included: an int, or text such as "2GiB" or "500MB". None plans
            what the model's own ``checkpoint`` and ``budget`` do.
        optimizer: "sgd", "momentum" or "adam": what keeps 0, 1 or 2 tensors of the parameters' size; "fused-sgd" or
            "fused-momentum": ``narrowdeep.optim.FusedSGD``, with which a model of several chunks never has all
            gradients at once. None: the model's own ``optimizer``.
        schedules: whether binomial schedules may be chosen. A step that is compiled, or in a transform of torch.func,
            runs none and keeps every boundary instead: a plan for it needs False.
        device: where the step will run, which need not be there. None: where the parameters are; those on the meta
            device, which take no memory, stand for the CPU.

    Returns: a MemoryPlan; of those that fit, the fastest, and of equally fast ones the one whose segment is nearest
        to what a model without a budget takes. It counts tensors and the engine's own memory, not the interpreter and
        its libraries.

    Raises: TypeError or ValueError naming the argument, the rule and the value; BudgetError (a ValueError), with the
        smallest budget that can be met, when this one cannot.

    Examples:
        >>> from narrowdeep import DeepNarrowMLP
        >>> from narrowdeep.memory import plan
        >>> model = DeepNarrowMLP(784, 10, depth=12)
        >>> plan(model, batch_size=4096, budget="300MB").total <= 300_000_000
        True
        >>> million = DeepNarrowMLP(2, 1, depth=1_000_000, device="meta")  # nothing of its size is allocated
        >>> plan(million, batch_size=128, device="cuda").checkpoint
        1000
    """
    shape = _shape(model, batch_size, input_shape, device)
    step = Step(shape)
    kind = model.optimizer if optimizer is None else check_optimizer(optimizer)
    wanted = model.budget if budget is None else parse_bytes(budget)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    fixed = {
        "parameters": size,
        "gradients": _gradients(model, fused=kind.startswith("fused")),
        "optimizer state": OPTIMIZER_TENSORS[kind] * size,
        "input and output": (shape.inputs * shape.positions + 2 * shape.outputs) * shape.batch * shape.dtype.itemsize,
    }

    if wanted is None:
        with torch.enable_grad():  # a training step, whatever the caller is doing
            segment = model.segment(shape.batch * shape.positions)
        snapshots = step.segments(segment)
        if isinstance(model.checkpoint, tuple):
            segment, most = model.checkpoint
            snapshots = min(most, step.segments(segment))
        return _finish(step, fixed, segment, snapshots, None)
    kept = sum(fixed.values())
    found, least = step.choices(wanted - kept, schedules)
    if not found:
        raise BudgetError(wanted, kept + least)
    preferred = usual_segment(model.depth)
    best = min(found, key=lambda c: (step.time(*c), abs(math.log2(c[0] / preferred))))
    return _finish(step, fixed, *best, wanted)


def _gradients(model: DeepNarrowBase, *, fused: bool) -> int:
    """Bytes of the gradients that exist at once. A graph node computes all gradients of its parameters or none."""

    def size(params: Iterable[torch.Tensor]) -> int:
        params = list(params)
        return sum(p.numel() * p.element_size() for p in params) if any(p.requires_grad for p in params) else 0

    if not fused or model.chunks == 1:
        return size(model.parameters())
    ends = [(getattr(model, f"{end}_weight"), getattr(model, f"{end}_bias")) for end in ("first", "last")]
    return max(size(node) for node in (*ends, *zip(model.hidden_weight, model.hidden_bias, strict=True)))


def _shape(
    model: DeepNarrowBase, batch_size: int, input_shape: tuple[int, ...] | None, device: torch.device | str | None
) -> ChainShape:
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "identity_part"):
        raise TypeError(f"model must be a DeepNarrowMLP or a DeepNarrowCNN, got {type(model).__name__}")
    batch_size = check_count("batch_size", batch_size, 1)
    weight, last_weight = model.first_weight, model.last_weight
    inputs, image = weight.shape[1], weight.dim() == 4
    shape = (inputs,) if input_shape is None and not image else input_shape
    expected = f"({inputs}, H, W)" if image else f"({inputs},)"
    if (
        not isinstance(shape, (tuple, list))
        or len(shape) != (3 if image else 1)
        or shape[0] != inputs
        or any(not is_integer(d) or not 1 <= d <= LARGEST for d in shape)
    ):
        raise ValueError(f"input_shape must be {expected}, got {input_shape}")
    return ChainShape(
        batch=batch_size,
        inputs=inputs,
        outputs=last_weight.shape[0],
        width=model.width,
        chunks=tuple(len(span.layers) for span in model.spans()[1:-1]),
        image=tuple(map(int, shape[1:])),
        kernel_size=weight.shape[-1] if image else 1,
        offset=model.form == "offset",
        trained=any(any(span.trainable) for span in model.spans()),
        dtype=weight.dtype,
        device=weight.device if device is None else check_device(device),
    )


def _finish(step: Step, fixed: dict[str, int], segment: int, snapshots: int, budget: int | None) -> MemoryPlan:
    return MemoryPlan(
        segment=segment,
        schedule=schedule.Binomial(segment, snapshots) if step.scheduled(segment, snapshots) else None,
        snapshots=step.shape.layers + 1 if segment == 1 else snapshots,
        parts=fixed | step.activations(segment, snapshots),
        forward_sweeps=step.sweeps(segment, snapshots),
        slow_down=step.time(segment, snapshots) / step.time(1, 0),
        budget=budget,
    )
