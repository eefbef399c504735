"""How much memory one training step takes, and the checkpointing that fits a budget, before anything runs."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from narrowdeep.chain import schedule
from narrowdeep.checks import LARGEST, check_count, is_integer, shown
from narrowdeep.ops import engine, triton_dispatch

if TYPE_CHECKING:  # models plan by what is here, not the other way round
    from narrowdeep.modules.base import DeepNarrowBase

AUTO_SEGMENT = 64
"""Layers between saved states under ``checkpoint="auto"`` when not every state is saved."""

OPTIMIZER_TENSORS = {"sgd": 0, "momentum": 1, "adam": 2, "fused-sgd": 0, "fused-momentum": 1}
"""Tensors of the parameters' size that an optimizer keeps. The fused ones are ``narrowdeep.optim.FusedSGD``: the
gradients of one chunk of layers exist at a time."""

BACKWARD_COST = 2.0
"""What the backward of a layer costs when its input is at hand, in forwards of that layer: two products against one."""

NODE_STATES = {1: 12, 2: 20}
"""States that exist at once where a node of a chain in several goes back, beside a segment's: by the parts of a state,
in plain and in offset form. At most; measured 4 to 12 and 10 to 20."""

CACHE_BYTES = 1 << 20
"""Of a thread of the CPU. States that do not fit are written to memory and read back."""

STATE_COST, UNIT_COST = 148, 12
"""In multiply-adds: what it costs to write one number of a state beyond the cache and to read it back, and to compute
it besides its products. Measured with two threads: saving every state took 1.7 times as long as one in 250 layers with
3 channels and filters of 3x3 (27 products a number), 3 times as one in 64 with MLPs of width 4, as long at 75."""

_UNITS = {"": 1, **{f"{prefix}B": 1000**i for i, prefix in enumerate(("", "k", "M", "G", "T"))}}
_UNITS |= {f"{prefix}iB": 1024**i for i, prefix in enumerate(("K", "M", "G", "T"), 1)}
_UNITS_BY_LOWER = {unit.lower(): factor for unit, factor in _UNITS.items()}
_VECTOR_BYTES = {"avx512": 64, "avx2": 32, "neon": 16}
_WIDEST_NARROW = 8  # kWidestNarrow of csrc/mlp/narrow.h


class BudgetError(ValueError):
    """No checkpointing fits the budget. ``smallest`` is the least number of bytes that one does."""

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


@dataclass(frozen=True)
class _Step:
    """One training step in numbers: L - 2 hidden layers of n units at some positions, on a device."""

    layers: int
    width: int
    inputs: int
    outputs: int
    positions: int
    """H W of an image, 1 for the MLP."""
    taps: int
    """Entries of a filter; 0 for the MLP."""
    parameters: int
    """Of the whole network."""
    batch: int
    parts: int
    """Tensors a saved boundary takes: 2 in offset form, (moved, a), else 1."""
    shape: tuple[int, ...]
    """Of one sample."""
    dtype: torch.dtype
    cuda: bool
    threads: int
    lanes: int
    """Samples in a vector of the CPU engine."""
    chunks: tuple[int, ...]
    """Hidden layers of each graph node."""

    @property
    def longest(self) -> int:
        """Hidden layers of the longest chunk."""
        return max(self.chunks)

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def state(self) -> int:
        """Bytes of one hidden state of the whole batch."""
        return self.width * self.positions * self.batch * self.itemsize

    def segments(self, segment: int) -> int:
        """Of the longest chunk."""
        return max(1, _ceil(self.longest, segment))

    def in_nodes(self, segment: int, snapshots: int) -> bool:
        """Whether the chain runs as several graph nodes (narrowdeep/chain/span.py): in chunks, or under a schedule."""
        return len(self.chunks) > 1 or (segment > 1 and snapshots < self.segments(segment))

    def _boundaries(self, segment: int, snapshots: int) -> int:
        """Numbers of states: what is saved, with the state that each chunk starts from and that the last ends at."""
        if len(self.chunks) == 1:
            return self.layers + 1 if segment == 1 else snapshots * self.parts
        if segment == 1:
            return sum(m - 1 + self.parts for m in self.chunks) + self.parts
        return sum(min(snapshots, _ceil(m, segment)) * self.parts for m in self.chunks) + self.parts

    def activations(self, segment: int, snapshots: int) -> dict[str, int]:
        """Bytes that depend on checkpointing, by part. ``snapshots`` is read when ``segment`` is not 1."""
        boundaries = self._boundaries(segment, snapshots) * self.state
        in_nodes = self.in_nodes(segment, snapshots)
        gradients = self.parameters
        if in_nodes:  # of one node's layers: each thread's but one, and the node's own, until they are copied
            layers = self.longest if segment == 1 or len(self.chunks) > 1 else min(segment, self.layers)
            gradients = layers * self.width * (self.width * max(1, self.taps) + 1)
        if in_nodes and (self.cuda or not self.taps):
            # In torch, a layer at a time (ops/layered.py): a state and its gradient with all that is made of each, what
            # nodes hand on, a segment's states; and where a node is divided again, its part's gradients.
            backward = (NODE_STATES[self.parts] + 2 * self.parts) * self.state
            states = 0 if segment == 1 else min(segment, self.longest) + 1
            copied = gradients if snapshots < self.segments(segment) and segment > 1 else 0
            workspace = states * self.state + copied * self.itemsize
            if self.taps:
                workspace += (2 * self.taps + 2) * self.state
        elif self.cuda:
            backward, workspace = self._gpu(segment)
        elif self.taps:
            # Nodes hand a state and its gradient on, in and out.
            backward = 3 * self.parts * self.state if in_nodes else 0
            workspace = self._conv_engine(segment, gradients) + in_nodes * gradients * self.itemsize
            if in_nodes:  # the last layer, in torch, takes its inputs apart by taps; no gradient exists by then
                last = (2 * self.taps + 2) * self.state - self.parameters * self.itemsize
                workspace = max(workspace, last - backward)
        else:
            backward, workspace = self._mlp_engine(segment)
        return {"boundaries": boundaries, "backward state": backward, "workspace": workspace}

    def _gpu(self, segment: int) -> tuple[int, int]:
        """What the Triton kernels allocate; one layer at a time a segment's states (ops/layered.py)."""
        x = torch.empty(self.batch, *self.shape, dtype=self.dtype, device="meta")
        filters = (self.width, self.width, *((math.isqrt(self.taps),) * 2 if self.taps else ()))
        weight = torch.empty(self.layers, *filters, dtype=self.dtype, device="meta")
        fused = triton_dispatch.backward_workspace(x, weight, self.parts == 2, segment)
        states = 0 if segment == 1 else min(segment, self.layers) + 1
        return 8 * self.state, states * self.state if fused is None else fused

    def _mlp_engine(self, segment: int) -> tuple[int, int]:
        """Memory of ``Backward`` in csrc/mlp/kernels.h, whose names are used here."""
        share = _ceil(_ceil(self.batch, self.lanes), self.threads)
        samples = (4 if share >= 3 else share) * self.lanes
        tiles = _ceil(self.batch, samples)
        workers = min(self.threads, tiles)
        size = self.width * samples
        kept = tiles * (3 * size + (self.inputs + self.outputs) * samples)
        step = segment if segment > 1 else max(4, min(64, 2**19 // (2 * size * self.itemsize)))
        longest = min(step, self.layers)
        narrow = 2 <= self.width <= _WIDEST_NARROW
        entries = self.width * (self.width + 1)
        partial = _ceil(entries, self.lanes) * self.lanes if narrow else entries
        together = min(self.segments(step), max(1, 2**20 // (partial * self.itemsize * step)))
        partials = (workers if narrow else workers - 1) * min(together * step, self.layers) * partial
        transposed = _ceil(self.width + 1, self.lanes) * self.lanes * samples
        a_worker = size * (4 + longest + 1) + (0 if narrow else size + transposed)
        return kept * self.itemsize, (partials + workers * a_worker) * self.itemsize

    def _held(self, segment: int) -> tuple[int, int]:
        """States of a segment, and how many of them csrc/conv/chain.h holds at once (``longest``, ``held_states``)."""
        longest = min(segment + 1, self.longest + 1)
        fits = 2**24 // (self.width * self.positions * self.lanes * self.itemsize)
        return longest, min(max(32, min(256, fits)), longest)

    def _conv_engine(self, segment: int, gradients: int) -> int:
        """Memory of ``TileBackward`` and ``conv_backward`` in csrc/conv/chain.h, whose names are used here."""
        workers = min(self.threads, _ceil(self.batch, self.lanes))
        row = self.positions * self.lanes
        state = self.width * row
        longest, held = (1, 1) if segment == 1 else self._held(segment)
        inner = _ceil(longest, held) if held < longest else 0
        sums = self.width * max(self.width, self.inputs) * self.taps * self.lanes
        tile_states = 2 * 4 * state + self.inputs * row
        a_worker = (held + 2) * state + self.outputs * row + sums + inner * self.parts * state + tile_states
        return (workers * a_worker + (workers - 1) * gradients) * self.itemsize

    def sweeps(self, segment: int, snapshots: int) -> float:
        """Forward runs of the whole chain in one step, as ``schedule.Schedule`` has it."""
        if segment == 1:
            return 1.0
        length = self.segments(segment)
        # The convolution engine divides a segment that it cannot hold, and runs all but the last part once more.
        longest, held = self._held(segment)
        divided = 1 - held / longest if self.taps and not self.cuda else 0.0
        if snapshots >= length:
            return 2.0 + divided
        kept = schedule.first_snapshots(length, snapshots)
        # The forward runs to the output. The backward advances what the schedule does beyond that, goes on from the
        # last snapshot, and runs every segment where it reverses it.
        return 1 + (schedule.fewest_advances(length, snapshots) - kept[-1] + length) / length + divided

    def time(self, segment: int, snapshots: int) -> float:
        """Of a step, in forward sweeps."""
        states = (self.layers + 1) * self.state
        if segment == 1 and not self.cuda and states > CACHE_BYTES * self.threads:
            products = self.width * max(1, self.taps)
            return 1.0 + BACKWARD_COST + STATE_COST / (products + UNIT_COST)
        return self.sweeps(segment, snapshots) + BACKWARD_COST


def _vector_bytes() -> int | None:
    """Of the instruction set in use; None for the scalar kernels, which take one number at a time."""
    return _VECTOR_BYTES.get(os.environ.get("NARROWDEEP_ISA") or engine.instruction_sets()[0])


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
    of convolutions again, sample by sample, which takes less memory; and narrow MLPs run parts one layer at a time.

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
    """
    step = _step(model, batch_size, input_shape)
    if optimizer not in OPTIMIZER_TENSORS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZER_TENSORS)}, got {optimizer!r}")
    wanted = model.budget if budget is None else parse_bytes(budget)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    fixed = {
        "parameters": size,
        "gradients": _gradients(model, fused=optimizer.startswith("fused")),
        "optimizer state": OPTIMIZER_TENSORS[optimizer] * size,
        "input and output": (step.inputs * step.positions + 2 * step.outputs) * step.batch * step.itemsize,
    }

    if wanted is None:
        with torch.enable_grad():  # a training step, whatever the caller is doing
            segment = model.segment(step.batch * step.positions)
        snapshots = step.segments(segment)
        if isinstance(model.checkpoint, tuple):
            segment, most = model.checkpoint
            snapshots = min(most, step.segments(segment))
        return _finish(step, fixed, segment, snapshots, None)
    candidates = [(1, 0), *((k, step.segments(k)) for k in _uniform(step.longest))]
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


def _step(model: DeepNarrowBase, batch_size: int, input_shape: tuple[int, ...] | None) -> _Step:
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
    shape = tuple(map(int, shape))
    itemsize = weight.element_size()
    vector = _vector_bytes()
    return _Step(
        layers=model.depth - 2,
        width=model.width,
        inputs=inputs,
        outputs=last_weight.shape[0],
        positions=math.prod(shape[1:]),
        taps=math.prod(weight.shape[2:]) if image else 0,
        parameters=sum(p.numel() for p in model.parameters()),
        batch=batch_size,
        parts=2 if model.form == "offset" else 1,
        shape=shape,
        dtype=weight.dtype,
        cuda=weight.is_cuda,
        threads=torch.get_num_threads(),
        lanes=vector // itemsize if vector else 1,
        chunks=tuple(len(span.layers) for span in model.spans()[1:-1]),
    )


def _finish(step: _Step, fixed: dict[str, int], segment: int, snapshots: int, budget: int | None) -> MemoryPlan:
    sweeps = step.sweeps(segment, snapshots)
    fewer = segment > 1 and snapshots < step.segments(segment)
    return MemoryPlan(
        segment=segment,
        schedule=schedule.Binomial(segment, snapshots) if fewer else None,
        snapshots=step.layers + 1 if segment == 1 else snapshots,
        parts=fixed | step.activations(segment, snapshots),
        forward_sweeps=sweeps,
        slow_down=step.time(segment, snapshots) / step.time(1, 0),
        budget=budget,
    )
