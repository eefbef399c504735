"""The tangent kernels of both chains on a GPU: h and B of a group of layers from the chain kernels, then their sums.

A layer of the MLP adds ``(<h, h'> + 1) <B_a, B'_b>`` to Theta_ab (thesis section 3.2): two products of length n, so a
lane takes one pair of samples through all layers of a group and nothing of the size of a Jacobian is ever formed. A
convolution's filters are small: ``filter_jacobians`` forms the gradient of every sample and output, ``pair_sums`` is
the product of these Jacobians for all pairs of samples. All sums over layers are float64 and their order depends on the
shapes and the device's cache alone.
"""

# ruff: noqa: RUF005 (the kernel language has no starred tuples)
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from narrowdeep.ops import triton_chain
from narrowdeep.ops.cnn import triton as cnn
from narrowdeep.ops.gram import reference
from narrowdeep.ops.mlp import triton as mlp
from narrowdeep.ops.params import ChainParams, ChainSettings
from narrowdeep.ops.triton_common import MULTIPROCESSORS, empty, launch

WIDEST = 16
"""Widest layer of the MLP's kernel: the products over units are unrolled."""

PAIRS = 16
"""Samples of x1, and of x2, in a program's tile of pairs."""

_LAYERS = 64
"""Layers that one program sums: the layers of a group are split over programs, their sums added in order."""

TILE_PAIRS, TILE_ENTRIES = 32, 16
"""Of ``pair_sums``: samples of x1, and of x2, in a program's tile of pairs; entries of the Jacobians at a time."""

_MOST_SPLITS = 64
"""Of the entries of the Jacobians over programs, where there are few pairs."""


@triton.jit
def pairs_of_program(count1, count2, outputs, DIAGONAL: tl.constexpr, PAIRS: tl.constexpr):
    """(samples of x1, of x2, output a, output b, matrix of pairs to write) of program (tile, a and b, split)."""
    tiles = tl.cdiv(count2, PAIRS)
    i = tl.program_id(0) // tiles * PAIRS + tl.arange(0, PAIRS)
    j = tl.program_id(0) % tiles * PAIRS + tl.arange(0, PAIRS)
    if DIAGONAL:
        a = tl.program_id(1)
        b = tl.program_id(1)
    else:
        a = tl.program_id(1) // outputs
        b = tl.program_id(1) % outputs
    return i, j, a, b, tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)


@triton.jit(do_not_specialize=["layers", "count1", "count2", "outputs"])
def gram_sums(
    h1_ptr,
    g1_ptr,
    h2_ptr,
    g2_ptr,
    sums_ptr,
    layers,
    count1,
    count2,
    outputs,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    DIAGONAL: tl.constexpr,
    WIDTH: tl.constexpr,
    LAYERS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Program (tile of pairs, outputs a and b, split): sum over LAYERS layers of (WEIGHT <h, h'> + BIAS) <B_a, B'_b>.

    h, g: (layers, n, outputs * count), output first; of h only the first ``count`` columns are read. sums: (splits,
    outputs a and b, count1, count2) in float64, with a = b only if DIAGONAL.
    """
    layers = layers.to(tl.int64)
    i, j, a, b, cell = pairs_of_program(count1, count2, outputs, DIAGONAL, PAIRS)
    count1 = count1.to(tl.int64)
    count2 = count2.to(tl.int64)
    stride1 = count1 * outputs
    stride2 = count2 * outputs
    total = tl.zeros((PAIRS, PAIRS), tl.float64)
    low = tl.program_id(2).to(tl.int64) * LAYERS
    for layer in range(low, tl.minimum(low + LAYERS, layers)):
        inner = tl.full((PAIRS, PAIRS), 1.0 if BIAS else 0.0, tl.float64)
        outer = tl.zeros((PAIRS, PAIRS), tl.float64)
        for k in tl.static_range(WIDTH):
            row1 = (layer * WIDTH + k) * stride1
            row2 = (layer * WIDTH + k) * stride2
            if WEIGHT:
                left = tl.load(h1_ptr + row1 + i, mask=i < count1, other=0.0).to(tl.float64)
                right = tl.load(h2_ptr + row2 + j, mask=j < count2, other=0.0).to(tl.float64)
                inner += left[:, None] * right[None, :]
            left = tl.load(g1_ptr + row1 + a * count1 + i, mask=i < count1, other=0.0).to(tl.float64)
            right = tl.load(g2_ptr + row2 + b * count2 + j, mask=j < count2, other=0.0).to(tl.float64)
            outer += left[:, None] * right[None, :]
        total += inner * outer
    inside = (i < count1)[:, None] & (j < count2)[None, :]
    tl.store(sums_ptr + (cell * count1 + i[:, None]) * count2 + j[None, :], total, mask=inside)


@triton.jit(do_not_specialize=["samples", "blocks"])
def filter_jacobians(
    g_ptr,
    h_ptr,
    jacobian_ptr,
    samples,
    blocks,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    UNITS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    TAP: tl.constexpr,
    HEIGHT: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """G h^T and G of every sample by itself, summed over positions. Program (layer and samples, row group * channel).

    g: (layers, UNITS, positions * samples); h: (layers, CHANNELS, positions * samples); jacobian: (layers, entries,
    samples), the entries being [unit][channel][tap] if WEIGHT, then [unit] if BIAS. CHANNELS is 1 without WEIGHT.
    """
    RADIUS: tl.constexpr = TAP // 2
    TAPS: tl.constexpr = TAP * TAP if WEIGHT else 0
    POSITIONS: tl.constexpr = HEIGHT * LENGTH
    samples = samples.to(tl.int64)
    layer = (tl.program_id(0) // blocks).to(tl.int64)  # as in the weight gradients: a batch may have many blocks
    row = tl.program_id(1) // CHANNELS * ROWS
    channel = tl.program_id(1) % CHANNELS
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g_ptr += layer * UNITS * POSITIONS * samples
    h_ptr += (layer * CHANNELS + channel) * POSITIONS * samples
    jacobian_ptr += layer * (UNITS * (CHANNELS * TAPS + (1 if BIAS else 0))) * samples
    sums = ()
    for _ in tl.static_range(ROWS * (TAPS + 1)):
        sums = sums + (tl.zeros((BLOCK,), g_ptr.dtype.element_ty),)
    for position in range(POSITIONS):
        y = position // LENGTH
        x = position % LENGTH
        values = ()
        for t in tl.static_range(TAPS):
            down = t // TAP - RADIUS
            right = t % TAP - RADIUS
            inside = (y + down >= 0) & (y + down < HEIGHT) & (x + right >= 0) & (x + right < LENGTH)
            place = (position + down * LENGTH + right) * samples
            values = values + (tl.load(h_ptr + place + column, mask=column < tl.where(inside, samples, 0), other=0.0),)
        new = ()
        for i in tl.static_range(ROWS):
            unit = tl.minimum(row + i, UNITS - 1)  # rows past the last are computed and dropped
            place = (unit * POSITIONS + position) * samples
            g = tl.load(g_ptr + place + column, mask=column < samples, other=0.0)
            for t in tl.static_range(TAPS):
                new = new + (tl.fma(g, values[t], sums[i * (TAPS + 1) + t]),)
            new = new + (sums[i * (TAPS + 1) + TAPS] + g,)
        sums = new
    for i in tl.static_range(ROWS):
        inside = column < tl.where(row + i < UNITS, samples, 0)
        for t in tl.static_range(TAPS):
            entry = ((row + i) * CHANNELS + channel) * TAPS + t
            tl.store(jacobian_ptr + entry * samples + column, sums[i * (TAPS + 1) + t], mask=inside)
        if BIAS:
            entry = UNITS * CHANNELS * TAPS + row + i
            inside = column < tl.where((row + i < UNITS) & (channel == 0), samples, 0)
            tl.store(jacobian_ptr + entry * samples + column, sums[i * (TAPS + 1) + TAPS], mask=inside)


@triton.jit(do_not_specialize=["entries", "share", "count1", "count2", "outputs"])
def pair_sums(
    jacobian1_ptr,
    jacobian2_ptr,
    sums_ptr,
    entries,
    share,
    count1,
    count2,
    outputs,
    DIAGONAL: tl.constexpr,
    PAIRS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Program (tile of pairs, outputs a and b, split): the sum over ``share`` entries of J_a J'_b, in float64.

    jacobian: (entries, outputs * count), output first; sums as in ``gram_sums``. ENTRIES divides ``share``.
    """
    entries = entries.to(tl.int64)
    i, j, a, b, cell = pairs_of_program(count1, count2, outputs, DIAGONAL, PAIRS)
    count1 = count1.to(tl.int64)
    count2 = count2.to(tl.int64)
    left_ptr = jacobian1_ptr + a * count1 + i[:, None]
    right_ptr = jacobian2_ptr + b * count2 + j[None, :]
    total = tl.zeros((PAIRS, PAIRS), tl.float64)
    low = tl.program_id(2).to(tl.int64) * share
    for start in range(low, tl.minimum(low + share, entries), ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        inside = (i < count1)[:, None] & (entry < entries)[None, :]
        left = tl.load(left_ptr + entry[None, :] * (count1 * outputs), mask=inside, other=0.0).to(tl.float64)
        inside = (entry < entries)[:, None] & (j < count2)[None, :]
        right = tl.load(right_ptr + entry[:, None] * (count2 * outputs), mask=inside, other=0.0).to(tl.float64)
        total = tl.dot(left, right, total, input_precision="ieee", out_dtype=tl.float64)
    inside = (i < count1)[:, None] & (j < count2)[None, :]
    tl.store(sums_ptr + (cell * count1 + i[:, None]) * count2 + j[None, :], total, mask=inside)


@dataclass(frozen=True)
class Terms:
    """What is summed: pairs of outputs, and the parameters that are trained."""

    outputs: int
    diagonal: bool
    """Only pairs (a, a) of outputs."""
    weight: bool
    bias: bool
    tap: int
    """Size of the filters, 0 for the MLP."""

    @property
    def cells(self) -> int:
        """Pairs of outputs."""
        return self.outputs if self.diagonal else self.outputs**2


@dataclass(frozen=True)
class Side:
    """One argument of the tangent kernel at some layers: ``h`` (layers, m, *positions, out N), ``g`` (layers, n, ...).

    Column a N + i belongs to sample i under the gradient e_a of the output.
    """

    h: Tensor
    g: Tensor

    def factors(self, outputs: int) -> reference.Factors:
        """Of one layer, as the reference has them."""
        count = self.g.shape[-1] // outputs
        return 0, self.h[0, ..., :count], self.g[0].unflatten(-1, (outputs, count))


def add_linear(total: Tensor, left: Side, right: Side, terms: Terms) -> None:
    """Some layers' part of the MLP's tangent kernel to ``total``, (outputs a and b, N1, N2)."""
    layers, width = left.g.shape[:2]
    cells, count1, count2 = total.shape
    if left.h.shape[1] != width:  # the first and the last layer
        factors = left.factors(terms.outputs), right.factors(terms.outputs)
        part = reference.MLP.layer_gram(*factors, left.h, terms.weight, terms.bias)
        part = reference.reduced(part, reference.DIAGONAL) if terms.diagonal else part.flatten(2)
        total += part.movedim(-1, 0)
        return
    splits = triton.cdiv(layers, _LAYERS)
    sums = empty(total, splits, cells, count1, count2)
    grid = (triton.cdiv(count1, PAIRS) * triton.cdiv(count2, PAIRS), cells, splits)
    flags = {"WEIGHT": terms.weight, "BIAS": terms.bias, "DIAGONAL": terms.diagonal, "WIDTH": width}
    tensors = (left.h, left.g, right.h, right.g, sums)
    numbers = (layers, count1, count2, terms.outputs)
    launch(gram_sums, grid, *tensors, *numbers, num_warps=4, LAYERS=_LAYERS, PAIRS=PAIRS, **flags)
    total += sums.sum(0)


def _entries(side: Side, terms: Terms) -> int:
    """Of one layer's Jacobian."""
    units, channels = side.g.shape[1], side.h.shape[1]
    return units * (channels * terms.tap**2 * terms.weight + terms.bias)


def _jacobians(side: Side, terms: Terms) -> Tensor:
    """(layers * entries, out N)."""
    (layers, units, height, length, columns), channels = side.g.shape, side.h.shape[1] if terms.weight else 1
    rows = cnn.weight_gradient_rows(units, terms.tap)
    jacobians = empty(side.g, layers * _entries(side, terms), columns)
    samples = min(128, max(32, triton.next_power_of_2(columns)))
    blocks = triton.cdiv(columns, samples)
    grid = (layers * blocks, triton.cdiv(units, rows) * channels)
    shape = {"UNITS": units, "CHANNELS": channels, "TAP": terms.tap, "HEIGHT": height, "LENGTH": length}
    flags = {"WEIGHT": terms.weight, "BIAS": terms.bias, "ROWS": rows, "BLOCK": samples} | shape
    launch(filter_jacobians, grid, side.g, side.h, jacobians, columns, blocks, num_warps=samples // 32, **flags)
    return jacobians


def add_filters(total: Tensor, left: Side, right: Side, terms: Terms) -> None:
    """Some layers' part of the CNN's tangent kernel to ``total``, (outputs a and b, N1, N2)."""
    cells, count1, count2 = total.shape
    tiles = triton.cdiv(count1, TILE_PAIRS) * triton.cdiv(count2, TILE_PAIRS)
    bytes_a_layer = _entries(left, terms) * terms.outputs * max(count1, count2) * left.g.element_size()
    step = max(1, triton_chain.scratch_bytes(total.device) // bytes_a_layer)
    for first in range(0, left.g.shape[0], step):
        sides = [left] if right is left else [left, right]
        some = [Side(side.h[first : first + step], side.g[first : first + step]) for side in sides]
        jacobians = [_jacobians(side, terms) for side in some]
        entries = jacobians[0].shape[0]
        splits = min(_MOST_SPLITS, triton.cdiv(4 * MULTIPROCESSORS, tiles * cells), triton.cdiv(entries, TILE_ENTRIES))
        share = triton.cdiv(triton.cdiv(entries, splits), TILE_ENTRIES) * TILE_ENTRIES
        sums = empty(total, splits, cells, count1, count2)
        numbers = (entries, share, count1, count2, terms.outputs)
        flags = {"DIAGONAL": terms.diagonal, "PAIRS": TILE_PAIRS, "ENTRIES": TILE_ENTRIES}
        grid = (tiles, cells, splits)
        launch(pair_sums, grid, jacobians[0], jacobians[-1], sums, *numbers, num_warps=4, **flags)
        total += sums.sum(0)


def gram(
    chain: triton_chain.Family,
    add_layers: Callable[[Tensor, Side, Side, Terms], None],
    otherwise: reference.Family,
    x1: Tensor,
    x2: Tensor,
    first_weight: Tensor,
    first_bias: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    last_weight: Tensor,
    last_bias: Tensor,
    scale: float,
    offset: bool,
    symmetric: bool,
    trainable: int,
    reduce: int,
) -> Tensor:
    """As ``reference.gram``, which computes with ``otherwise`` what the kernels of ``chain`` do not."""
    params = (first_weight, first_bias, hidden_weight, hidden_bias, last_weight, last_bias)
    outputs, width = last_weight.shape[:2]
    layers, count1, count2 = hidden_weight.shape[0], x1.shape[0], x2.shape[0]
    if count1 == 0 or count2 == 0 or width > WIDEST or not chain.supported("backward", x1, hidden_weight):
        return reference.gram(otherwise, x1, x2, *params, scale, offset, symmetric, trainable, reduce)
    segment = max(2, round(layers**0.5))
    states = x1.new_empty(width, *x1.shape[2:], outputs * max(count1, count2), device="meta")
    step = triton_chain.layers_a_group(states, segment, x1.device)
    diagonal = reduce != reference.FULL

    def terms(bit: int) -> Terms:
        tap = last_weight.shape[-1] if last_weight.dim() == 4 else 0
        return Terms(outputs, diagonal, bool(trainable >> bit & 1), bool(trainable >> (bit + 1) & 1), tap)

    walks, iterators = [], []
    for x in [x1] if symmetric else [x1, x2]:  # the backward from every output at once
        repeated = x.repeat(outputs, *(1 for _ in x.shape[1:]))
        settings = ChainSettings(scale, offset, outputs, 0)
        saved = triton_chain.forward(chain, repeated, *params, *settings, segment)[1]
        seeds = torch.eye(outputs, dtype=x.dtype, device=x.device).repeat_interleave(x.shape[0], 0)
        walks.append(triton_chain.Descent(chain, repeated, ChainParams.of(params), saved, settings, segment, step))
        iterators.append(walks[-1].groups(seeds, True))
    total = x1.new_zeros(terms(0).cells, count1, count2, dtype=torch.float64)

    def add(sides: list[Side], terms: Terms) -> None:
        if terms.weight or terms.bias:
            add_layers(total, sides[0], sides[-1], terms)

    for groups in zip(*iterators, strict=True):
        add([Side(h, g) for _, _, h, g in groups], terms(2))
    tops, bottoms = [], []
    for walk in walks:
        assert walk.h_last is not None
        assert walk.r is not None
        tops.append(Side(walk.h_last[None], walk.r[None]))
        bottoms.append(Side(walk.input.movedim(0, -1).contiguous()[None], walk.full()[None]))
    add(tops, terms(4))
    add(bottoms, terms(0))
    kernel = total.permute(1, 2, 0)
    if reduce == reference.TRACE:
        kernel = kernel.sum(-1)
    elif reduce == reference.FULL:
        kernel = kernel.unflatten(-1, (outputs, outputs))
    if symmetric:  # what rounding has left of the difference
        mirrored = kernel.transpose(0, 1)
        kernel = (kernel + (mirrored.transpose(2, 3) if reduce == reference.FULL else mirrored)) / 2
    return kernel.contiguous()


mlp_gram = partial(gram, mlp.FAMILY, add_linear, reference.MLP)
cnn_gram = partial(gram, cnn.FAMILY, add_filters, reference.CNN)
