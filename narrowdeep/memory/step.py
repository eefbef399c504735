"""What one training step takes, in bytes and in time, under each way to checkpoint it."""

from __future__ import annotations

import math

import torch

from narrowdeep.chain import schedule
from narrowdeep.chain.params import ChainShape
from narrowdeep.ops import engine, triton_dispatch
from narrowdeep.ops.reference import saved_shape

AUTO_SEGMENT = 64
"""Layers between saved states at least, where nothing speaks for fewer."""

BACKWARD_COST = 2.0
"""What the backward of a layer costs when its input is at hand, in forwards of that layer: two products against one."""

CACHE_BYTES = 1 << 20
"""Of a thread of the CPU. States that do not fit are written to memory and read back."""

STATE_COST, UNIT_COST = 140, 12
"""In multiply-adds: what it costs to write one number of a state beyond the cache and to read it back, and to compute
it besides its products. Measured with two threads: saving every state took 1.7 times as long as one in 250 layers with
3 channels and filters of 3x3 (27 products a number), 3 times as one in 64 with MLPs of width 4, as long at 75."""

AUTO_NUMBERS = 1 << 27
"""Of all states, to which ``checkpoint="auto"`` keeps every one where that is faster: 512 MiB in float32."""

SEGMENT_COST = 20_000_000
"""In multiply-adds: what a segment costs that a schedule runs from Python, besides its layers. Measured with two
threads: 0.1 ms."""

FEW_SEGMENTS = 20
"""Of a schedule whose actions are gone through to see what it takes; to longer ones the most is little."""

MOST_SEGMENTS = 1000
"""Of a schedule that is chosen. More take longer to plan, and their calls longer than their layers."""


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


class Step:
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
        if length > FEW_SEGMENTS:
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
        shape = self.shape
        products = shape.width * shape.taps
        if segment == 1:
            states = (shape.layers + 1) * shape.state
            return saving_time(products, in_cache=self.cuda or states <= CACHE_BYTES * self.threads)
        calls = 0.0
        if self.scheduled(segment, snapshots):
            numbers = shape.longest * shape.width * shape.positions * shape.batch
            calls = SEGMENT_COST * self.segments(segment) / (numbers * (products + UNIT_COST))
        return self.sweeps(segment, snapshots) + BACKWARD_COST + calls

    def choices(self, room: int, schedules: bool) -> tuple[list[tuple[int, int]], int]:
        """(segment, snapshots) of what takes at most ``room`` bytes, and the fewest bytes that anything takes."""
        sizes = {choice: sum(self.activations(*choice).values()) for choice in [(1, 0), *self._uniform()]}
        found = [choice for choice, size in sizes.items() if size <= room]
        least = min(sizes.values())
        each = len(self.shape.chunks) * self.border * self.shape.state
        segments = (2**i for i in range(1, self.shape.longest.bit_length()))
        for segment in segments if schedules else ():
            most = self.segments(segment) - 1  # with one more, every boundary is kept
            if 1 <= most < MOST_SEGMENTS:
                one = sum(self.activations(segment, 1).values())
                least = min(least, one)
                if one <= room:
                    more = (room - one - (3 - self._walking(segment, 1)) * each) // each
                    found.append((segment, min(most, 1 + max(0, more))))
        return found, least

    def _uniform(self) -> list[tuple[int, int]]:
        """The shortest segment for every number of boundaries, and AUTO_SEGMENT, with all boundaries."""
        layers = self.shape.longest
        root = math.isqrt(layers)
        lengths = {*range(2, root + 1), *(_ceil(layers, count) for count in range(1, root + 2)), AUTO_SEGMENT}
        return [(k, self.segments(k)) for k in {max(2, min(length, layers)) for length in lengths}]


def saving_time(products: int, *, in_cache: bool) -> float:
    """Of a step that saves every state, in forward sweeps. It takes ``products`` to compute a number of a state."""
    return 1.0 + BACKWARD_COST + (0.0 if in_cache else STATE_COST / (products + UNIT_COST))


def usual_segment(depth: int) -> int:
    """Layers between saved states where every state is too many."""
    return max(AUTO_SEGMENT, math.isqrt(depth))


def auto_segment(
    depth: int, inputs: int, outputs: int, taps: int, positions: int | None, most: int = AUTO_NUMBERS
) -> int:
    """Layers between saved states under ``checkpoint="auto"`` without a budget.

    Every state where that is faster, as eager layers keep them, to ``most`` numbers or as many as the parameters and
    their gradients have. Narrow layers are computed again: that takes less time than to write their states to memory
    and to read them back, and as long where all fit in the cache.

    Arguments:
        depth, inputs, outputs, taps: of the network; L, and the entries of a filter.
        positions: batch size times H W. None: one plan for all batches.
    """
    width = inputs + 1 + outputs
    if positions is None or saving_time(width * taps, in_cache=False) > 2.0 + BACKWARD_COST:
        return usual_segment(depth)
    hidden = (depth - 2) * width * (width * taps + 1)
    parameters = hidden + (inputs + outputs) * width * taps + width + outputs
    return 1 if (depth - 1) * width * positions <= max(2 * parameters, most) else usual_segment(depth)
