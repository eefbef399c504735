"""The tangent kernel and the Jacobian of a network in any state of training (thesis section 2.2).

For the narrow models the kernel is one op that streams over layers. Any other ``nn.Module`` goes through torch.func in
chunks of samples. Only parameters with ``requires_grad`` count: frozen ones are left out, one that stands in several
places is one parameter, and one that the output does not depend on has the derivative 0.

Everything here is computed in the model's dtype whatever the global modes (autocast, inference mode, the precision of
float32 products), and leaves the model, its buffers and the random state as they were.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from narrowdeep.functional import check_tensor
from narrowdeep.modules import DeepNarrowCNN
from narrowdeep.ntk.modes import check_alike
from narrowdeep.ntk.network import (
    Function,
    Narrow,
    Ours,
    cast_to,
    check_alone,
    check_batch,
    check_module,
    check_samples,
    find,
    function_of,
    plain,
    reading,
)
from narrowdeep.ops.gram import op, reference

Reduce = Literal["full", "trace", "diagonal"]

_REDUCE = {"full": reference.FULL, "trace": reference.TRACE, "diagonal": reference.DIAGONAL}
_BLOCK_BYTES = 1 << 28
"""What the kernels of the narrow models may take for the samples of one block: more go block by block."""

_CHUNK_BYTES = 1 << 27
"""What the Jacobians of one chunk of samples may take in the fallback through torch.func."""


def checked_samples(model: nn.Module, ours: Ours | None, name: str, x: Tensor) -> Tensor:
    """x as what is differentiated takes it: after the modules before a narrow model, as it is for any other model.

    Raises: TypeError or ValueError for a wrong type, shape, dtype or device.
    """
    x = cast_to(model, x)
    if ours is None or ours.family is None:
        check_batch(model, name, x)
        return plain(x)
    if ours.before:
        check_alone(model)
        check_batch(model, name, x)
        x, name = ours.samples(plain(x)), f"{name} after the modules before the network"
    check_samples(ours.model, name, x)
    return plain(x)


def _pair(model: nn.Module, ours: Ours | None, x1: Tensor, x2: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both sets of samples, checked, as ``checked_samples`` gives them."""
    left = checked_samples(model, ours, "x1", x1)
    if x2 is None:
        return left, None
    right = checked_samples(model, ours, "x2", x2)
    if x1.shape[1:] != x2.shape[1:]:
        raise ValueError(
            f"x1 and x2 must have the same shape after the first dimension, got {tuple(x1.shape)} and {tuple(x2.shape)}"
        )
    check_alike("x1", left, "x2", right)
    return left, right


def _factor(model: nn.Module, ours: Ours | None, scaled: Any) -> float:
    """What the kernel is multiplied by.

    Raises: ValueError where ``scaled=True`` is asked of a module that has neither L nor C_L.
    """
    if scaled is not None and not isinstance(scaled, (bool, np.bool_)):
        raise TypeError(f"scaled must be True, False or None, got {scaled!r}")
    if ours is not None:
        return 1.0 if scaled is not None and not scaled else ours.model.ntk_lr
    if scaled:
        raise ValueError(
            "scaled must be False or left out for a module that is not a DeepNarrowMLP or DeepNarrowCNN, alone or at "
            f"the end of an nn.Sequential of modules without parameters: it has no L C_L^2, got {type(model).__name__}"
        )
    return 1.0


def empirical_ntk(
    model: nn.Module, x1: Tensor, x2: Tensor | None = None, *, scaled: bool | None = None, reduce: Reduce = "full"
) -> Tensor:
    """The neural tangent kernel ``Theta(x, x') = J(x) J(x')^T`` of the model as it is now.

    Arguments:
        model: DeepNarrowMLP or DeepNarrowCNN, in either form and any number of chunks, or any nn.Module that maps a
            batch (N, ...) to (N, out) or (N,), each row from its own sample alone. An nn.Sequential of modules without
            parameters and a narrow model at its end is that narrow model on what they make of x; so are torch.compile's
            and DistributedDataParallel's wrappers. A narrow model that is parametrized, or whose ``forward`` is
            replaced, is called as any other module. Parameters with ``requires_grad=False`` are left out.
        x1, x2: (N1, ...) and (N2, ...), of the model's dtype and device; ``x2=None`` stands for x1, half the work.
        scaled: True divides by L C_L^2, the scaled NTK of thesis section 3.1.1; modules that have neither L nor C_L
            refuse it. None, the default: as True for a narrow model (alone, or at the end as above), else as False.
        reduce: "full", all pairs of outputs; "trace", their diagonal summed; "diagonal", each output with itself.

    Returns: float64, (N1, N2, out, out), (N1, N2) or (N1, N2, out). Layers are summed in float64 whatever the dtype of
    the model. No gradient flows through it.

    Raises: TypeError or ValueError naming the argument, the rule and the value; ValueError for a narrow model that has
    hooks, and for a module that draws random numbers or takes statistics over the batch (call ``model.eval()``).

    Examples:
        >>> import torch
        >>> from narrowdeep import DeepNarrowMLP
        >>> from narrowdeep.ntk import empirical_ntk
        >>> model, x = DeepNarrowMLP(2, 3, depth=100), torch.rand(5, 2)
        >>> empirical_ntk(model, x).shape
        torch.Size([5, 5, 3, 3])
        >>> empirical_ntk(model, x, torch.rand(4, 2), reduce="trace").shape
        torch.Size([5, 4])
    """
    if not isinstance(reduce, str):
        raise TypeError(f"reduce must be a str, got {type(reduce).__name__}")
    if reduce not in _REDUCE:
        raise ValueError(f"reduce must be 'full', 'trace' or 'diagonal', got {reduce!r}")
    check_module("model", model)
    ours = find(model)
    factor = _factor(model, ours, scaled)
    with reading(model):
        left, right = _pair(model, ours, x1, x2)
        bits = None if ours is None or ours.tied() else ours.trainable_bits()
        if ours is None or ours.family is None or bits is None:
            return _generic_ntk(function_of(model, ours), left, right, _REDUCE[reduce]).mul_(factor)
        params, narrow, family = ours.stacked(), ours.model, ours.family

        def gram(rows: Tensor, columns: Tensor, symmetric: bool) -> Tensor:
            settings = (narrow.scale, narrow.form == "offset", symmetric, bits, _REDUCE[reduce])
            return (op.mlp_gram if family is reference.MLP else op.cnn_gram)(rows, columns, *params, *settings)

        size = _samples_at_once(narrow, left) // 2
        return _in_blocks(gram, left, right, size, _REDUCE[reduce]).mul_(factor)


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
    kernel = x1.new_empty(0)
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

    Returns: parameter name (as in ``model.named_parameters()``) -> (N, out, *parameter shape), in the model's dtype,
    without the frozen parameters. For a DeepNarrowMLP: ``first_weight`` (N, out, n, in), ``first_bias`` (N, out, n),
    ``hidden_weight`` (N, out, L-2, n, n), ``hidden_bias`` (N, out, L-2, n), ``last_weight`` (N, out, out, n),
    ``last_bias`` (N, out, out); a DeepNarrowCNN's weights have (f, f) at the end. The hidden layers of a model with
    several chunks are ``hidden_weight.0``, ``hidden_weight.1``, ... Together that is N out times the size of the
    parameters: ``ntk_vector_product`` and ``empirical_ntk`` need far less.

    Raises: as ``empirical_ntk``.

    Examples:
        >>> import torch
        >>> from narrowdeep import DeepNarrowMLP
        >>> from narrowdeep.ntk import jacobian
        >>> jacobian(DeepNarrowMLP(2, 1, depth=10), torch.rand(5, 2))["hidden_weight"].shape
        torch.Size([5, 1, 8, 4, 4])
    """
    check_module("model", model)
    ours = find(model)
    with reading(model):
        samples = checked_samples(model, ours, "x", x)
        if ours is None or ours.family is None:
            chunks = [chunk for _, chunk in _jacobian_chunks(function_of(model, ours), samples)]
            return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
        params, narrow, family = ours.stacked(), ours.model, ours.family
        outputs = params[4].shape[0]
        result = {
            name: param.new_zeros(x.shape[0], outputs, *param.shape)
            for name, param in model.named_parameters()
            if param.requires_grad
        }
        if x.shape[0] == 0:
            return result
        names = {id(param): name for name, param in model.named_parameters()}
        places = [(names[id(param)], i, first, param.shape[0]) for param, i, first in ours.places()]
        factors = reference.layer_factors(family, samples, params, narrow.scale, narrow.form == "offset")
        for layer, h, b in factors:
            end = {1: 0, narrow.depth: 2}.get(layer, 1)
            parts = (lambda b, h: family.weight_jacobian(b, h, params[0]), lambda b, _: reference.bias_jacobian(b))
            for name, i, first, layers in places:
                if i // 2 != end or name not in result or (end == 1 and not first <= layer - 2 < first + layers):
                    continue
                where = (slice(None), slice(None), layer - 2 - first) if end == 1 else ...
                result[name][where] += parts[i % 2](b, h)  # a sum where one parameter stands in several places
    return result


def ntk_vector_product(model: nn.Module, x1: Tensor, x2: Tensor, v: Tensor, *, scaled: bool | None = None) -> Tensor:
    """``Theta(x1, x2) @ v`` without forming Theta: a product with J(x2)^T (vjp), then one with J(x1) (jvp).

    Time and memory are those of a forward, a backward and a jvp of the model, so that iterative solvers run on kernels
    that do not fit in memory.

    Arguments:
        model, x1, x2, scaled: as in ``empirical_ntk``.
        v: (N2, out), in the model's dtype.

    Returns: (N1, out): ``sum_jb Theta(x1_i, x2_j)_ab v_jb``, in the model's dtype.

    Raises: as ``empirical_ntk``; ValueError when v has another shape than the outputs at x2.

    Examples:
        >>> import torch
        >>> from narrowdeep import DeepNarrowMLP
        >>> from narrowdeep.ntk import empirical_ntk, ntk_vector_product
        >>> model, x = DeepNarrowMLP(2, 1, depth=100), torch.rand(5, 2)
        >>> v = torch.rand(5, 1)
        >>> product = ntk_vector_product(model, x, x, v)
        >>> formed = torch.einsum("ijkl,jl->ik", empirical_ntk(model, x), v.double())
        >>> torch.allclose(product.double(), formed, rtol=1e-4)
        True
    """
    check_module("model", model)
    ours = find(model)
    factor = _factor(model, ours, scaled)
    with reading(model):
        check_batch(model, "x2", x2)  # here None does not stand for x1
        left, right = _pair(model, ours, x1, x2)
        assert right is not None
        check_tensor("v", v)
        function = function_of(model, ours)
        params, out = function.params, function.outputs(right)
        if v.shape != (right.shape[0], out.shape[1]):
            raise ValueError(
                f"v must have shape ({right.shape[0]}, {out.shape[1]}), as the outputs, got {tuple(v.shape)}"
            )
        if v.dtype != out.dtype:
            raise TypeError(f"v must have the dtype of the outputs, {out.dtype}, got {v.dtype}")
        if v.device != out.device:
            raise ValueError(f"v must be on the device of the outputs, {out.device}, got {v.device}")
        v = plain(v)
        product = out.new_zeros(left.shape[0], out.shape[1])
        if not params or not left.shape[0] or not right.shape[0]:
            return product
        if function.transformable:
            pull_back = torch.func.vjp(lambda p: function(p, right), params)[1]
            product = torch.func.jvp(lambda p: function(p, left), (params,), pull_back(v))[1]
        else:
            cotangent = {name: torch.zeros_like(param) for name, param in params.items()}
            for rows, chunk in _jacobian_chunks(function, right):
                for name, part in chunk.items():
                    cotangent[name] += torch.einsum("jb...,jb->...", part, v[rows])
            for rows, chunk in _jacobian_chunks(function, left):
                for name, part in chunk.items():
                    product[rows] += _flat(part) @ cotangent[name].flatten()
    return product * factor


def _jacobian_chunks(function: Function, x: Tensor, first: int = 0) -> Iterator[tuple[slice, dict[str, Tensor]]]:
    """(rows of x from ``first`` on, their Jacobians (rows, out, *parameter)).

    At least one chunk from row 0, so that no samples and no parameters have shapes too.
    """
    params = function.params

    def of_one(params: dict[str, Tensor], sample: Tensor) -> Tensor:
        return function(params, sample.unsqueeze(0)).squeeze(0)

    outputs = function.outputs(x).shape[1]
    if not x.shape[0] or not params:
        yield slice(0, x.shape[0]), {name: p.new_zeros(x.shape[0], outputs, *p.shape) for name, p in params.items()}
        return
    bytes_each = outputs * sum(p.numel() * p.element_size() for p in params.values())
    size = max(1, _CHUNK_BYTES // max(1, bytes_each))
    for start in range(first, x.shape[0], size):
        rows = slice(start, min(start + size, x.shape[0]))
        if function.transformable:
            yield rows, torch.func.vmap(torch.func.jacrev(of_one), (None, 0))(params, x[rows])
        else:
            parts = [_by_backward(of_one, params, sample) for sample in x[rows]]
            yield rows, {name: torch.stack([part[name] for part in parts]) for name in params}


def _flat(jacobian: Tensor) -> Tensor:
    """(N, out, entries), of a parameter without dimensions as well."""
    return jacobian.unsqueeze(-1).flatten(2)


def _by_backward(
    of_one: Callable[[dict[str, Tensor], Tensor], Tensor], params: dict[str, Tensor], sample: Tensor
) -> dict[str, Tensor]:
    """The Jacobian (out, *parameter) of one sample, a backward an output."""
    with torch.enable_grad():
        leaves = {name: param.detach().requires_grad_() for name, param in params.items()}
        out = of_one(leaves, sample)
        if not out.requires_grad:
            return {name: param.new_zeros(len(out), *param.shape) for name, param in params.items()}
        rows = [
            torch.autograd.grad(one, tuple(leaves.values()), retain_graph=True, materialize_grads=True) for one in out
        ]
    return {name: torch.stack([row[i] for row in rows]) for i, name in enumerate(leaves)}


def _generic_ntk(function: Function, x1: Tensor, x2: Tensor | None, reduce: int) -> Tensor:
    outputs = function.outputs(x1).shape[1]
    columns = x1 if x2 is None else x2
    shape = torch.empty(x1.shape[0], columns.shape[0], outputs, outputs, device="meta")
    kernel = torch.zeros(reference.reduced(shape, reduce).shape, dtype=torch.float64, device=x1.device)
    if not kernel.numel() or not function.params:
        return kernel
    for rows, left in _jacobian_chunks(function, x1):
        if x2 is None:  # the other half is mirrored, and the diagonal has its Jacobian already
            pairs = itertools.chain([(rows, left)], _jacobian_chunks(function, x1, rows.stop))
        else:
            pairs = itertools.chain(_jacobian_chunks(function, columns))
        for others, right in pairs:
            block = torch.zeros((), dtype=torch.float64, device=x1.device)
            for name in left:
                a, b = _flat(left[name]).double(), _flat(right[name]).double()
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
