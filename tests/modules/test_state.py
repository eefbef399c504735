"""State dicts of any number of chunks, of another form or scale; what nn.Module and torch.nn.utils do to parameters."""

from __future__ import annotations

import copy
import io
import pickle
import re
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from narrowdeep import DeepNarrowCNN, DeepNarrowMLP
from narrowdeep.memory import BudgetError, plan

KINDS = ["mlp", "conv"]


def _model(kind: str, chunks: int = 1, depth: int = 12, **settings: Any) -> Any:
    settings = {"scale": 5.0, "dtype": torch.float64, "chunks": chunks, **settings}
    model: Any = DeepNarrowMLP(3, 2, depth, **settings) if kind == "mlp" else DeepNarrowCNN(2, 1, depth, **settings)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model


def _x(kind: str) -> Tensor:
    shape = (4, 3) if kind == "mlp" else (4, 2, 3, 3)
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# ---- chunks ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("chunks", "other"), [(1, 4), (4, 1), (4, 3), (3, 10), (3, 3)])
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_loads_into_any_number_of_chunks(kind: str, chunks: int, other: int, assign: bool) -> None:
    source, target = _model(kind, chunks), _model(kind, other)
    given = source.state_dict()
    keys = list(given)
    target.load_state_dict(given, assign=assign)
    assert list(given) == keys  # the caller's is left alone
    for a, b in zip(source.stacked(), target.stacked(), strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(target(_x(kind)), source.to_sequential()(_x(kind)), rtol=1e-9, atol=1e-9)
    outer = nn.Sequential(nn.Identity(), _model(kind, other))
    outer.load_state_dict(nn.Sequential(nn.Identity(), source).state_dict(), assign=assign)
    assert torch.equal(outer[1].stacked()[2], source.stacked()[2])  # type: ignore[operator]
    with torch.device("meta"):
        empty = _model(kind, other)
    empty.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(empty.stacked()[3], source.stacked()[3])
    if assign and chunks != other:
        storages = {p.untyped_storage().data_ptr() for p in target.parameters()}
        assert len(storages) == len(list(target.parameters()))


def test_part_of_a_state_dict() -> None:
    source, target = _model("mlp", 4), _model("mlp", 1)
    before = target.hidden_weight.detach().clone()
    biases = {k: v for k, v in source.state_dict().items() if k.startswith("hidden_bias")}
    result = target.load_state_dict(biases, strict=False)
    assert sorted(result.missing_keys) == ["first_bias", "first_weight", "hidden_weight", "last_bias", "last_weight"]
    assert result.unexpected_keys == []
    assert torch.equal(target.hidden_weight, before)
    assert torch.equal(target.hidden_bias, torch.cat(list(source.hidden_bias)))
    missing = {k: v for k, v in source.state_dict().items() if k != "hidden_weight.1"}
    with pytest.raises(RuntimeError, match=r'(?s)Missing key.*"hidden_weight"'):
        target.load_state_dict(missing)
    with pytest.raises(RuntimeError, match="size mismatch for hidden_weight"):
        target.load_state_dict(_model("mlp", 4, depth=13).state_dict())


# ---- form and scale ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_another_form_or_scale_is_refused(kind: str, strict: bool, assign: bool) -> None:
    model = _model(kind)
    before = [p.detach().clone() for p in model.parameters()]
    for other, message in (
        (_model(kind, scale=6.0), "form='offset' and scale=6, this one has form='offset' and scale=5"),
        (_model(kind, form="plain"), "form='plain' and scale=5, this one has form='offset' and scale=5"),
        (_model(kind, 3, scale=6.0), "form='offset' and scale=6, this one has form='offset' and scale=5"),
    ):
        for source, target in ((other, model), (nn.Sequential(other), nn.Sequential(model))):
            with pytest.raises(RuntimeError, match=message):
                target.load_state_dict(source.state_dict(), strict=strict, assign=assign)
    for p, q in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, q)
    old = {name: value for name, value in _model(kind).state_dict().items() if name != "_extra_state"}
    assert str(model.load_state_dict(old)) == "<All keys matched successfully>"  # of a release without it
    for wrong in (torch.zeros(3), 5.0):
        with pytest.raises(RuntimeError, match="_extra_state must hold form and scale"):
            model.load_state_dict({**old, "_extra_state": wrong})


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_form_and_scale_survive_every_format(tmp_path: Any) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
    from torch.optim.swa_utils import AveragedModel

    model, same, other = _model("mlp"), _model("mlp"), _model("mlp", scale=7.0)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    save_model(model, str(tmp_path / "model.safetensors"))
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    into = {"model": same.state_dict()}
    dcp.load(into, checkpoint_id=tmp_path / "dcp", no_dist=True)
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    for state in (loaded, into["model"], get_model_state_dict(model), averaged.module.state_dict()):
        same.load_state_dict(state)
        with pytest.raises(RuntimeError, match="scale=5, this one has form='offset' and scale=7"):
            other.load_state_dict(state)
    load_model(same, str(tmp_path / "model.safetensors"))
    set_model_state_dict(same, get_model_state_dict(model))
    assert torch.equal(same(_x("mlp")), model(_x("mlp")))
    with pytest.raises(RuntimeError, match="scale=7"):
        load_model(other, str(tmp_path / "model.safetensors"))
    rounded = {name: value.float() for name, value in _model("mlp", scale=0.3).state_dict().items()}
    _model("mlp", scale=0.3).load_state_dict(rounded)
    assert torch.func.functional_call(model, model.state_dict(), (_x("mlp"),)).shape == (4, 2)


# ---- parametrizations, pruning ----


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm", "orthogonal"])
@pytest.mark.parametrize("chunks", [1, 2])
def test_norms_of_a_difference_are_refused_by_name(name: str, chunks: int) -> None:
    model = DeepNarrowMLP(2, 1, 6, chunks=chunks)
    if chunks == 1:
        getattr(parametrizations, name)(model, "hidden_weight")
    else:
        getattr(parametrizations, name)(model.hidden_weight, "1")
    with pytest.raises(NotImplementedError, match=f"hidden_weight.* cannot have {name} in offset form"):
        model(torch.rand(3, 2))
    with pytest.raises(RuntimeError, match=f"load_layers needs parameters .* with {name}"):
        model.load_layers([])


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_older_norms_and_pruning_are_refused_too() -> None:
    for change, kind in (
        (lambda m: nn.utils.weight_norm(m, "first_weight"), "weight_norm"),
        (lambda m: nn.utils.spectral_norm(m, "hidden_weight"), "spectral_norm"),
        (lambda m: prune.l1_unstructured(m, "hidden_weight", amount=0.3), "pruning"),
    ):
        model = DeepNarrowMLP(2, 1, 6)
        change(model)
        with pytest.raises(NotImplementedError, match=f"_weight cannot have {kind} in offset form"):
            model(torch.rand(3, 2))


def test_in_plain_form_they_do_what_they_do_to_the_layers() -> None:
    x = torch.rand(5, 2, dtype=torch.float64)
    model: Any = DeepNarrowMLP(2, 1, 5, form="plain", init="kaiming", dtype=torch.float64)
    prune.random_unstructured(model, "hidden_weight", amount=0.4)
    seq = DeepNarrowMLP(2, 1, 5, form="plain", dtype=torch.float64).to_sequential()
    with torch.no_grad():
        weights = [model.first_weight, *(model.hidden_weight_orig * model.hidden_weight_mask), model.last_weight]
        biases = [model.first_bias, *model.hidden_bias, model.last_bias]
        for linear, weight, bias in zip(list(seq)[::2], weights, biases, strict=True):
            linear.weight.copy_(weight)  # type: ignore[operator]
            linear.bias.copy_(bias)  # type: ignore[operator]
    torch.testing.assert_close(model(x), seq(x))
    model = DeepNarrowMLP(2, 1, 5, form="plain", init="kaiming", dtype=torch.float64)
    parametrizations.orthogonal(model, "hidden_weight")
    eye = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(model.hidden_weight.mT @ model.hidden_weight, eye.expand(3, 4, 4))
    model(x).sum().backward()
    model = DeepNarrowMLP(2, 1, 5, form="plain", init="kaiming", dtype=torch.float64)
    parametrizations.weight_norm(model, "hidden_weight")
    with pytest.raises(NotImplementedError, match="the layers are stacked in it"):
        model(x)


def test_a_parametrization_that_adds_to_what_is_stored_works() -> None:
    class Added(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight + 0.01

    model: Any = _model("mlp")
    want = copy.deepcopy(model)
    with torch.no_grad():
        want.hidden_weight.add_(0.01)
    parametrize.register_parametrization(model, "hidden_weight", Added())
    torch.testing.assert_close(model(_x("mlp")), want(_x("mlp")))


# ---- nn.Module ----


@pytest.mark.parametrize("depth", [2, 5])
def test_channels_last_changes_nothing(depth: int) -> None:
    model = nn.Sequential(_model("conv", depth=depth))
    before = copy.deepcopy(model)
    strides = [p.stride() for p in model.parameters()]
    model.to(memory_format=torch.channels_last)
    assert [p.stride() for p in model.parameters()] == strides
    x = _x("conv").to(memory_format=torch.channels_last)
    assert torch.equal(model(x), before(x))
    assert model.to(torch.float32, memory_format=torch.channels_last)[0].hidden_weight.dtype == torch.float32  # type: ignore[call-overload]
    assert [p.shape for p in model.parameters()] == [p.shape for p in before.parameters()]


@pytest.mark.parametrize("kind", KINDS)
def test_the_infinity_norm_of_two_layers(kind: str) -> None:
    model = _model(kind, depth=2)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assigned = _model(kind, depth=2)
    assigned.load_state_dict(model.state_dict(), assign=True)
    moved = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    for network in (model, copy.deepcopy(model), torch.load(buffer, weights_only=False), assigned, moved):
        network.load_state_dict(model.state_dict())
        network(_x(kind)).square().sum().backward()
        largest = max(p.grad.abs().max() for p in network.parameters() if p.numel())
        torch.testing.assert_close(nn.utils.clip_grad_norm_(network.parameters(), 1.0, norm_type=torch.inf), largest)
    assert len(torch.autograd.grad(model(_x(kind)).sum(), list(model.parameters()))) == 6


def test_groups_decay_weights_alone() -> None:
    model = _model("mlp", 3)
    groups = model.param_groups(weight_decay=0.1, lr=0.5)
    names = {id(p): name for name, p in model.named_parameters()}
    assert [[names[id(p)].split(".")[0] for p in g["params"]] for g in groups] == [
        ["first_weight", *["hidden_weight"] * 3, "last_weight"],
        ["first_bias", *["hidden_bias"] * 3, "last_bias"],
    ]
    assert [(g["weight_decay"], g["lr"]) for g in groups] == [(0.1, 0.5), (0.0, 0.5)]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    torch.optim.SGD(groups).step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if "weight" in name else 1))
    model.requires_grad_(False).last_bias.requires_grad_(True)
    assert [len(g["params"]) for g in model.param_groups()] == [1]
    with pytest.raises(ValueError, match=r"weight_decay must be finite and not negative, got -1"):
        model.param_groups(weight_decay=-1)


def test_settings_survive_copies() -> None:
    model = DeepNarrowMLP(2, 1, 50, budget="1GiB")
    model(torch.rand(3, 2))
    for again in (copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model))):
        assert (again.budget, again.checkpoint) == (1 << 30, "auto")
    with pytest.raises(ValueError, match="checkpoint must be 'auto' while budget is"):
        model.checkpoint = 5
    model.budget = None
    model.checkpoint = 5
    with pytest.raises(ValueError, match="budget needs checkpoint='auto', got checkpoint=5"):
        model.budget = "2GB"
    assert copy.deepcopy(model).checkpoint == 5
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(vector * 2, model.parameters())
    torch.testing.assert_close(nn.utils.parameters_to_vector(model.parameters()), 2 * vector)
    assert all(p.is_shared() for p in _model("conv").share_memory().parameters())


def test_a_subclass_keeps_what_it_adds() -> None:
    class Headed(DeepNarrowMLP):
        pass

    model: Any = Headed(2, 1, 4)
    model.head = nn.Linear(1, 3)
    before = model.head.weight.detach().clone()
    model.reset_parameters()
    assert torch.equal(model.head.weight, before)


# ---- numbers ----


def test_numbers_of_numpy() -> None:
    model = DeepNarrowMLP(
        np.int64(2),
        np.int32(1),
        np.int64(6),
        scale=np.float32(4),
        rho=np.float32(0.5),
        checkpoint=np.int64(3),
        budget=None,
    )
    settings = (model.in_features, model.depth, model.scale, model.rho, model.checkpoint)
    assert settings == (2, 6, 4.0, 0.5, 3)
    assert [type(value) for value in settings] == [int, int, float, float, int]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"depth": 10**400}, ValueError, r"depth must be below 2\*\*63, got an int of 1329 bits"),
        ({"depth": 2**62, "scale": 1}, ValueError, "depth must leave the weights addressable"),
        ({"depth": np.bool_(True)}, TypeError, "depth must be an int"),
        ({"depth": torch.tensor(4)}, TypeError, "depth must be an int"),
        ({"scale": 10**400}, ValueError, "scale must be finite and positive, got an int of 1329 bits"),
        ({"rho": 10**5000}, ValueError, "rho must be finite and not negative, got an int of 16610 bits"),
        ({"rho": 1e300}, ValueError, "rho must give random weights within the range of float32"),
        ({"beta": 1e38}, ValueError, "beta must give random weights within the range of float32"),
        ({"checkpoint": 2**63}, ValueError, r"checkpoint must be below 2\*\*63, got 9223372036854775808"),
        ({"checkpoint": (2, 10**400)}, ValueError, r"checkpoint\[1\] must be below 2\*\*63"),
        ({"chunks": 10**400}, ValueError, "chunks must be below"),
        ({"budget": 10**400}, ValueError, "budget must be at most 9223372036854775807 bytes"),
        ({"budget": "9" * 5000}, ValueError, "budget must be a number and one of the units"),
    ],
)
def test_numbers_that_nothing_can_hold(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DeepNarrowMLP(**{"in_features": 2, "out_features": 1, "depth": 4, **settings})


def test_half_precision_is_refused_where_it_is_met() -> None:
    for cast in ("half", "bfloat16"):
        model = getattr(DeepNarrowMLP(2, 1, 4), cast)()
        with pytest.raises(TypeError, match=r"the model must be of torch.float32 or torch.float64, got torch\..*float"):
            model(torch.rand(3, 2))
    torch.set_default_dtype(torch.bfloat16)
    try:
        with pytest.raises(TypeError, match=r"got torch.bfloat16 \(torch.get_default_dtype\(\)\)"):
            DeepNarrowMLP(2, 1, 4)
        assert DeepNarrowMLP(2, 1, 4, dtype=torch.float32).first_bias.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_budget_counts_what_the_optimizer_keeps() -> None:
    model = DeepNarrowMLP(2, 1, 50, optimizer="adam")
    assert DeepNarrowMLP(2, 1, 50).optimizer == "sgd"
    assert "optimizer='adam'" in repr(model)
    size = 4 * (2 * 4 + 4 + 48 * 20 + 4 + 1)
    planned = plan(model, batch_size=5)
    assert planned.parts["optimizer state"] == 2 * size
    assert plan(model, batch_size=5, optimizer="sgd").total == planned.total - 2 * size
    x = torch.rand(5, 2)
    with pytest.raises(BudgetError) as caught:
        plan(model, batch_size=5, budget=1)
    model.budget = caught.value.smallest - 1
    with pytest.raises(BudgetError):
        model(x)
    model.optimizer = "sgd"
    model(x)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert (again.optimizer, again.budget) == ("sgd", model.budget)


@pytest.mark.parametrize("optimizer", ["lion", "", "Adam", None, 3, ["sgd"]])
def test_unknown_optimizers_are_refused(optimizer: Any) -> None:
    names = "sgd, momentum, adam, fused-sgd, fused-momentum"
    with pytest.raises(ValueError, match=re.escape(f"optimizer must be one of {names}, got {optimizer!r}")):
        DeepNarrowMLP(2, 1, 5, optimizer=optimizer)
    model = DeepNarrowCNN(1, 1, 5, optimizer="momentum")
    with pytest.raises(ValueError, match="optimizer must be one of"):
        model.optimizer = optimizer
    assert model.optimizer == "momentum"


def test_a_wrong_x_is_called_x_with_a_budget_too() -> None:
    with pytest.raises(ValueError, match="x must have 2 features in its last dimension, got 3"):
        DeepNarrowMLP(2, 1, 4, budget="1GB")(torch.rand(5, 3))
    with pytest.raises(ValueError, match=r"x must have shape \(\*, 1, H, W\)"):
        DeepNarrowCNN(1, 1, 4, budget="1GB")(torch.rand(5, 2, 3, 3))
