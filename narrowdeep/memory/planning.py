"""How much memory one training step takes, and the checkpointing that fits a budget, before anything runs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from narrowdeep.chain import schedule
from narrowdeep.chain.params import ChainShape
from narrowdeep.checks import LARGEST, check_count, is_integer, shown
from narrowdeep.ops import engine, triton_dispatch
from narrowdeep.ops.reference import saved_shape

if TYPE_CHECKING:  # models plan by what is here, not the other way round
    from narrowdeep.modules.base import DeepNarrowBase

AUTO_SEGMENT = 64
"""Layers between saved states under ``checkpoint="auto"`` when not every state is saved."""

OPTIMIZER_TENSORS = {"sgd": 0, "momentum": 1, "adam": 2, "fused-sgd": 0, "fused-momentum": 1}
"""Tensors of the parameters' size that an optimizer keeps. The fused ones are ``narrowdeep.optim.FusedSGD``: the
gradients of one chunk of layers exist at a time."""

BACKWARD_COST = 2.0
"""What the backward of a layer costs when its input is at hand, in forwards of that layer: two products against one."""

MOST_SEGMENTS = 1000
"""Of a schedule whose actions are gone through to see what it takes; longer ones take as much."""

CACHE_BYTES = 1 << 20
"""Of a thread of the CPU. States that do not fit are written to memory and read back."""

STATE_COST, UNIT_COST = 148, 12
"""In multiply-adds: what it costs to write one number of a state beyond the cache and to read it back, and to compute
it besides its products. Measured with two threads: saving every state took 1.7 times as long as one in 250 layers with
3 channels and filters of 3x3 (27 products a number), 3 times as one in 64 with MLPs of width 4, as long at 75."""

_UNITS = {"": 1, **{f"{prefix}B": 1000**i for i, prefix in enumerate(("", "k", "M", "G", "T"))}}
_UNITS |= {f"{prefix}iB": 1024**i for i, prefix in enumerate(("K", "M", "G", "T"), 1)}
_UNITS_BY_LOWER = {unit.lower(): factor for unit, factor in _UNITS.items()}


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


def parse_bytes(value: int | str, name: str = "budget") -> int:
    """Bytes from an int, or from text such as "2GiB" or "1.5 MB": units of 1000 (kB, MB, ...) or of 1024 (KiB, ...).

    Raises: TypeError for other types; ValueError for other text and for what is below 1 byte or not finite.
    """
    if not isinstance(value, str) and not is_integer(value):
        raise TypeError(f'{name} must be bytes as an int, or text such as "2GiB" or "500MB", got {value!r}')
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:e\+?\d+)?)\s*([a-z]*)\s*", value.lower())
        if match is None or match[2] not in _UNITS_BY_LOWER or len(value) > 60 or not math.isfinite(float(match[1])):
            units = ", ".join(unit for unit in _UNITS if unit)
            raise ValueError(f"{name} must be a number and one of the units {units}, or bytes, got {value!r}")
        number = int(match[1]) if match[1].isdigit() else float(match[1])
        parsed = int(number * _UNITS_BY_LOWER[match[2]])
    else:
        parsed = int(value)
    if parsed < 1:
        raise ValueError(f"{name} must be at least 1 byte, got {shown(value)}")
    if parsed > LARGEST:
        raise ValueError(f"{name} must be at most {LARGEST} bytes, got {shown(value)}")
    return parsed


def format_bytes(count: int) -> str:
    """Three digits and a binary unit: 1536 is "1.50 KiB"."""
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    digits = 0 if unit == "B" or size >= 1000 else 3 - len(str(int(size)))
    return f"{size:.{digits}f} {unit}"


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


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


class _Step:
    """One training step of a chain, on the device where its parameters are."""

    def __init__(self, shape: ChainShape) -> None:
        self.shape, self.threads = shape, torch.get_num_threads()
        self.cuda = shape.device.type == "cuda"
        self.words = 2 if shape.offset else 1
        """Of a checkpoint: hi and lo, or h."""
        self.border = 3 if shape.offset else 1
        """Words of a state between spans: base, hi and lo, or h."""

    def segments(self, segment: int) -> int:
        """Of the longest chunk."""
        return max(1, _ceil(self.shape.longest, segment))

    def scheduled(self, segment: int, snapshots: int) -> bool:
        """Whether fewer states are kept than there are segments."""
        return segment > 1 and snapshots < self.segments(segment)

    def _boundaries(self, segment: int, snapshots: int) -> int:
        """Words of states that are kept for the backward: those that spans save, and those between them."""
        chunks = self.shape.chunks
        between = (len(chunks) - 1) * self.border
        if self.scheduled(segment, snapshots):  # the first of a chunk is its input
            return between + sum(self.border * (min(snapshots, _ceil(m, segment)) - 1) for m in chunks)
        ends = [(i == 0, i == len(chunks) - 1) for i in range(len(chunks))]
        saved = [saved_shape(m, (), self.shape.offset, segment, *end) for m, end in zip(chunks, ends, strict=True)]
        return between + sum(rows * words for rows, words in saved)

    def activations(self, segment: int, snapshots: int) -> dict[str, int]:
        """Bytes that depend on checkpointing, by part. ``snapshots`` is read when ``segment`` is not 1."""
        shape, scheduled = self.shape, self.scheduled(segment, snapshots)
        layers = min(segment, shape.longest) if scheduled else shape.longest
        if self.cuda:
            backward, workspace = self._gpu(layers, segment)
        else:
            costs = self._engine(layers, max(2, layers) if scheduled else segment)
            backward, workspace = costs.kept, costs.segment
        if scheduled:  # a segment's gradients, until they are copied to the span's
            workspace += layers * shape.layer if shape.trained else 0
            backward += self._walking(segment, snapshots) * self.border * shape.state
        elif len(shape.chunks) > 1:  # a gradient of a state comes in, another goes out
            backward += 2 * self.border * shape.state
        return {
            "boundaries": self._boundaries(segment, snapshots) * shape.state,
            "backward state": backward,
            "workspace": workspace,
        }

    def _walking(self, segment: int, snapshots: int) -> int:
        """States and gradients of states that a schedule has beside those that it keeps, at its peak."""
        length = self.segments(segment)
        if length > MOST_SEGMENTS:
            return 3
        # The slots that the forward fills but the first, which holds the input; whether the current state is in none of
        # them; the gradient that comes in, and what is made: a state, or the gradient that goes out.
        run = schedule.Binomial(segment, snapshots)
        slots, apart, gradients, most = len(run.kept(self.shape.longest)) - 1, 0, len(self.shape.chunks) > 1, 0
        for action in run.backward(self.shape.longest):
            if action.op in (schedule.Op.ADVANCE, schedule.Op.REVERSE):
                most = max(most, slots + apart + gradients + 1)
            if action.op == schedule.Op.REVERSE:
                gradients = True
            apart = {schedule.Op.ADVANCE: 1, schedule.Op.FREE: apart}.get(action.op, 0)
            slots += {schedule.Op.STORE: 1, schedule.Op.FREE: -1}.get(action.op, 0)
        return max(1, most - (min(snapshots, length) - 1))

    def _engine(self, layers: int, segment: int) -> engine.BackwardCosts:
        """Of the CPU engine, for a span of so many hidden layers with both ends."""
        s = self.shape
        sizes = (s.batch, s.inputs, s.width, s.outputs, layers, segment, s.kernel_size, *(s.image or (1, 1)))
        flags = (True, True, s.offset, s.trained, s.dtype == torch.float64, bool(s.image))
        return engine.backward_costs(sizes, flags, self.threads)

    def _gpu(self, layers: int, segment: int) -> tuple[int, int]:
        """What the Triton kernels allocate; one layer at a time a segment's states (ops/layered.py)."""
        s = self.shape
        x = torch.empty(s.batch, s.inputs, *s.image, dtype=s.dtype, device="meta")
        filters = (s.width, s.width, *((s.kernel_size,) * len(s.image)))
        weight = torch.empty(layers, *filters, dtype=s.dtype, device="meta")
        fused = triton_dispatch.backward_workspace(x, weight, s.offset, segment)
        states = 0 if segment == 1 else min(segment, layers) + 1
        return 8 * s.state, states * s.state if fused is None else fused

    def sweeps(self, segment: int, snapshots: int) -> float:
        """Forward runs of the whole chain in one step, as ``schedule.Schedule`` has it."""
        if segment == 1:
            return 1.0
        length = self.segments(segment)
        divided = 0.0
        if not self.cuda:  # the engine divides a segment that it cannot hold, and runs all but the last part once more
            costs = self._engine(self.shape.longest, segment)
            divided = 1 - costs.held / costs.longest
        if snapshots >= length:
            return 2.0 + divided
        kept = schedule.first_snapshots(length, snapshots)
        # The forward runs to the output. The backward advances what the schedule does beyond that, goes on from the
        # last snapshot, and runs every segment where it reverses it.
        return 1 + (schedule.fewest_advances(length, snapshots) - kept[-1] + length) / length + divided

    def time(self, segment: int, snapshots: int) -> float:
        """Of a step, in forward sweeps."""
        states = (self.shape.layers + 1) * self.shape.state
        if segment == 1 and not self.cuda and states > CACHE_BYTES * self.threads:
            return 1.0 + BACKWARD_COST + STATE_COST / (self.shape.width * self.shape.taps + UNIT_COST)
        return self.sweeps(segment, snapshots) + BACKWARD_COST


def _uniform(layers: int) -> set[int]:
    """The shortest segment for every number of boundaries, and AUTO_SEGMENT."""
    root = math.isqrt(layers)
    lengths = {*range(2, root + 1), *(_ceil(layers, count) for count in range(1, root + 2)), AUTO_SEGMENT}
    return {max(2, min(length, layers)) for length in lengths}


def plan(
    model: DeepNarrowBase,
    *,
    batch_size: int,
    input_shape: tuple[int, ...] | None = None,
    budget: int | str | None = None,
    optimizer: str = "sgd",
) -> MemoryPlan:
    """The memory of one training step, and the checkpointing that fits ``budget`` at the least slow-down.

    Checkpointing trades memory for running the chain forward again: every state saved (nothing runs twice), or one
    state in ``segment`` layers, a segment's own states being recomputed where they are used (everything runs twice).
    Fewer boundaries than segments, under a binomial schedule (Griewank and Walther, ACM TOMS 26(1), 2000), are planned
    where the model asks for them (``checkpoint=(segment, snapshots)``) but not chosen: the engine divides long segments
    of convolutions again, sample by sample, which takes less memory.

    Arguments:
        model: a DeepNarrowMLP or DeepNarrowCNN, which is only read.
        batch_size: samples a step, at least 1.
        input_shape: of one sample. (in,) for an MLP, which needs none; (C, H, W) for a CNN.
        budget: bytes of the whole step, parameters included: an int, or text such as "2GiB" or "500MB". None plans
            what the model's own ``checkpoint`` and ``budget`` do.
        optimizer: "sgd", "momentum" or "adam": what keeps 0, 1 or 2 tensors of the parameters' size; "fused-sgd" or
            "fused-momentum": ``narrowdeep.optim.FusedSGD``, with which a model of several chunks never has all
            gradients at once.

    Returns: a MemoryPlan; of those that fit, the fastest, and of equally fast ones the one whose segment is nearest
        to ``AUTO_SEGMENT`` layers. It counts tensors and the engine's own memory, not the interpreter and its
        libraries.

    Raises: TypeError or ValueError naming the argument, the rule and the value; BudgetError (a ValueError), with the
        smallest budget that can be met, when this one cannot.

    Examples:
        >>> from narrowdeep import DeepNarrowMLP
        >>> from narrowdeep.memory import plan
        >>> model = DeepNarrowMLP(784, 10, depth=12)
        >>> plan(model, batch_size=4096, budget="300MB").total <= 300_000_000
        True
    """
    shape = _shape(model, batch_size, input_shape)
    step = _Step(shape)
    if optimizer not in OPTIMIZER_TENSORS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZER_TENSORS)}, got {optimizer!r}")
    wanted = model.budget if budget is None else parse_bytes(budget)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    fixed = {
        "parameters": size,
        "gradients": _gradients(model, fused=optimizer.startswith("fused")),
        "optimizer state": OPTIMIZER_TENSORS[optimizer] * size,
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
    candidates = [(1, 0), *((k, step.segments(k)) for k in _uniform(shape.longest))]
    totals = {c: sum(fixed.values()) + sum(step.activations(*c).values()) for c in candidates}
    fitting = [c for c in candidates if totals[c] <= wanted]
    if not fitting:
        raise BudgetError(wanted, min(totals.values()))
    best = min(fitting, key=lambda c: (step.time(*c), abs(math.log2(c[0] / AUTO_SEGMENT))))
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


def _shape(model: DeepNarrowBase, batch_size: int, input_shape: tuple[int, ...] | None) -> ChainShape:
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
        device=weight.device,
    )


def _finish(step: _Step, fixed: dict[str, int], segment: int, snapshots: int, budget: int | None) -> MemoryPlan:
    return MemoryPlan(
        segment=segment,
        schedule=schedule.Binomial(segment, snapshots) if step.scheduled(segment, snapshots) else None,
        snapshots=step.shape.layers + 1 if segment == 1 else snapshots,
        parts=fixed | step.activations(segment, snapshots),
        forward_sweeps=step.sweeps(segment, snapshots),
        slow_down=step.time(segment, snapshots) / step.time(1, 0),
        budget=budget,
    )
