"""The tangent kernel and the Jacobian of a network in any state of training (thesis section 2.2).

For the narrow models the kernel is one op that streams over layers. Any other ``nn.Module`` goes through torch.func in
chunks of samples. Only parameters with ``requires_grad`` count: frozen ones are left out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from narrowdeep.modules import DeepNarrowCNN, DeepNarrowMLP
from narrowdeep.ntk.limit import check_alike
from narrowdeep.ops.gram import op, reference

Reduce = Literal["full", "trace", "diagonal"]
Narrow = DeepNarrowMLP | DeepNarrowCNN

_REDUCE = {"full": reference.FULL, "trace": reference.TRACE, "diagonal": reference.DIAGONAL}
_BLOCK_BYTES = 1 << 28
"""What the kernels of the narrow models may take for the samples of one block: more go block by block."""

_CHUNK_BYTES = 1 << 27
"""What the Jacobians of one chunk of samples may take in the fallback through torch.func."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def narrow_family(model: nn.Module) -> reference.Family | None:
    """How to compute with the model's layers, or None when it is not simply a narrow model.

    Raises: ValueError when a narrow model has hooks, which the fused kernels would pass over.
    """
    for kind, family in ((DeepNarrowMLP, reference.MLP), (DeepNarrowCNN, reference.CNN)):
        if isinstance(model, kind) and type(model).forward is kind.forward and not parametrize.is_parametrized(model):
            for hooks in _HOOKS:
                if getattr(model, hooks):
                    raise ValueError(
                        f"model must have no hooks, which its fused kernels would pass over: remove them, or wrap the "
                        f"model in nn.Sequential to go through torch.func, got {len(getattr(model, hooks))} in "
                        f"{hooks.strip('_')}"
                    )
            return family
    return None


def check_module(name: str, model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {type(model).__name__}")


def check_samples(model: nn.Module, name: str, x: Tensor) -> None:
    """Shape, dtype and device of one set of samples."""
    check_module("model", model)
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dim() == 0:
        raise ValueError(f"{name} must have a dimension of samples, got a scalar")
    if isinstance(model, DeepNarrowMLP) and (x.dim() != 2 or x.shape[1] != model.in_features):
        raise ValueError(f"{name} must have shape (N, {model.in_features}), got {tuple(x.shape)}")
    if isinstance(model, DeepNarrowCNN) and (x.dim() != 4 or x.shape[1] != model.in_channels or 0 in x.shape[2:]):
        raise ValueError(f"{name} must have shape (N, {model.in_channels}, H, W), got {tuple(x.shape)}")
    if isinstance(model, Narrow):
        if x.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} must be torch.float32 or torch.float64, got {x.dtype}")
        for other, param in model.named_parameters():
            check_alike(name, x, other, param)


def check_pair(model: nn.Module, x1: Tensor, x2: Tensor | None) -> None:
    """Shapes, dtypes and devices of the two sets of samples."""
    check_samples(model, "x1", x1)
    if x2 is None:
        return
    check_samples(model, "x2", x2)
    if x1.shape[1:] != x2.shape[1:]:
        raise ValueError(
            f"x1 and x2 must have the same shape after the first dimension, got {tuple(x1.shape)} and {tuple(x2.shape)}"
        )
    check_alike("x1", x1, "x2", x2)


def trainable_bits(model: Narrow) -> int:
    return sum(1 << i for i, param in enumerate(model.stacked()) if param.requires_grad)


def _ntk_scale(model: nn.Module, scaled: bool) -> float:
    return model.ntk_lr if scaled and isinstance(model, Narrow) else 1.0


@torch.no_grad()
def empirical_ntk(
    model: nn.Module, x1: Tensor, x2: Tensor | None = None, *, scaled: bool = True, reduce: Reduce = "full"
) -> Tensor:
    """The neural tangent kernel ``Theta(x, x') = J(x) J(x')^T`` of the model as it is now.

    Arguments:
        model: DeepNarrowMLP or DeepNarrowCNN, in either form, or any nn.Module that maps a batch (N, ...) to (N, out)
            or (N,), each row from its own sample alone. Parameters with ``requires_grad=False`` are left out.
        x1, x2: (N1, ...) and (N2, ...), of the model's dtype and device; ``x2=None`` stands for x1, half the work.
        scaled: divide by L C_L^2, the scaled NTK of thesis section 3.1.1. Other modules have neither L nor C_L, and
            theirs is not divided by anything.
        reduce: "full", all pairs of outputs; "trace", their diagonal summed; "diagonal", each output with itself.

    Returns: float64, (N1, N2, out, out), (N1, N2) or (N1, N2, out). Layers are summed in float64 whatever the dtype of
    the model. No gradient flows through it.

    Raises: TypeError or ValueError naming the argument, the rule and the value; ValueError for a narrow model that has
    hooks.
    """
    if not isinstance(reduce, str):
        raise TypeError(f"reduce must be a str, got {type(reduce).__name__}")
    if reduce not in _REDUCE:
        raise ValueError(f"reduce must be 'full', 'trace' or 'diagonal', got {reduce!r}")
    family = narrow_family(model)
    check_pair(model, x1, x2)
    if family is None:
        return _generic_ntk(model, x1, x2, _REDUCE[reduce])
    assert isinstance(model, Narrow)
    params = [param.detach() for param in model.stacked()]

    def gram(rows: Tensor, columns: Tensor, symmetric: bool) -> Tensor:
        settings = (model.scale, model.form == "offset", symmetric, trainable_bits(model), _REDUCE[reduce])
        return (op.mlp_gram if family is reference.MLP else op.cnn_gram)(rows, columns, *params, *settings)

    size = _samples_at_once(model, x1) // 2
    kernel = _in_blocks(gram, x1.detach(), None if x2 is None else x2.detach(), size, _REDUCE[reduce])
    return kernel.mul_(_ntk_scale(model, scaled))


def _samples_at_once(model: Narrow, x: Tensor) -> int:
    """How many samples' states and gradients the kernels can hold in ``_BLOCK_BYTES``, at least two."""
    outputs, width = model.last_weight.shape[:2]
    if isinstance(model, DeepNarrowCNN):
        states = 2 * math.isqrt(2 * model.depth) + 4 * outputs  # saved and of a segment, gradients
        each = states * width * math.prod(x.shape[2:]) + outputs * model.in_chunks("hidden_weight")[0][:1].numel()
    else:
        each = (model.depth // 4 + 13 * outputs) * width
    return max(2, _BLOCK_BYTES // (each * x.element_size()))


def _in_blocks(
    gram: Callable[[Tensor, Tensor, bool], Tensor], x1: Tensor, x2: Tensor | None, size: int, reduce: int
) -> Tensor:
    """``gram(x1, x2, x2 is None)`` from blocks of at most ``size`` rows and columns."""
    columns = x1 if x2 is None else x2
    if max(x1.shape[0], columns.shape[0]) <= size or x1.shape[0] == 0 or columns.shape[0] == 0:
        return gram(x1, columns, x2 is None)
    kernel = torch.empty(0)
    for i in range(0, x1.shape[0], size):
        for j in range(i if x2 is None else 0, columns.shape[0], size):
            block = gram(x1[i : i + size], columns[j : j + size], x2 is None and i == j)
            if i == j == 0:
                kernel = block.new_empty(x1.shape[0], columns.shape[0], *block.shape[2:])
            kernel[i : i + size, j : j + size] = block
            if x2 is None and i < j:
                mirrored = block.transpose(0, 1)
                kernel[j : j + size, i : i + size] = mirrored.transpose(2, 3) if reduce == reference.FULL else mirrored
    return kernel


def jacobian(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The Jacobian of every sample's output with respect to every parameter.

    Arguments:
        model, x: as in ``empirical_ntk``; x (N, ...).

    Returns: parameter name -> (N, out, *parameter shape), in the model's dtype, without the frozen parameters. For a
    DeepNarrowMLP: ``first_weight`` (N, out, n, in), ``first_bias`` (N, out, n), ``hidden_weight`` (N, out, L-2, n, n),
    ``hidden_bias`` (N, out, L-2, n), ``last_weight`` (N, out, out, n), ``last_bias`` (N, out, out); a DeepNarrowCNN's
    weights have (f, f) at the end. Together that is N out times the size of the parameters:
    ``ntk_vector_product`` and ``empirical_ntk`` need far less.

    Raises: as ``empirical_ntk``.
    """
    family = narrow_family(model)
    check_samples(model, "x", x)
    if family is None:
        chunks = [chunk for _, chunk in _jacobian_chunks(model, x)]
        return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
    assert isinstance(model, Narrow)
    with torch.no_grad():
        params = tuple(param.detach() for param in model.stacked())
        outputs = params[4].shape[0]
        result = {
            name: param.new_empty(x.shape[0], outputs, *param.shape)
            for name, param in model.named_parameters()
            if param.requires_grad
        }
        if x.shape[0] == 0:
            return result
        factors = reference.layer_factors(family, x.detach(), params, model.scale, model.form == "offset")
        for layer, h, b in factors:
            part = {1: "first", model.depth: "last"}.get(layer, "hidden")
            where = (slice(None), slice(None), layer - 2) if part == "hidden" else ...
            if f"{part}_weight" in result:
                weight = getattr(model, f"{part}_weight")
                result[f"{part}_weight"][where] = family.weight_jacobian(b, h, weight)
            if f"{part}_bias" in result:
                result[f"{part}_bias"][where] = reference.bias_jacobian(b)
    return result


def ntk_vector_product(model: nn.Module, x1: Tensor, x2: Tensor, v: Tensor, *, scaled: bool = True) -> Tensor:
    """``Theta(x1, x2) @ v`` without forming Theta: a product with J(x2)^T (vjp), then one with J(x1) (jvp).

    Time and memory are those of a forward, a backward and a jvp of the model, so that iterative solvers run on kernels
    that do not fit in memory.

    Arguments:
        model, x1, x2, scaled: as in ``empirical_ntk``.
        v: (N2, out), in the model's dtype.

    Returns: (N1, out): ``sum_jb Theta(x1_i, x2_j)_ab v_jb``, in the model's dtype.

    Raises: as ``empirical_ntk``; ValueError when v has another shape than the outputs at x2.
    """
    narrow_family(model)
    check_samples(model, "x2", x2)  # here None does not stand for x1
    check_pair(model, x1, x2)
    function = _function(model)
    params = _trainable(model)
    if not isinstance(v, Tensor):
        raise TypeError(f"v must be a torch.Tensor, got {type(v).__name__}")
    with torch.no_grad():
        out = function(params, x2[:1])
        if v.shape != (x2.shape[0], out.shape[1]):
            raise ValueError(f"v must have shape ({x2.shape[0]}, {out.shape[1]}), as the outputs, got {tuple(v.shape)}")
        if v.dtype != out.dtype:
            raise TypeError(f"v must have the dtype of the outputs, {out.dtype}, got {v.dtype}")
        if not params or not x1.shape[0] or not x2.shape[0]:
            return out.new_zeros(x1.shape[0], out.shape[1])
        pull_back = torch.func.vjp(lambda p: function(p, x2), params)[1]
        product = torch.func.jvp(lambda p: function(p, x1), (params,), pull_back(v))[1]
    return product * _ntk_scale(model, scaled)


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach() for name, param in model.named_parameters() if param.requires_grad}


def _function(model: nn.Module) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    """(trainable parameters, x (N, ...)) -> (N, out)."""
    fixed = {name: param.detach() for name, param in model.named_parameters() if not param.requires_grad}
    fixed.update((name, buffer.detach()) for name, buffer in model.named_buffers())

    def function(params: dict[str, Tensor], x: Tensor) -> Tensor:
        out = torch.func.functional_call(model, {**fixed, **params}, (x,))
        if out.dim() == 1 and out.shape[0] == x.shape[0]:
            out = out.unsqueeze(1)
        if out.dim() != 2 or out.shape[0] != x.shape[0]:
            raise ValueError(f"model must map (N, ...) to (N, out) or (N,), got {tuple(x.shape)} -> {tuple(out.shape)}")
        return out

    return function


def _jacobian_chunks(model: nn.Module, x: Tensor, first: int = 0) -> Iterator[tuple[slice, dict[str, Tensor]]]:
    """(rows of x from ``first`` on, their Jacobians (rows, out, *parameter)) through torch.func.

    At least one chunk from row 0, so that no samples and no parameters have shapes too.
    """
    function, params = _function(model), _trainable(model)

    def of_one(params: dict[str, Tensor], sample: Tensor) -> Tensor:
        return function(params, sample.unsqueeze(0)).squeeze(0)

    with torch.no_grad():
        outputs = function(params, x[:1]).shape[1]
        if not x.shape[0] or not params:
            yield slice(0, x.shape[0]), {name: p.new_zeros(x.shape[0], outputs, *p.shape) for name, p in params.items()}
            return
        bytes_each = outputs * sum(p.numel() * p.element_size() for p in params.values())
        size = max(1, _CHUNK_BYTES // bytes_each)
        for start in range(first, x.shape[0], size):
            rows = slice(start, min(start + size, x.shape[0]))
            yield rows, torch.func.vmap(torch.func.jacrev(of_one), (None, 0))(params, x[rows].detach())


def _generic_ntk(model: nn.Module, x1: Tensor, x2: Tensor | None, reduce: int) -> Tensor:
    outputs = _function(model)(_trainable(model), x1[:1]).shape[1]
    columns = x1 if x2 is None else x2
    shape = x1.new_empty(x1.shape[0], columns.shape[0], outputs, outputs)
    kernel = torch.zeros(reference.reduced(shape, reduce).shape, dtype=torch.float64, device=x1.device)
    if not kernel.numel() or not _trainable(model):
        return kernel
    for rows, left in _jacobian_chunks(model, x1):
        if x2 is None:  # the other half is mirrored, and the diagonal has its Jacobian already
            pairs = itertools.chain([(rows, left)], _jacobian_chunks(model, x1, rows.stop))
        else:
            pairs = itertools.chain(_jacobian_chunks(model, columns))
        for others, right in pairs:
            block = torch.zeros((), dtype=torch.float64, device=x1.device)
            for name in left:
                a, b = left[name].flatten(2).double(), right[name].flatten(2).double()
                if reduce == reference.FULL:
                    block = block + torch.einsum("iap,jbp->ijab", a, b)
                elif reduce == reference.TRACE:
                    block = block + torch.einsum("iap,jap->ij", a, b)
                else:
                    block = block + torch.einsum("iap,jap->ija", a, b)
            kernel[rows, others] = block
            if x2 is None and others.start > rows.start:
                mirrored = block.transpose(0, 1)
                kernel[others, rows] = mirrored.transpose(2, 3) if reduce == reference.FULL else mirrored
    return kernel
