"""What the thesis's theory says stays put during training, measured (thesis sections 3.2 and 3.3)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from narrowdeep.checks import check_count
from narrowdeep.modules import DeepNarrowCNN, DeepNarrowMLP
from narrowdeep.ntk.empirical import _factor, _pair, checked_samples, empirical_ntk
from narrowdeep.ntk.network import Ours, check_batch, check_module, find, reading
from narrowdeep.ops.gram import reference
from narrowdeep.ops.params import Affine
from narrowdeep.ops.reference import base_and_rest, column, initial, skip_mask, skipped, states


def _narrow(name: str, model: nn.Module) -> tuple[Ours, reference.Family]:
    check_module(name, model)
    ours = find(model)
    if ours is None:
        raise TypeError(f"{name} must be a DeepNarrowMLP or a DeepNarrowCNN, got {type(model).__name__}")
    if ours.family is None:
        raise TypeError(
            f"{name} must be a DeepNarrowMLP or a DeepNarrowCNN as it is, not parametrized, hooked or with another "
            f"forward, got {type(model).__name__}"
        )
    return ours, ours.family


def _check_states(initial: nn.Module, model: nn.Module) -> tuple[Ours, Ours, reference.Family]:
    after, family = _narrow("model", model)
    before, _ = _narrow("initial", initial)
    mine, theirs = before.model, after.model
    if type(mine) is not type(theirs):
        raise TypeError(f"initial must be a {type(theirs).__name__} as model is, got {type(mine).__name__}")
    for name in ("depth", "width", "scale", "form"):
        if getattr(mine, name) != getattr(theirs, name):
            raise ValueError(
                f"initial must have the {name} of model, {getattr(theirs, name)}, got {getattr(mine, name)}"
            )
    return before, after, family


def layer_contributions(
    model: DeepNarrowMLP | DeepNarrowCNN, x1: Tensor, x2: Tensor | None = None, *, scaled: bool = True
) -> Tensor:
    """The part of the NTK's trace over outputs that each affine layer's parameters contribute.

    Arguments: as ``empirical_ntk``.

    Returns: (L, N1, N2) float64, layer 1 first; its sum over layers is ``empirical_ntk(..., reduce="trace")``.

    Raises: as ``empirical_ntk``; TypeError for other modules; ValueError for layers that share a parameter.

    Examples:
        >>> import torch
        >>> from narrowdeep import DeepNarrowMLP
        >>> from narrowdeep.ntk import empirical_ntk, layer_contributions
        >>> model, x = DeepNarrowMLP(2, 1, depth=100), torch.rand(5, 2)
        >>> parts = layer_contributions(model, x)
        >>> parts.shape, torch.allclose(parts.sum(0), empirical_ntk(model, x, reduce="trace"))
        (torch.Size([100, 5, 5]), True)
    """
    ours, family = _narrow("model", model)
    factor = _factor(model, ours, scaled)
    if ours.tied():
        raise ValueError("model must have parameters of its own in every layer, got layers that share one")
    narrow = ours.model
    with reading(model):
        left, right = _pair(model, ours, x1, x2)
        other = left if right is None else right
        out = torch.zeros(narrow.depth, left.shape[0], other.shape[0], dtype=torch.float64, device=left.device)
        if not out.numel():
            return out
        settings = (narrow.scale, narrow.form == "offset", right is None, ours.layer_flags())
        for layer, part in reference.layer_grams(family, left, other, ours.stacked(), *settings):
            out[layer - 1] = reference.reduced(part, reference.TRACE)
        return out.mul_(factor)


def kernel_drift(initial: nn.Module, model: nn.Module, x: Tensor) -> float:
    """``|Theta_model - Theta_initial| / |Theta_initial|`` on x, Frobenius norms: how far training has moved the kernel.

    It vanishes as L grows (thesis Theorem 3.2); for a narrow MLP it is about 0.27 / C_L, whatever L.

    Arguments:
        initial, model: the same kind of network in two states, for example ``copy.deepcopy(model)`` before training.
        x: (N, ...), not empty.

    Raises: as ``empirical_ntk``; ValueError when x is empty, the kernel of initial is 0 on x, or the two differ in
    their parameters' names or shapes.

    Examples:
        >>> import copy, torch
        >>> from narrowdeep import DeepNarrowMLP
        >>> from narrowdeep.ntk import kernel_drift
        >>> model, x = DeepNarrowMLP(2, 1, depth=100), torch.rand(5, 2)
        >>> initial = copy.deepcopy(model)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.5 * model.ntk_lr)
        >>> for _ in range(10):
        ...     optimizer.zero_grad()
        ...     (0.5 * (model(x) - x.prod(1, keepdim=True)).square().mean()).backward()
        ...     optimizer.step()
        >>> 0 < kernel_drift(initial, model, x) < 0.05
        True
    """
    check_module("initial", initial)
    check_module("model", model)
    check_batch(model, "x", x)
    mine, theirs = ({name: tuple(p.shape) for name, p in m.named_parameters()} for m in (initial, model))
    if mine != theirs:
        different = next(name for name in {**theirs, **mine} if mine.get(name) != theirs.get(name))
        raise ValueError(
            f"initial must have parameters of the names and shapes of model's, got {mine.get(different, 'no')} "
            f"{different} where model has {theirs.get(different, 'none')}"
        )
    if x.shape[0] == 0:
        raise ValueError("x must hold at least one sample, got 0")
    before, after = (empirical_ntk(m, x, scaled=False) for m in (initial, model))
    size = before.norm().item()
    if size == 0:
        raise ValueError("initial must have a kernel that is not 0 on x, got 0: are its parameters frozen?")
    return (after - before).norm().item() / size


def _preactivations(
    model: DeepNarrowMLP | DeepNarrowCNN, family: reference.Family, x: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """(base, z - base) of hidden layers 1 .. L-1 in float64, (n, *positions, N): base is the same in any state.

    Keeping the two apart lets the difference of two states survive a base of size C_L.
    """
    first_weight, first_bias, hidden_weight, hidden_bias, last_weight, _ = (
        param.detach().double() for param in model.stacked()
    )
    x, outputs, offset = x.detach().double(), last_weight.shape[0], model.form == "offset"
    base, rest = base_and_rest(x.movedim(0, -1), first_weight.shape[0], outputs, model.scale, offset)
    yield base, rest + (family.affine(first_weight, x.movedim(0, -1)) + column(first_bias, base))
    _, hi, lo = initial(family.affine, x, Affine(first_weight, first_bias), outputs, model.scale, offset)
    skip = skip_mask(base, outputs, offset)
    through = states(family.affine, base, hi, lo, hidden_weight, hidden_bias, outputs, offset)
    for (_, hi, lo), weight, bias in zip(through, hidden_weight, hidden_bias, strict=False):
        yield base, skipped(skip, hi + lo) + (family.affine(weight, (base + hi) + lo) + column(bias, base))


def _both(initial: nn.Module, model: nn.Module, x: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(base, z - base in ``initial``, z - base in ``model``) of every hidden layer, after all checks."""
    first, second, family = _check_states(initial, model)
    samples = [checked_samples(module, ours, "x", x) for module, ours in ((initial, first), (model, second))]
    states = [_preactivations(ours.model, family, z) for ours, z in zip((first, second), samples, strict=True)]
    for (base, before), (_, after) in zip(*states, strict=True):
        yield base, before, after


def zero_crossings(initial: DeepNarrowMLP | DeepNarrowCNN, model: DeepNarrowMLP | DeepNarrowCNN, x: Tensor) -> Tensor:
    """How many ReLUs are on in one state and off in the other.

    The proof of Theorem 3.2 rests on their number being 0 with probability that goes to 1 as L grows (thesis
    section 3.3). A crossing there and back between the two states is not seen.

    Arguments:
        initial, model: the same network in two states.
        x: (N, ...).

    Returns: (L-1,) int64: crossings in each hidden layer, summed over samples, units and positions.

    Raises: TypeError or ValueError where the two models differ in kind, depth, width, scale or form.

    Examples:
        >>> import copy, torch
        >>> from narrowdeep import DeepNarrowMLP
        >>> from narrowdeep.ntk import zero_crossings
        >>> model, x = DeepNarrowMLP(2, 1, depth=100), torch.rand(5, 2)
        >>> zero_crossings(copy.deepcopy(model), model, x).sum()
        tensor(0)
    """
    with reading(initial, model):
        counts = [((base + before > 0) != (base + after > 0)).sum() for base, before, after in _both(initial, model, x)]
        return torch.stack(counts)


def layer_deviation(
    initial: DeepNarrowMLP | DeepNarrowCNN, model: DeepNarrowMLP | DeepNarrowCNN, x: Tensor, *, power: int = 1
) -> float:
    """The Lyapunov term Phi_{L,j} of thesis section 3.3, j = ``power``.

    ``1 / ((L-1) C_L^j) sum_l (|f^l_0| + |f^l_t - f^l_0|)^j`` over the pre-activations f^l of hidden layers l = 1 .. L-1
    before (0) and after (t) training, with ``|f|^2`` the mean over samples of the squared Euclidean norm. That it stays
    at its initial value is what keeps the kernel fixed: compare with ``layer_deviation(initial, initial, x)``.

    Arguments:
        initial, model: the same network in two states.
        x: (N, ...), not empty.
        power: j, from 1; the thesis uses 1 to 8.

    Raises: as ``zero_crossings``; ValueError when x is empty or power is below 1.

    Examples:
        >>> import copy, torch
        >>> from narrowdeep import DeepNarrowMLP
        >>> from narrowdeep.ntk import layer_deviation
        >>> model, x = DeepNarrowMLP(2, 1, depth=100), torch.rand(5, 2)
        >>> layer_deviation(model, copy.deepcopy(model), x) > 0
        True
    """
    _, after, _ = _check_states(initial, model)
    scale, depth = after.model.scale, after.model.depth
    check_batch(model, "x", x)
    power = check_count("power", power, 1)
    if x.shape[0] == 0:
        raise ValueError("x must hold at least one sample, got 0")

    def norm(f: Tensor) -> float:
        return (f.square().sum() / x.shape[0]).sqrt().item() / scale

    with reading(initial, model):
        total = sum(
            (norm(base + before) + norm(after - before)) ** power for base, before, after in _both(initial, model, x)
        )
    return total / (depth - 1)
