"""Device functions shared by the Triton kernels of both chains, and the one place that launches a kernel.

A hidden state is a tuple of tensors, so that one kernel text serves three layouts. ``ROWS`` = 1: an entry is a unit,
shape (BLOCK,), one sample a lane, weights are scalars (no lane ever talks to another). ``ROWS`` = 16: an entry is a
tile of 16 units, shape (16, BLOCK), weights are tiles of ``tl.dot``. ``ROWS`` = 8: an entry is a register of a tensor
core's accumulator, shape (2 BLOCK,). Matrices in memory are (n, B), batch last.
``column`` is (columns of that matrix, whether there are such): of a convolution a lane may take several positions,
and an entry is a unit at one of them.

More than 400 lines, because the three layouts of a state are told apart here and nowhere else.
"""

# ruff: noqa: RUF005 (the kernel language has no starred tuples)
from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from narrowdeep.ops.reference import RENORMALISE_PERIOD as _RENORMALISE_PERIOD
from narrowdeep.ops.triton_dispatch import KernelError

RENORMALISE_PERIOD = tl.constexpr(_RENORMALISE_PERIOD)

INTERPRETED = knobs.runtime.interpret

_PREFETCH_BYTES = 64 << 10  # of the weights themselves; as records they may take a little more
"""Weights of RENORMALISE_PERIOD layers are asked for ahead if they fit the first-level cache beside the states."""

FRAGMENT = tl.constexpr(8)
"""ROWS of the layout that tensor cores take and give (``triton_packed.py``): two units of two samples a lane."""

TILE = 16
"""Units a tile of the ``tl.dot`` layout holds: the least ``tl.dot`` takes."""


MULTIPROCESSORS = 132
"""Assumed where there is no device to ask (H100)."""

SCRATCH_BYTES = 32 << 20
"""The same of ``scratch_bytes``."""

_best: dict[Any, Block] = {}
_autotune = False


@dataclass(frozen=True)
class Block:
    """Samples of a program, its warps, the registers a thread may have.

    Without a limit ptxas takes fewer than a chain needs so that more programs fit a multiprocessor, and spills.
    """

    samples: int
    warps: int
    registers: int | None = None
    ahead: int = 0
    """Layers whose records (``triton_packed.py``) are loaded before they are used."""
    fragments: bool = False
    """States in the layout of tensor cores (ROWS = FRAGMENT)."""
    shuffled: bool = False
    """Of a convolution's program of one warp, whose lanes ask one another for a layer's input."""


def autotune(enabled: bool = True) -> None:
    """Time every block size once a shape and keep the fastest, instead of the choice by the table. CUDA only."""
    global _autotune
    _autotune = enabled
    _best.clear()


def capability(device: torch.device) -> int:
    """Of a CUDA device, as in sm_80; 90 for others (replaced where kernels are compiled for a target)."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device; those of an H100 for others."""
    if device.type != "cuda":
        return MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def scratch_bytes(device: torch.device) -> int:
    """What the states and gradients of a group of layers may take: two thirds of the second-level cache.

    They then stay in it between the kernel that writes them and the one that reads them.
    """
    if device.type != "cuda":
        return SCRATCH_BYTES
    return torch.cuda.get_device_properties(device).L2_cache_size * 2 // 3


def prefetched(weight: Tensor) -> bool:
    """Whether hidden weights (layers, n, n, ...) are asked for ahead. The interpreter knows no inline assembly."""
    layer = math.prod(weight.shape[1:]) * weight.element_size()
    return not INTERPRETED and layer * _RENORMALISE_PERIOD <= _PREFETCH_BYTES


def empty(like: Tensor, *shape: int) -> Tensor:
    """Memory that a kernel fills (tests replace this to see that it does)."""
    return like.new_empty(shape)


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, registers: int | None = None, **constants: Any
) -> None:
    """``kernel[grid](*args)`` on the device of the first tensor (tests replace this to run the PTX on a CPU).

    Raises: KernelError when Triton cannot compile or start it.
    """
    device = next(a for a in args if isinstance(a, Tensor)).device
    if device.type == "cuda":
        with torch.cuda.device(device):
            try:
                kernel[grid](*args, num_warps=num_warps, maxnreg=registers, enable_fp_fusion=True, **constants)
            except Exception as error:
                raise KernelError(kernel.fn.__name__, error) from error
    else:  # the interpreter
        kernel[grid](*args, num_warps=num_warps, **constants)


def fitting_block(options: list[Block], samples: int, device: torch.device) -> Block:
    """The first of ``options`` that gives every multiprocessor work, or the last."""
    least = 4 * multiprocessors(device)  # warps
    fitting = [block for block in options if samples * block.warps >= least * block.samples]
    return fitting[0] if fitting else options[-1]


def choose_block(
    key: tuple, options: list[Block], samples: int, device: torch.device, start: Callable[[Block], None]
) -> None:
    """``start(block)`` with the ``fitting_block``.

    Under ``autotune`` with the fastest one; ``start`` is then called several times, so it must not change its inputs.
    """
    if _autotune and device.type == "cuda":
        key = (key, torch.cuda.get_device_name(device))
        if key not in _best:
            with torch.cuda.device(device):  # the events that take the time belong to the current device
                times = [
                    (triton.testing.do_bench(functools.partial(start, block), warmup=5, rep=20), block)
                    for block in options
                ]
            _best[key] = min(times, key=lambda pair: pair[0])[1]
        start(_best[key])
        return
    start(fitting_block(options, samples, device))


@triton.jit
def two_sum(a, b):
    """Knuth's exact sum (compilers contract products to fma but never reassociate sums, so it stays exact)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


@triton.jit
def unit_index(i: tl.constexpr, ROWS: tl.constexpr):
    """Unit numbers of entry i as a column, for ROWS > 1."""
    return i * ROWS + tl.arange(0, ROWS)[:, None]


@triton.constexpr_function
def entry_count(width, rows):
    """Entries of a state."""
    return 4 * ((width + 7) // 8) if rows == 8 else (width + rows - 1) // rows


@triton.constexpr_function
def may_hold(i, unit, rows):
    """Whether an entry, ROWS > 1, has the unit in any lane."""
    return i // 4 == unit // 8 and i % 2 == unit % 2 if rows == 8 else i == unit // rows


@triton.jit
def fragment_unit(i: tl.constexpr, LANES: tl.constexpr):
    """Unit numbers of entry i, ROWS = FRAGMENT."""
    return i // 4 * 8 + i % 2 + 2 * (tl.arange(0, LANES) % 4)


@triton.jit
def fragment_place(column, batch, i: tl.constexpr, WIDTH: tl.constexpr):
    """(where entry i is in a (n, B) matrix, which of its lanes are inside), ROWS = FRAGMENT."""
    unit = fragment_unit(i, column.shape[0])
    sample = column + i % 4 // 2 * 8
    inside = sample < batch
    LEFT: tl.constexpr = (WIDTH - i // 4 * 8 - i % 2 + 1) // 2
    if LEFT < 4:  # lanes of four with such a unit: often as many of both units, so that a predicate serves both
        inside = inside & (tl.arange(0, column.shape[0]) % 4 < LEFT)
    return unit * batch + sample, inside


@triton.jit
def skip(i: tl.constexpr, MIDDLE: tl.constexpr, ROWS: tl.constexpr, entry):
    """Where the diagonal of E is 1 in entry i: everywhere but at the middle unit."""
    if ROWS == FRAGMENT:
        unit = fragment_unit(i, entry.shape[0])
    else:
        unit = unit_index(i, ROWS)
    return unit != MIDDLE


@triton.jit
def read_entry(ptr, column, batch, i: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Entry i of the (n, B) matrix at ptr; 0 outside."""
    place = column[0][i % len(column[0])]
    mask = column[1][i % len(column[0])]
    if ROWS == 1:
        entry = tl.load(ptr + i // len(column[0]) * batch + place, mask=mask, other=0.0)
    elif ROWS == FRAGMENT:
        place, mask = fragment_place(place, batch, i, WIDTH)
        entry = tl.load(ptr + place, mask=mask, other=0.0)
    else:
        unit = unit_index(i, ROWS)
        inside = (unit < WIDTH) & mask[None, :]
        entry = tl.load(ptr + unit * batch + place[None, :], mask=inside, other=0.0)
    return entry


@triton.jit
def read_state(ptr, column, batch, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Entries of the (n, B) matrix at ptr."""
    state = ()
    for i in tl.static_range(entry_count(WIDTH, ROWS) * len(column[0])):
        state = state + (read_entry(ptr, column, batch, i, WIDTH, ROWS),)
    return state


@triton.jit
def read_near(ptr, column, batch, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """``read_state`` of an MLP without a mask (predicates are seven): outside, what the nearest inside has."""
    state = ()
    for i in tl.static_range(entry_count(WIDTH, ROWS) * len(column[0])):
        if ROWS == FRAGMENT:
            unit = tl.minimum(fragment_unit(i, column[0][0].shape[0]), WIDTH - 1)
            sample = column[0][0] + i % 4 // 2 * 8
        else:
            unit = i // len(column[0])
            sample = column[0][i % len(column[0])]
        state = state + (tl.load(ptr + unit * batch + tl.minimum(sample, batch - 1)),)
    return state


@triton.jit
def enter(base_ptr, hi_ptr, lo_ptr, column, batch, MIDDLE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """(base + hi, hi, lo) of a state, a gradient or a tangent; three times lo in plain form.

    The middle unit's hi never changes; one sample a lane, it takes no register: 0 stands for it.
    """
    lo = read_state(lo_ptr, column, batch, WIDTH, ROWS)
    total = lo
    hi = lo
    if MIDDLE >= 0:
        total = ()
        hi = ()
        for i in tl.static_range(entry_count(WIDTH, ROWS) * len(column[0])):
            entry = read_entry(hi_ptr, column, batch, i, WIDTH, ROWS)
            total = total + (read_entry(base_ptr, column, batch, i, WIDTH, ROWS) + entry,)
            if ROWS == 1 and i // len(column[0]) == MIDDLE:
                entry = tl.zeros_like(entry)
            hi = hi + (entry,)
    return total, hi, lo


@triton.jit
def write_state(ptr, state, column, batch, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """The way back from ``read_state``."""
    for i in tl.static_range(len(state)):
        place = column[0][i % len(column[0])]
        mask = column[1][i % len(column[0])]
        if ROWS == 1:
            tl.store(ptr + i // len(column[0]) * batch + place, state[i], mask=mask)
        elif ROWS == FRAGMENT:
            place, mask = fragment_place(place, batch, i, WIDTH)
            tl.store(ptr + place, state[i], mask=mask)
        else:
            unit = unit_index(i, ROWS)
            tl.store(ptr + unit * batch + place[None, :], state[i], mask=(unit < WIDTH) & mask[None, :])


@triton.jit
def leave(ptr, base_ptr, hi_ptr, hi, lo, column, batch, MIDDLE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Write (base, hi, lo), (3, n, B); lo alone, (1, n, B), in plain form. Base and hi are those given to ``enter``."""
    if MIDDLE >= 0:
        matrix = WIDTH * batch
        write_state(ptr, read_state(base_ptr, column, batch, WIDTH, ROWS), column, batch, WIDTH, ROWS)
        if ROWS == 1:
            whole = ()
            for i in tl.static_range(len(hi)):
                if i // len(column[0]) == MIDDLE:
                    whole = whole + (read_entry(hi_ptr, column, batch, i, WIDTH, ROWS),)
                else:
                    whole = whole + (hi[i],)
            hi = whole
        write_state(ptr + matrix, hi, column, batch, WIDTH, ROWS)
        ptr += 2 * matrix
    write_state(ptr, lo, column, batch, WIDTH, ROWS)


@triton.jit
def add_states(a, b, COUNT: tl.constexpr):
    """a + b, entry by entry."""
    total = ()
    for i in tl.static_range(COUNT):
        total = total + (a[i] + b[i],)
    return total


@triton.jit
def product(weight, state, START, WIDTH: tl.constexpr, ROWS: tl.constexpr, TRANSPOSED: tl.constexpr):
    """START + W state, or START + W^T state; START is a tuple of entries or of scalars."""
    result = ()
    for i in tl.static_range((WIDTH + ROWS - 1) // ROWS):
        if ROWS == 1:
            total = tl.broadcast_to(START[i], state[0].shape)
            for k in tl.static_range(WIDTH):
                index = k * WIDTH + i if TRANSPOSED else i * WIDTH + k
                total = tl.fma(tl.broadcast_to(tl.load(weight + index), state[k].shape), state[k], total)
        else:
            total = tl.broadcast_to(START[i], state[0].shape)
            unit = unit_index(i, ROWS)
            for k in tl.static_range((WIDTH + ROWS - 1) // ROWS):
                other = k * ROWS + tl.arange(0, ROWS)[None, :]
                index = other * WIDTH + unit if TRANSPOSED else unit * WIDTH + other
                tile = tl.load(weight + index, mask=(unit < WIDTH) & (other < WIDTH), other=0.0)
                total = tl.dot(tile, state[k], total, input_precision="ieee", out_dtype=tile.dtype)
        result = result + (total,)
    return result


@triton.jit
def read_bias(bias, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Entries of a bias vector: scalars, or columns of a tile."""
    entries = ()
    for i in tl.static_range((WIDTH + ROWS - 1) // ROWS):
        if ROWS == 1:
            entry = tl.load(bias + i)
        else:
            unit = unit_index(i, ROWS)
            entry = tl.load(bias + unit, mask=unit < WIDTH, other=0.0)
        entries = entries + (entry,)
    return entries


@triton.jit
def add_skip(z, lo, MIDDLE: tl.constexpr, COUNT: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr = 1):
    """z + E lo: the identity part of an offset layer. SPAN: positions of a lane."""
    result = ()
    for i in tl.static_range(COUNT):
        entry = z[i]
        if ROWS == 1:
            if i // SPAN != MIDDLE:
                entry = lo[i] + entry
        elif may_hold(i, MIDDLE, ROWS):
            entry = tl.where(skip(i, MIDDLE, ROWS, entry), lo[i] + entry, entry)
        else:
            entry = lo[i] + entry
        result = result + (entry,)
    return result


@triton.jit
def clip(z, total, OFFSET: tl.constexpr, COUNT: tl.constexpr):
    """max(z, -total), max(z, 0) in plain form; a NaN stays a NaN, as in ``torch.relu``.

    One instruction in float32 (sm_80 on); in float64 there is none, and a comparison is cheaper than ``maximum``.
    """
    result = ()
    for i in tl.static_range(COUNT):
        floor = -total[i] if OFFSET else tl.zeros_like(z[i])
        if z[i].dtype == tl.float32:
            entry = tl.maximum(z[i], floor, propagate_nan=tl.PropagateNan.ALL)
        else:
            entry = tl.where(floor > z[i], floor, z[i])
        result = result + (entry,)
    return result


@triton.jit
def mask_gradient(h, grad, total, OFFSET: tl.constexpr, COUNT: tl.constexpr):
    """The gradient behind a ReLU whose output is h: grad where h > 0, else whatever makes total + it exactly 0."""
    result = ()
    for i in tl.static_range(COUNT):
        dead = -total[i] if OFFSET else tl.zeros_like(grad[i])
        result = result + (tl.where(h[i] <= 0.0, dead, grad[i]),)
    return result


@triton.jit
def renormalise(base_ptr, total, hi, lo, column, batch, MIDDLE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Move lo into hi by an exact two-sum (``reference.renormalise``): new (total, hi, lo), with total = base + hi.

    ``base`` is read again: it is needed once in RENORMALISE_PERIOD layers and would hold n registers.
    """
    base = read_state(base_ptr, column, batch, WIDTH, ROWS)
    new_total = ()
    new_hi = ()
    new_lo = ()
    for i in tl.static_range(len(hi)):
        moved, rest = two_sum(hi[i], lo[i])
        dead = total[i] + lo[i] == 0.0
        moved = tl.where(dead, -base[i], moved)
        rest = tl.where(dead, 0.0, rest)
        whole = base[i] + moved
        if ROWS == 1:
            if i // len(column[0]) == MIDDLE:
                moved = hi[i]
                rest = lo[i]
                whole = total[i]
        elif may_hold(i, MIDDLE, ROWS):
            kept = skip(i, MIDDLE, ROWS, rest)
            moved = tl.where(kept, moved, hi[i])
            rest = tl.where(kept, rest, lo[i])
            whole = tl.where(kept, whole, total[i])
        new_total = new_total + (whole,)
        new_hi = new_hi + (moved,)
        new_lo = new_lo + (rest,)
    return new_total, new_hi, new_lo


@triton.jit
def zeros_like_state(state, COUNT: tl.constexpr):
    """A tuple of zeros of the entries' shape."""
    zeros = ()
    for i in tl.static_range(COUNT):
        zeros = zeros + (tl.zeros_like(state[i]),)
    return zeros


@triton.jit
def prefetch(ptr, first, end, COUNT: tl.constexpr, ENABLED: tl.constexpr):
    """Ask for elements first .. first + COUNT - 1 (none past end) to be brought near; one request a 128-byte line.

    The chain reads weights in order and nothing else hides their latency when few warps run.
    """
    if ENABLED:
        LINE: tl.constexpr = 128 // (ptr.dtype.element_ty.primitive_bitwidth // 8)
        lines: tl.constexpr = triton.next_power_of_2((COUNT + LINE - 1) // LINE)
        index = first + tl.arange(0, lines) * LINE
        index = tl.minimum(index, end - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L1 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [ptr + index],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
