"""The MLP chain's tangent kernel on a GPU: h and B of a group of layers from the chain kernels, then their Gram sums.

A layer adds ``(<h, h'> + 1) <B_a, B'_b>`` to Theta_ab (thesis section 3.2): two products of length n, so a lane takes
one pair of samples through all layers of a group and nothing of the size of a Jacobian is ever formed. The sum is
float64 and its order depends on the shapes alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from narrowdeep.ops import layered, triton_chain
from narrowdeep.ops.gram import reference
from narrowdeep.ops.mlp.triton import FAMILY
from narrowdeep.ops.triton_common import empty, launch

WIDEST = 16
"""Widest layer of the kernel: the products over units are unrolled."""

PAIRS = 16
"""Samples of x1, and of x2, in a program's tile of pairs."""

_LAYERS = 64
"""Layers that one program sums: the layers of a group are split over programs, their sums added in order."""


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
    count1 = count1.to(tl.int64)
    count2 = count2.to(tl.int64)
    tiles = tl.cdiv(count2, PAIRS)
    i = tl.program_id(0) // tiles * PAIRS + tl.arange(0, PAIRS)
    j = tl.program_id(0) % tiles * PAIRS + tl.arange(0, PAIRS)
    if DIAGONAL:
        a = tl.program_id(1)
        b = tl.program_id(1)
    else:
        a = tl.program_id(1) // outputs
        b = tl.program_id(1) % outputs
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
    row = (tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * count1 + i
    inside = (i < count1)[:, None] & (j < count2)[None, :]
    tl.store(sums_ptr + row[:, None] * count2 + j[None, :], total, mask=inside)


def _factors(h: Tensor | None, g: Tensor | None, outputs: int, layer: int) -> reference.Factors:
    """One layer's input (m, out N) and G (n, out N) as the reference has them."""
    assert h is not None
    assert g is not None
    return layer, h[:, : h.shape[1] // outputs], g.unflatten(-1, (outputs, g.shape[1] // outputs))


def _descend(
    x: Tensor, params: layered.Params, scale: float, offset: bool, segment: int, step: int
) -> triton_chain.Descent:
    """The backward from every output at once: sample (a, i) is x_i under the output gradient e_a."""
    saved = triton_chain.forward(FAMILY, x, *params, scale, offset, segment)[1]
    return triton_chain.Descent(FAMILY, x, params, saved, scale, offset, segment, step)


def mlp_gram(
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
    """As ``reference.gram``."""
    params = (first_weight, first_bias, hidden_weight, hidden_bias, last_weight, last_bias)
    outputs, width = last_weight.shape
    layers, count1, count2 = hidden_weight.shape[0], x1.shape[0], x2.shape[0]
    if count1 == 0 or count2 == 0 or width > WIDEST or not FAMILY.supported("backward", x1, hidden_weight):
        settings = (scale, offset, symmetric, trainable, reduce)
        return reference.gram(reference.MLP, x1, x2, *params, *settings)
    segment = max(2, round(layers**0.5))
    states = x1.new_empty(width, outputs * max(count1, count2), device="meta")
    step = triton_chain.layers_a_group(states, segment)
    xs = [x1] if symmetric else [x1, x2]
    walks = [_descend(x.repeat(outputs, 1), params, scale, offset, segment, step) for x in xs]
    seeds = [torch.eye(outputs, dtype=x.dtype, device=x.device).repeat_interleave(x.shape[0], 0) for x in xs]
    diagonal = reduce != reference.FULL
    cells = outputs if diagonal else outputs**2
    total = x1.new_zeros(cells, count1, count2, dtype=torch.float64)
    has = [bool(trainable >> bit & 1) for bit in range(6)]
    iterators = [walk.groups(seed, True) for walk, seed in zip(walks, seeds, strict=True)]
    for sides in zip(*iterators, strict=True):
        first, last, h1, g1 = sides[0]
        _, _, h2, g2 = sides[-1]
        if has[2] or has[3]:
            splits = triton.cdiv(last - first, _LAYERS)
            sums = empty(total, splits, cells, count1, count2)
            grid = (triton.cdiv(count1, PAIRS) * triton.cdiv(count2, PAIRS), cells, splits)
            flags = {"WEIGHT": has[2], "BIAS": has[3], "DIAGONAL": diagonal, "WIDTH": width}
            tensors = (h1, g1, h2, g2, sums)
            numbers = (last - first, count1, count2, outputs)
            launch(gram_sums, grid, *tensors, *numbers, num_warps=4, LAYERS=_LAYERS, PAIRS=PAIRS, **flags)
            total += sums.sum(0)
    kernel = total if diagonal else total.unflatten(0, (outputs, outputs))
    kernel = kernel.permute(1, 2, 0) if diagonal else kernel.permute(2, 3, 0, 1)
    tops = [(walk.h_last, walk.r) for walk in walks]
    bottoms = [(x.t().repeat(1, outputs), walk.full) for x, walk in zip(xs, walks, strict=True)]
    for layer, bit, pairs in ((layers + 2, 4, tops), (1, 0, bottoms)):
        if has[bit] or has[bit + 1]:
            left, right = (_factors(h, g, outputs, layer) for h, g in (pairs[0], pairs[-1]))
            part = reference.MLP.layer_gram(left, right, params[bit], has[bit], has[bit + 1])
            kernel = kernel + (reference.reduced(part, reference.DIAGONAL) if diagonal else part)
    if reduce == reference.TRACE:
        kernel = kernel.sum(-1)
    if symmetric:  # what rounding has left of the difference
        mirrored = kernel.transpose(0, 1)
        kernel = (kernel + (mirrored.transpose(2, 3) if reduce == reference.FULL else mirrored)) / 2
    return kernel.contiguous()
