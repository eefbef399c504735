"""The tangent kernel at initialisation as a Gram matrix of explicit features (thesis sections 3.1 and 4.0.1).

At initialisation output a reads the right unit a of every layer through identities, and nothing else: df_a/dz_l is the
unit vector of that unit (the mean over positions of a convolution), whatever x is. The kernel is then a multiple of the
identity over outputs,

    k(x, x') = sum_l (<s(h_{l-1}), s(h'_{l-1})> + 1) / (L C_L^2)

with s(h) = h for an MLP and, for a convolution, the mean over positions of h seen through each tap of the filter.
Of a hidden state the left units are C_L relu(x) and the right units C_L in every layer; the middle unit, of weights u_l
and bias v_l, is relu(u_l C_L relu(x) + v_l), and relu(u_1 x + v_1) in the first. No layer needs the one before it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from narrowdeep.modules.base import PARAMETER_NAMES
from narrowdeep.ntk.empirical import checked_samples
from narrowdeep.ntk.network import Narrow, Ours, check_module, find, reading

_BLOCK_BYTES = 1 << 27
"""What the features of a block of layers may take."""

_PATCH_BYTES = 1 << 23
"""What the patches of a block of samples may take in a sum over samples, which needs a copy of no more."""

_TILE_BYTES = 1 << 21
"""What the middle units of a convolution, at all positions, of a tile of samples may take: they stay in the cache."""

_TILE_LAYERS = 256
"""In a tile, at most: what multiplies few layers, or few samples, is not read often enough."""


class OutputGradients(NamedTuple):
    """``J^T v`` in the rows of the right units, float64: the same in all layers, but for the middle unit's column.

    Nothing where no weight, or no bias, of that kind is trained.
    """

    first: Tensor
    """(out, in, f f), of the first weight"""
    others: Tensor
    """(out, n, f f), of every other weight, without the column of the middle unit"""
    middle: Tensor
    """(layers, out, f f): that column, of every weight but the first that is trained"""
    bias: Tensor
    """(out,)"""


@dataclass(frozen=True)
class InitialFeatures:
    """What the features of a model at its initialisation are made of: copies, so the model may be trained afterwards.

    A layer counts where its weight, or its bias, requires gradients.
    """

    scale: float
    depth: int
    outputs: int
    kernel_size: int
    first: bool
    """Whether the first weight is trained."""
    weights: int
    """How many of the other weights are."""
    biases: int
    middle_first: Tensor
    """(0 or 1, c f f): the first layer's u, where the weight that reads its unit is trained."""
    middle_first_bias: Tensor
    middle: Tensor
    """(layers, c f f): the hidden layers', likewise."""
    middle_bias: Tensor
    every: int = 1
    """The hidden layers of ``middle`` stand for so many each."""

    @classmethod
    def of(cls, model: nn.Module, ours: Ours | None) -> InitialFeatures:
        """Raises: ValueError for a model that is not a narrow one at its initialisation."""
        if ours is None or ours.family is None or ours.tied():
            raise ValueError(
                "model must be a DeepNarrowMLP or DeepNarrowCNN as the library makes it, alone or at the end of an "
                f"nn.Sequential of modules without parameters, to have features, got {type(model).__name__}"
            )
        narrow, flags = ours.model, ours.layer_flags()
        _check_initial(narrow)
        inputs = narrow.first_weight.shape[1]
        read = [weight for weight, _ in flags[1:]]  # by the weight of the layer after it
        first_weight, first_bias = narrow.first_weight.detach(), narrow.first_bias.detach()
        hidden_weight = [chunk.detach()[:, inputs, :inputs].flatten(1) for chunk in narrow.in_chunks("hidden_weight")]
        hidden_bias = [chunk.detach()[:, inputs] for chunk in narrow.in_chunks("hidden_bias")]
        kept = torch.tensor(read[1:], dtype=torch.bool, device=first_bias.device)
        begin = slice(inputs, inputs + 1 if read[0] else inputs)
        return cls(
            scale=narrow.scale,
            depth=narrow.depth,
            outputs=narrow.last_weight.shape[0],
            kernel_size=math.isqrt(first_weight[0, 0].numel()),
            first=flags[0][0],
            weights=sum(read),
            biases=sum(bias for _, bias in flags),
            middle_first=first_weight[begin].flatten(1).clone(),
            middle_first_bias=first_bias[begin].clone(),
            middle=torch.cat(hidden_weight)[kept],
            middle_bias=torch.cat(hidden_bias)[kept],
        )

    def like(self, values: dict[str, Any]) -> InitialFeatures:
        """The same features with the tensors of another's ``dataclasses.asdict``.

        Raises: ValueError where ``values`` are of a network of other settings or sizes.
        """
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name, value in own.items():
            expected = value.shape if isinstance(value, Tensor) else value
            found = values.get(name) if isinstance(values, dict) else None
            found = found.shape if isinstance(found, Tensor) else found
            if found != expected:
                raise ValueError(f"features must have {name} {expected} as the model's, got {found}")
        tensors = {name: values[name].to(value) for name, value in own.items() if isinstance(value, Tensor)}
        return dataclasses.replace(self, **tensors)

    def are_of(self, model: nn.Module, ours: Ours | None) -> bool:
        """Whether the model is at the initialisation that they are made of, with the same parameters trained."""
        try:
            now = InitialFeatures.of(model, ours)
        except ValueError:
            return False
        pairs = [(getattr(self, field.name), getattr(now, field.name)) for field in dataclasses.fields(self)]
        return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)

    def thinned(self, every: int) -> InitialFeatures:
        """Of one hidden layer in ``every``. Their Gram matrix is about the same: the weights are independent draws."""
        middle, bias = self.middle[::every], self.middle_bias[::every]
        return dataclasses.replace(self, every=every, middle=middle, middle_bias=bias)

    def count(self, inputs: int) -> int:
        """F, of samples with ``inputs`` features or channels."""
        taps = self.kernel_size**2
        units = len(self.middle_first) + len(self.middle)
        return inputs * taps * (self.first + (self.weights > 0)) + units * taps + 1

    def matrix(self, x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """(N, F), of samples (N, in) or (N, c, H, W)."""
        out, begin = x.new_empty(x.shape[0], self.count(x.shape[1]), dtype=dtype), 0
        for block in self.blocks(x, dtype):
            out[:, begin : begin + block.shape[1]] = block
            begin += block.shape[1]
        return out

    def are_finite(self, x: Tensor) -> bool:
        """Whether no hidden state of x overflows in its dtype, by a bound; False for x that is not finite."""
        largest = self.scale * float(x.abs().max()) if x.numel() else 0.0
        weights = torch.cat([self.middle_first, self.middle]).abs().sum(1)
        biases = torch.cat([self.middle_first_bias, self.middle_bias]).abs()
        weight, bias = (float(part.max()) if len(part) else 0.0 for part in (weights, biases))
        return largest * max(1.0, weight) + bias + self.scale < torch.finfo(x.dtype).max

    def output_gradients(self, x: Tensor, v: Tensor, advance: Callable[[float], None]) -> OutputGradients:
        """``J^T v`` for samples x and v (N, out): the features times v, each by what its column was divided by.

        ``advance`` is called with the samples done.
        """
        taps, inputs, v = self.kernel_size**2, x.shape[1], v.double()
        columns = v.new_zeros(self.count(inputs), v.shape[1])
        size = max(1, _PATCH_BYTES // max(1, 8 * taps * x[:1].numel()))
        for part, rows in zip(x.split(size), v.split(size), strict=True):
            begin = 0
            for block in self.blocks(part):
                columns[begin : begin + block.shape[1]].addmm_(block.T, rows)
                begin += block.shape[1]
            advance(len(part))
        unit = self.scale * math.sqrt(self.depth)
        ends = [inputs * taps * self.first, inputs * taps * (self.weights > 0), 1]
        first, left, _, middle = columns.split([*ends, len(columns) - sum(ends)])
        bias = v.sum(0)
        others = v.new_zeros(self.outputs, inputs + 1 + self.outputs, taps)
        if self.weights:
            others[:, :inputs] = unit / math.sqrt(self.weights) * left.T.reshape(self.outputs, inputs, taps)
            seen = _windows(self.kernel_size, (x if x.dim() == 4 else x[:, :, None, None]).double())
            others[:, inputs + 1 :] = self.scale * bias[:, None, None] * seen.sum(0)
        return OutputGradients(
            unit * first.T.reshape(self.outputs, -1, taps),
            others,
            unit * middle.reshape(-1, taps, self.outputs).transpose(1, 2),
            bias,
        )

    def blocks(self, x: Tensor, dtype: torch.dtype = torch.float64) -> Iterator[Tensor]:
        """The columns of ``matrix``, a block of layers at a time."""
        images = (x if x.dim() == 4 else x[:, :, None, None]).to(dtype)
        seen = _windows(self.kernel_size, images)
        first, others, share = images / self.scale, images.relu(), math.sqrt(1 / self.depth)
        if self.first:
            yield (first.flatten(2) @ seen).flatten(1).mul_(share)
        if self.weights:
            yield (others.flatten(2) @ seen).flatten(1).mul_(share * math.sqrt(self.weights))
        right = self.weights * self.outputs * float(seen.sum(0).square().sum())
        constant = share * math.sqrt(right + self.biases / self.scale / self.scale)
        yield torch.full((len(x), 1), constant, dtype=dtype, device=x.device)
        positions, taps = seen.shape
        size = max(1, _BLOCK_BYTES // max(1, len(x) * taps * images.element_size()))
        if positions > 1:
            size = min(size, _TILE_LAYERS)
        tile = max(1, _TILE_BYTES // (positions * size * images.element_size()))
        units = (
            (first, self.middle_first, self.middle_first_bias, share),
            (others, self.middle, self.middle_bias, share * math.sqrt(self.every)),
        )
        for h, weight, bias, share in units:
            for u, v in zip(weight.split(size), bias.split(size), strict=True):
                # relu(share z) = share relu(z): no pass over (N, H W, layers) for it.
                scaled = u.to(dtype) * share, v.to(dtype) * (share / self.scale)
                if positions == taps == 1:
                    yield functional.linear(h.flatten(1), *scaled).relu_()
                    continue
                block = h.new_empty(len(h), len(u), taps)
                for part, rows in zip(h.split(tile), block.split(tile), strict=True):
                    patches = functional.unfold(part, self.kernel_size, padding=self.kernel_size // 2)
                    middle = functional.linear(patches.transpose(1, 2), *scaled).relu_()
                    rows.copy_(middle.transpose(1, 2) @ seen)
                yield block.flatten(1)


def _windows(kernel_size: int, images: Tensor) -> Tensor:
    """(H W, f f): 1/(H W) where a tap of the filter, moved over all positions of the output, reads a position."""
    sides = []
    for size in images.shape[2:]:
        position = torch.arange(size, device=images.device)[:, None]
        output = position - torch.arange(kernel_size, device=images.device) + kernel_size // 2
        sides.append(((output >= 0) & (output < size)).to(images.dtype) / size)
    rows, columns = sides
    return torch.einsum("ps,qt->pqst", rows, columns).reshape(len(rows) * len(columns), kernel_size**2)


def _check_initial(model: Narrow) -> None:
    """Raises: ValueError where anything but u and v differs from the identity part."""
    inputs = model.first_weight.shape[1]
    drawn = {
        "first_weight": (inputs,),
        "first_bias": (inputs,),
        "hidden_weight": (slice(None), inputs, slice(inputs)),
        "hidden_bias": (slice(None), inputs),
    }
    base = model.identity_part() if model.form == "plain" else {}
    for name in PARAMETER_NAMES:
        for chunk in model.in_chunks(name):
            size = max(1, _BLOCK_BYTES // 8 // max(1, chunk[:1].numel())) if "hidden" in name else max(1, len(chunk))
            for part in chunk.detach().split(size):
                allowed = part[drawn[name]].count_nonzero() if name in drawn else 0
                moved = (part - base[name] if base else part).count_nonzero() - allowed
                if moved:
                    raise ValueError(
                        "model must be at its initialisation (init='ntk', not trained) to have features: "
                        f"{int(moved)} entries of {name} are not what the initialisation has (take empirical_ntk, or "
                        "the features of a fresh copy)"
                    )


def features(model: nn.Module, x: Tensor, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """Features whose Gram matrix is the scaled tangent kernel of a model at its initialisation.

    ``features(model, x) @ features(model, x').T`` is the kernel of every output, exact up to rounding at any depth:
    ``empirical_ntk(model, x, x')[:, :, a, b]`` for a = b, which is 0 for a != b. One product of matrices in place of
    a forward and a backward for each output, so thousands of samples take seconds.

    Arguments:
        model: DeepNarrowMLP or DeepNarrowCNN at its initialisation, in either form and any number of chunks, alone
            or at the end of an nn.Sequential of modules without parameters. Parameters with ``requires_grad=False``
            are left out, whole chunks of them as well.
        x: (N, in) or (N, c, H, W), of the model's dtype and device.
        dtype: of the features and what they are computed in.

    Returns: (N, F). For an MLP F is about ``depth + 2 in``: the inputs twice (before and after the first ReLU), the
    middle unit of each hidden state, and a constant. For a CNN each but the constant is there once for each tap of the
    filter.

    Raises: TypeError or ValueError naming the argument, the rule and the value; ValueError for a model that is trained.

    Examples:
        >>> import torch
        >>> from narrowdeep import DeepNarrowMLP
        >>> from narrowdeep.ntk import empirical_ntk, features
        >>> model, x = DeepNarrowMLP(2, 1, depth=100, dtype=torch.float64), torch.rand(5, 2, dtype=torch.float64)
        >>> phi = features(model, x)
        >>> torch.allclose(phi @ phi.T, empirical_ntk(model, x, reduce="trace", scaled=True))
        True
    """
    check_module("model", model)
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    ours = find(model)
    with reading(model):
        found = InitialFeatures.of(model, ours)
        return found.matrix(checked_samples(model, ours, "x", x), dtype)
