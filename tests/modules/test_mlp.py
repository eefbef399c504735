"""DeepNarrowMLP: its initialisation, the eager network it stands for, everything a user does with an nn.Module."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from narrowdeep import DeepNarrowMLP
from narrowdeep.modules.base import PARAMETER_NAMES

SHAPES = [(1, 1, 2), (1, 1, 129), (2, 1, 34), (5, 3, 3), (12, 10, 17), (64, 10, 5)]

both_forms = pytest.mark.parametrize("form", ["offset", "plain"])


def perturbed(*args: Any, **kwargs: Any) -> DeepNarrowMLP:
    """A float64 model away from its initialisation."""
    model = DeepNarrowMLP(*args, **{"dtype": torch.float64, "scale": 3.0, **kwargs})
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param), alpha=0.02)
    return model


def linears(seq: nn.Sequential) -> list[nn.Linear]:
    return [m for m in seq if isinstance(m, nn.Linear)]


# ---- initialisation ----


@both_forms
def test_initialisation_is_that_of_the_thesis(form: Any) -> None:
    model = DeepNarrowMLP(4, 3, 5000, rho=0.5, beta=0.25, scale=40.0, form=form, dtype=torch.float64)
    assert (model.width, model.depth, model.scale) == (8, 5000, 40.0)
    assert model.ntk_lr == pytest.approx(1 / (5000 * 1600), rel=1e-12)
    layers = linears(model.to_sequential())
    first, last = layers[0], layers[-1]
    # u and v: 20000 and 5000 draws, so standard deviations are known to 0.5% and 1%.
    u, v = model.hidden_weight.detach()[:, 4, :4], model.hidden_bias.detach()[:, 4]
    assert u.std().item() == pytest.approx(0.5 / 2, rel=0.03)  # rho / sqrt(d_in)
    assert abs(u.mean().item()) < 0.01
    assert v.std().item() == pytest.approx(40 * 0.25, rel=0.05)  # C_L beta
    assert abs(v.mean().item()) < 0.6
    # All else, as section 3.1 writes it.
    identity = torch.diag(torch.tensor([1, 1, 1, 1, 0, 1, 1, 1], dtype=torch.float64))
    for layer in (layers[1], layers[2500], layers[-2]):
        weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
        assert weight[4, :4].all()
        weight[4, :4], bias[4] = 0, 0
        assert torch.equal(weight, identity)
        assert not bias.any()
    assert torch.equal(first.weight[:4], 40 * torch.eye(4, dtype=torch.float64))
    assert not first.weight[5:].any()
    assert first.bias[5:].tolist() == [40.0] * 3
    assert not first.bias[:4].any()
    assert torch.equal(last.weight, torch.eye(8, dtype=torch.float64)[5:])
    assert last.bias.tolist() == [-40.0] * 3


def test_offset_form_stores_only_what_is_random() -> None:
    model = DeepNarrowMLP(2, 3, 9)
    nonzero = {name: int(p.count_nonzero()) for name, p in model.named_parameters()}
    assert nonzero == {
        "first_weight": 2,
        "first_bias": 1,
        "hidden_weight": 14,
        "hidden_bias": 7,
        "last_weight": 0,
        "last_bias": 0,
    }


@both_forms
@pytest.mark.parametrize(("inputs", "outputs", "depth"), SHAPES)
def test_output_is_zero_at_initialisation(inputs: int, outputs: int, depth: int, form: Any) -> None:
    model = DeepNarrowMLP(inputs, outputs, depth, form=form)
    assert model.scale == depth
    assert torch.equal(model(torch.rand(7, inputs)), torch.zeros(7, outputs))


def test_kaiming_is_uniform_between_its_bounds() -> None:
    model = DeepNarrowMLP(6, 5, 300, init="kaiming", form="plain")
    for weight, fan_in in ((model.first_weight, 6), (model.hidden_weight, 12), (model.last_weight, 12)):
        bound = (6 / fan_in) ** 0.5
        assert weight.abs().max() <= bound
        assert weight.abs().max() > 0.9 * bound
    # Variance of the uniform distribution: bound^2 / 3 = 2 / fan_in; 42912 draws.
    assert model.hidden_weight.var().item() == pytest.approx(2 / 12, rel=0.03)
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))


def test_a_generator_makes_the_draw_repeat() -> None:
    model = DeepNarrowMLP(2, 1, 9)
    draws = []
    for seed in (1, 1, 2):
        model.reset_parameters(torch.Generator().manual_seed(seed))
        draws.append(model.hidden_weight.detach().clone())
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


# ---- the eager network ----


@both_forms
@pytest.mark.parametrize(("inputs", "outputs", "depth"), SHAPES)
def test_is_the_sequential_network(inputs: int, outputs: int, depth: int, form: Any) -> None:
    model = perturbed(inputs, outputs, depth, form=form)
    x = torch.randn(7, inputs, dtype=torch.float64, requires_grad=True)
    seq = model.to_sequential()
    assert len(linears(seq)) == depth
    out, expected = model(x), seq(x)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    weights = torch.randn_like(out)
    (got,) = torch.autograd.grad((out * weights).sum(), x, retain_graph=True)
    (want,) = torch.autograd.grad((expected * weights).sum(), x, retain_graph=True)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    first, *hidden, last = linears(seq)
    pairs: list[tuple[Any, Any]] = [
        (model.first_weight.grad, first.weight.grad),
        (model.first_bias.grad, first.bias.grad),
        (model.last_weight.grad, last.weight.grad),
        (model.last_bias.grad, last.bias.grad),
    ]
    if hidden:
        grads: Any = [(layer.weight.grad, layer.bias.grad) for layer in hidden]
        pairs.append((model.hidden_weight.grad, torch.stack([w for w, _ in grads])))
        pairs.append((model.hidden_bias.grad, torch.stack([b for _, b in grads])))
    for got, want in pairs:
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@both_forms
@pytest.mark.parametrize("source", ["offset", "plain"])
def test_from_sequential_is_the_way_back(source: Any, form: Any) -> None:
    model = perturbed(3, 2, 8, form=source)
    again = DeepNarrowMLP.from_sequential(model.to_sequential(), form=form, scale=4.0)
    assert (again.form, again.depth, again.width, again.scale) == (form, 8, 6, 4.0)
    assert again.first_weight.dtype == torch.float64
    x = torch.randn(5, 3, dtype=torch.float64)
    torch.testing.assert_close(again(x), model(x), rtol=1e-11, atol=1e-11)
    for a, b in zip(again.to_sequential().parameters(), model.to_sequential().parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)


def test_to_sequential_copies() -> None:
    model = perturbed(2, 1, 4)
    before = model.hidden_weight.detach().clone()
    for param in model.to_sequential().parameters():
        nn.init.zeros_(param)
    assert torch.equal(model.hidden_weight, before)


def stack(sizes: list[int], **kwargs: Any) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for i, o in itertools.pairwise(sizes):
        layers += [nn.Linear(i, o, **kwargs), nn.ReLU()]
    return layers[:-1]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (stack([2, 1]), "with at least 2 nn.Linear, got 1 modules"),
        ([*stack([2, 4, 1]), nn.ReLU()], "at least 2 nn.Linear, got 4 modules"),
        ([nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)], r"seq\[1\] must be nn.ReLU, got Tanh"),
        ([nn.Linear(2, 4), nn.ReLU(), nn.Identity()], r"seq\[2\] must be nn.Linear with a bias, got Identity"),
        (stack([2, 4, 1], bias=False), r"seq\[0\] must be nn.Linear with a bias"),
        (stack([2, 5, 1]), r"seq\[0\] must have in \+ 1 \+ out = 4 hidden units, got Linear\(in_features=2, out_"),
        ([nn.Linear(2, 4), nn.ReLU(), nn.Linear(5, 1)], r"seq\[0\] must have in \+ 1 \+ out = 4 hidden units"),
    ],
)
def test_from_sequential_refuses_another_structure(layers: list[nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeepNarrowMLP.from_sequential(nn.Sequential(*layers))


# ---- an nn.Module like any other ----


@both_forms
def test_copies_and_pickles(form: Any) -> None:
    model = perturbed(3, 2, 6, form=form, checkpoint=2)
    x = torch.randn(4, 3, dtype=torch.float64)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(x), model(x))
        assert (again.form, again.checkpoint, again.scale) == (form, 2, 3.0)
        with torch.no_grad():
            again.first_weight.zero_()
        assert model.first_weight.any()


def test_state_dict_is_delta() -> None:
    model = perturbed(3, 2, 6)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    assert list(state) == [*PARAMETER_NAMES, "_extra_state"]
    other = DeepNarrowMLP(3, 2, 6, scale=3.0, dtype=torch.float64)
    other.load_state_dict(state)
    x = torch.randn(4, 3, dtype=torch.float64)
    assert torch.equal(other(x), model(x))
    # What W = E + Delta loses, Delta keeps: 1 + 1e-20 is 1.
    with torch.no_grad():
        model.hidden_weight[0, 0, 0] = 1e-20
    other.load_state_dict(model.state_dict())
    assert other.hidden_weight[0, 0, 0].item() == 1e-20
    with pytest.raises(RuntimeError, match="size mismatch for hidden_weight"):
        DeepNarrowMLP(3, 2, 7).load_state_dict(state)


def test_dtypes_and_devices() -> None:
    model = DeepNarrowMLP(2, 1, 5)
    x = torch.rand(3, 2)
    assert model(x).dtype == torch.float32
    assert model.double()(x.double()).dtype == torch.float64
    assert model.to(torch.float32)(x).dtype == torch.float32
    assert model.to("meta").hidden_weight.is_meta
    assert DeepNarrowMLP(2, 1, 5, device="meta").first_bias.is_meta


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=1e-4, momentum=0.9),
        lambda p: torch.optim.Adam(p, lr=1e-4),
        lambda p: torch.optim.AdamW(p, lr=1e-4),
    ],
    ids=["sgd", "adam", "adamw"],
)
def test_optimizers_take_the_same_steps_as_on_the_eager_network(optimizer: Any) -> None:
    model = perturbed(2, 1, 6, form="plain")
    seq = model.to_sequential()
    x = torch.rand(9, 2, dtype=torch.float64)
    y = x.prod(1, keepdim=True)
    networks: list[nn.Module] = [model, seq]
    for network in networks:
        chosen = optimizer(network.parameters())
        before = network(x).detach()
        for _ in range(5):
            chosen.zero_grad()
            nn.functional.mse_loss(network(x), y).backward()
            chosen.step()
        assert not torch.equal(network(x), before)
    torch.testing.assert_close(model(x), seq(x), rtol=1e-8, atol=1e-8)


def test_clip_grad_norm() -> None:
    model = perturbed(2, 1, 6)
    model(torch.rand(5, 2, dtype=torch.float64)).square().sum().mul(100).backward()

    def norm() -> Tensor:
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()

    before = norm()
    assert before > 1
    torch.testing.assert_close(nn.utils.clip_grad_norm_(model.parameters(), 0.5), before)
    assert norm().item() == pytest.approx(0.5, rel=1e-5)


def test_frozen_parameters_get_no_gradient() -> None:
    model = perturbed(2, 1, 6)
    model.hidden_weight.requires_grad_(False)
    model(torch.rand(5, 2, dtype=torch.float64)).sum().backward()
    assert model.hidden_weight.grad is None
    assert model.hidden_bias.grad is not None


@pytest.mark.parametrize("checkpoint", ["none", "auto", 1, 3, 64])
def test_checkpoint_changes_no_bit(checkpoint: Any) -> None:
    model = DeepNarrowMLP(2, 1, 70, checkpoint=5)
    other = copy.deepcopy(model)
    other.checkpoint = checkpoint
    x = torch.rand(9, 2)
    for m in (model, other):
        m(x).sub(1).square().sum().backward()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0, ValueError, "checkpoint must be at least 1 layer a segment, got 0"),
        (-3, ValueError, "checkpoint must be at least 1 layer a segment, got -3"),
        ("sometimes", ValueError, "checkpoint must be 'auto', 'none' or an int, got 'sometimes'"),
        (True, TypeError, "checkpoint must be 'auto', 'none' or an int, got True"),
        (2.0, TypeError, "checkpoint must be 'auto', 'none' or an int, got 2.0"),
        (None, TypeError, "checkpoint must be 'auto', 'none' or an int, got None"),
    ],
)
def test_bad_checkpoints_are_refused_and_leave_the_old_one(value: Any, error: type[Exception], message: str) -> None:
    model = DeepNarrowMLP(2, 1, 5, checkpoint=7)
    with pytest.raises(error, match=message):
        model.checkpoint = value
    assert model.checkpoint == 7


def test_repr_says_what_it_is() -> None:
    model = DeepNarrowMLP(2, 1, 100, scale=5e4, beta=0.5, checkpoint=8)
    assert repr(model) == (
        "DeepNarrowMLP(2, 1, depth=100, width=4, scale=50000, rho=1, beta=0.5, init='ntk', form='offset', checkpoint=8)"
    )


# ---- bad input ----


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"depth": 1}, ValueError, "depth must be at least 2, got 1"),
        ({"depth": 4.0}, TypeError, "depth must be an int, got 4.0"),
        ({"in_features": 0}, ValueError, "in_features must be at least 1, got 0"),
        ({"out_features": -1}, ValueError, "out_features must be at least 1, got -1"),
        ({"out_features": True}, TypeError, "out_features must be an int, got True"),
        ({"checkpoint": 0}, ValueError, "checkpoint must be at least 1 layer a segment, got 0"),
        ({"init": "kaiming"}, ValueError, "init='kaiming' needs form='plain'"),
        ({"init": "he"}, ValueError, "init must be 'ntk' or 'kaiming', got 'he'"),
        ({"form": "delta"}, ValueError, "form must be 'offset' or 'plain', got 'delta'"),
        ({"scale": float("nan")}, ValueError, "scale must be finite and positive, got nan"),
        ({"scale": 0}, ValueError, "scale must be finite and positive, got 0"),
        ({"scale": "big"}, TypeError, "scale must be a number, got 'big'"),
        ({"rho": -1.0}, ValueError, "rho must be finite and not negative, got -1.0"),
        ({"beta": float("inf")}, ValueError, "beta must be finite and not negative, got inf"),
        ({"beta": "1"}, TypeError, "beta must be a number, got '1'"),
        ({"dtype": torch.float16}, TypeError, "dtype must be torch.float32 or torch.float64, got torch.float16"),
        ({"dtype": torch.int64}, TypeError, "dtype must be torch.float32 or torch.float64, got torch.int64"),
    ],
)
def test_bad_settings(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DeepNarrowMLP(**{"in_features": 2, "out_features": 1, "depth": 4, **settings})


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.rand(5, 28), ValueError, "x must have 2 features in its last dimension, got 28"),
        (torch.rand(()), ValueError, "x must have 2 features in its last dimension, got a scalar"),
        (torch.rand(5, 2).double(), TypeError, "same dtype, got torch.float64 and torch.float32"),
        (torch.ones(5, 2, dtype=torch.int64), TypeError, "x must be torch.float32 or torch.float64, got torch.int64"),
        (torch.rand(5, 2).bfloat16(), TypeError, "x must be torch.float32 or torch.float64, got torch.bfloat16"),
        (
            torch.rand(5, 2, device="meta"),
            ValueError,
            "x and first_weight must be on the same device, got meta and cpu",
        ),
        ([[1.0, 2.0]], TypeError, "x must be a torch.Tensor, got list"),
    ],
)
def test_bad_inputs(x: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DeepNarrowMLP(2, 1, 4)(x)


@pytest.mark.parametrize("chunks", [1, 3])
def test_a_tensor_put_in_a_parameters_place_is_what_runs(chunks: int) -> None:
    """As of any module: Python finds what is in ``__dict__`` before what ``__getattr__`` of torch does."""
    model, other = (DeepNarrowMLP(2, 1, depth=9, chunks=chunks) for _ in range(2))
    x = torch.rand(4, 2)
    before = model(x)
    model.__dict__["last_weight"] = torch.ones_like(model.last_weight)
    with torch.no_grad():
        other.load_state_dict(DeepNarrowMLP.state_dict(model))
        other.last_weight.fill_(1.0)
    torch.testing.assert_close(model(x), other(x))
    assert not torch.equal(model(x), before)
