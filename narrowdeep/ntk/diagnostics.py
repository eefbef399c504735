"""What the thesis's theory says stays put during training, measured (thesis sections 3.2 and 3.3)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from narrowdeep.modules import DeepNarrowCNN, DeepNarrowMLP
from narrowdeep.ntk.empirical import (
    Narrow,
    check_module,
    check_pair,
    check_samples,
    empirical_ntk,
    narrow_family,
    trainable_bits,
)
from narrowdeep.ops.gram import reference
from narrowdeep.ops.reference import base_and_rest, column, initial, skip_mask, skipped, states


def _narrow(name: str, model: nn.Module) -> reference.Family:
    family = narrow_family(model)
    if family is None:
        raise TypeError(f"{name} must be a DeepNarrowMLP or a DeepNarrowCNN, got {type(model).__name__}")
    return family


def _check_states(initial: nn.Module, model: nn.Module) -> reference.Family:
    family = _narrow("model", model)
    _narrow("initial", initial)
    assert isinstance(initial, Narrow)
    assert isinstance(model, Narrow)
    if type(initial) is not type(model):
        raise TypeError(f"initial must be a {type(model).__name__} as model is, got {type(initial).__name__}")
    for name, mine, theirs in (
        ("depth", initial.depth, model.depth),
        ("width", initial.width, model.width),
        ("scale", initial.scale, model.scale),
        ("form", initial.form, model.form),
    ):
        if mine != theirs:
            raise ValueError(f"initial must have the {name} of model, {theirs}, got {mine}")
    return family


@torch.no_grad()
def layer_contributions(
    model: DeepNarrowMLP | DeepNarrowCNN, x1: Tensor, x2: Tensor | None = None, *, scaled: bool = True
) -> Tensor:
    """The part of the NTK's trace over outputs that each affine layer's parameters contribute.

    Arguments: as ``empirical_ntk``.

    Returns: (L, N1, N2) float64, layer 1 first; its sum over layers is ``empirical_ntk(..., reduce="trace")``.

    Raises: as ``empirical_ntk``; TypeError for other modules.
    """
    family = _narrow("model", model)
    check_pair(model, x1, x2)
    other = x1 if x2 is None else x2
    out = torch.zeros(model.depth, x1.shape[0], other.shape[0], dtype=torch.float64, device=x1.device)
    if not out.numel():
        return out
    params = tuple(param.detach() for param in model.stacked())
    settings = (model.scale, model.form == "offset", x2 is None, trainable_bits(model))
    for layer, part in reference.layer_grams(family, x1, other, params, *settings):
        out[layer - 1] = reference.reduced(part, reference.TRACE)
    return out.mul_(model.ntk_lr) if scaled else out


def kernel_drift(initial: nn.Module, model: nn.Module, x: Tensor) -> float:
    """``|Theta_model - Theta_initial| / |Theta_initial|`` on x, Frobenius norms: how far training has moved the kernel.

    It vanishes as L grows (thesis Theorem 3.2); for a narrow MLP it is about 0.27 / C_L, whatever L.

    Arguments:
        initial, model: the same kind of network in two states, for example ``copy.deepcopy(model)`` before training.
        x: (N, ...), not empty.

    Raises: as ``empirical_ntk``; ValueError when x is empty or the two differ in their parameters' names or shapes.
    """
    check_module("initial", initial)
    check_samples(model, "x", x)
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
    return ((after - before).norm() / before.norm()).item()


def _preactivations(model: Narrow, family: reference.Family, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(base, z - base) of hidden layers 1 .. L-1 in float64, (n, *positions, N): base is the same in any state.

    Keeping the two apart lets the difference of two states survive a base of size C_L.
    """
    first_weight, first_bias, hidden_weight, hidden_bias, last_weight, _ = (
        param.detach().double() for param in model.stacked()
    )
    x, outputs, offset = x.detach().double(), last_weight.shape[0], model.form == "offset"
    base, rest = base_and_rest(x.movedim(0, -1), first_weight.shape[0], outputs, model.scale, offset)
    yield base, rest + (family.affine(first_weight, x.movedim(0, -1)) + column(first_bias, base))
    _, hi, lo = initial(family.affine, x, first_weight, first_bias, outputs, model.scale, offset)
    skip = skip_mask(base, outputs, offset)
    through = states(family.affine, base, hi, lo, hidden_weight, hidden_bias, outputs, offset)
    for (_, hi, lo), weight, bias in zip(through, hidden_weight, hidden_bias, strict=False):  # noqa: B020
        yield base, skipped(skip, hi + lo) + (family.affine(weight, (base + hi) + lo) + column(bias, base))


@torch.no_grad()
def zero_crossings(initial: DeepNarrowMLP | DeepNarrowCNN, model: DeepNarrowMLP | DeepNarrowCNN, x: Tensor) -> Tensor:
    """How many ReLUs are on in one state and off in the other.

    The proof of Theorem 3.2 rests on their number being 0 with probability that goes to 1 as L grows (thesis
    section 3.3). A crossing there and back between the two states is not seen.

    Arguments:
        initial, model: the same network in two states.
        x: (N, ...).

    Returns: (L-1,) int64: crossings in each hidden layer, summed over samples, units and positions.

    Raises: TypeError or ValueError where the two models differ in kind, depth, width, scale or form.
    """
    family = _check_states(initial, model)
    check_samples(model, "x", x)
    check_samples(initial, "x", x)
    counts = [
        ((base + before > 0) != (base + after > 0)).sum()
        for (base, before), (_, after) in zip(
            _preactivations(initial, family, x), _preactivations(model, family, x), strict=True
        )
    ]
    return torch.stack(counts)


@torch.no_grad()
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
    """
    family = _check_states(initial, model)
    check_samples(model, "x", x)
    check_samples(initial, "x", x)
    if isinstance(power, bool) or not isinstance(power, int):
        raise TypeError(f"power must be an int, got {power!r}")
    if power < 1:
        raise ValueError(f"power must be at least 1, got {power}")
    if x.shape[0] == 0:
        raise ValueError("x must hold at least one sample, got 0")

    def norm(f: Tensor) -> float:
        return (f.square().sum() / x.shape[0]).sqrt().item() / model.scale

    total = 0.0
    for (base, before), (_, after) in zip(
        _preactivations(initial, family, x), _preactivations(model, family, x), strict=True
    ):
        total += (norm(base + before) + norm(after - before)) ** power
    return total / (model.depth - 1)
