"""Exported programs that run where this library is not installed: ONNX, and whatever else takes torch.export's.

``torch.export.export`` keeps a chain as one node, an op of the engine. Here it becomes a scan: one loop whose body is a
layer of ``narrowdeep.ops.reference``, over weights that stay stacked. It computes what the op does, in the same words
of the offset form and with the exact sums at the same states, so that it differs by the rounding of its products alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan_op  # torch's public scan compiles, which a trace cannot

from narrowdeep.chain.family import FAMILIES
from narrowdeep.ops import reference
from narrowdeep.ops.mlp.reference import linear
from narrowdeep.ops.params import ForwardArgs

__all__ = ["decompositions"]


def _convolution(weight: Tensor, h: Tensor) -> Tensor:
    """As the reference's, in one node."""
    return torch.nn.functional.conv2d(h.movedim(-1, 0), weight, padding=weight.shape[-1] // 2).movedim(0, -1)


_AFFINE: dict[str, reference.LinearMap] = {"mlp": linear, "cnn": _convolution}


def _forward(affine: reference.LinearMap, *args: Any) -> tuple[Tensor, Tensor]:
    """``reference.forward`` with its loop as a scan; nothing is saved, as a program has no backward."""
    input, params, (scale, offset, outputs, start), _ = ForwardArgs.of(args)
    first, hidden, last = params
    words = reference.initial(affine, input, first, outputs, scale, offset)
    base, hi, lo = (word.clone() for word in words)  # a scan takes no two views of one tensor
    skip = reference.skip_mask(lo, outputs, offset)
    numbers = torch.arange(start + 1, start + 1 + params.layers, device=lo.device)

    def layer(
        hi: Tensor, lo: Tensor, weight: Tensor, bias: Tensor, due: Tensor, base: Tensor, skip: Tensor
    ) -> tuple[Tensor, Tensor]:
        lo = reference.step(affine, skip, base, hi, lo, weight, bias)
        if not offset:
            return hi.clone(), lo
        moved = reference.renormalise(base, hi, lo, skip)
        return torch.where(due, moved[0], hi), torch.where(due, moved[1], lo)

    if params.layers:
        due = numbers % reference.RENORMALISE_PERIOD == 0
        hi, lo = scan_op(layer, (hi, lo), (*hidden, due), (base, skip))
    output = reference.final(affine, base, hi, lo, last, outputs, offset)
    return output, output.new_empty(0)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """For ``ExportedProgram.run_decompositions``: what turns each chain, or each of its chunks, into a scan.

    The graph then has torch's own ops alone, a few dozen of them whatever the depth, and the parameters as they are in
    the model: stacked, W - E in offset form. ``torch.onnx.export`` writes it as ONNX, a chain as a ``Scan``. For
    inference. A program that keeps our op, for torch.export.save or AOTInductor, is 100 times as fast at small widths,
    and needs ``import narrowdeep.export`` in the process that runs it.

    Returns: op -> function that computes it.

    Examples:
        >>> import torch
        >>> import narrowdeep
        >>> model, x = narrowdeep.DeepNarrowMLP(2, 1, depth=1000), torch.rand(8, 2)
        >>> batch = torch.export.Dim("batch")
        >>> program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
        >>> program = program.run_decompositions(narrowdeep.export.decompositions())
        >>> len(program.graph.find_nodes(op="call_function", target=torch.ops.higher_order.scan))
        1
        >>> x = torch.rand(500, 2)
        >>> torch.allclose(program.module()(x), model(x), rtol=1e-6, atol=1e-6)
        True
    """
    return {family.ops.forward: partial(_forward, _AFFINE[name]) for name, family in FAMILIES.items()}
