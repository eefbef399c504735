"""The files of runs and models: crafted and damaged ones, other runs in the folder, modes, full disks, random state."""

from __future__ import annotations

import copy
import dataclasses
import errno
import itertools
import json
import math
import os
import random
import stat
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import prune

from narrowdeep import DeepNarrowCNN, DeepNarrowMLP, files, training
from narrowdeep.data import Task, load_task
from narrowdeep.step_size import predict_step_size
from narrowdeep.training import CHECKPOINT, CURVES, METRICS, DamagedFileError, EpochMetrics, TrainConfig, Trainer, fit
from narrowdeep.training import model_file as model_file_module
from narrowdeep.training import trainer as trainer_module

CONFIG = TrainConfig(
    task="digits",
    arch="mlp",
    depth=5,
    scale=5.0,
    rho=1.0,
    beta=1.0,
    init="ntk",
    form="offset",
    checkpoint=(2, 3),
    pool=4,
    epochs=3,
    batch_size=500,
    lr=0.02 / (5 * 25),
    momentum=0.9,
    seed=3,
    dtype="float32",
)
METRIC = EpochMetrics(1, 3, 0.5, 0.25, 0.75, 0.5, 0.125, 8.0)


@pytest.fixture(scope="module")
def digits() -> Task:
    return load_task("digits", pool=4)


@pytest.fixture(scope="module")
def state(digits, tmp_path_factory) -> Path:
    """A run of one epoch and a step, 15 units wide."""
    trainer = Trainer(CONFIG, digits)
    for _ in range(4):
        trainer.step()
    trainer.save(path := tmp_path_factory.mktemp("state") / CHECKPOINT)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model"
    training.save_model(DeepNarrowCNN(1, 2, 9, kernel_size=5, chunks=3, budget="2GiB"), path)
    return path


def craft(path: Path, out: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], str | None]) -> Path:
    """A copy of a file with another header and tensors, all checksums right: written by safetensors alone.

    ``change`` works on both in place; what it returns, if anything, is the text of the header.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    header, tensors = json.loads(metadata["header"]), load_file(path)
    text = change(header, tensors)
    metadata["header"] = json.dumps(header) if text is None else text
    sums: dict[str, int] = {}
    for name in sorted(tensors):
        part, tensor = name.partition(".")[0], tensors[name]
        sums[part] = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), sums.get(part, 0))
        sums[part] = zlib.crc32(tensor.contiguous().numpy().tobytes(), sums[part])
    metadata["crc32"] = json.dumps({"header": zlib.crc32(metadata["header"].encode()), "tensors": sums})
    save_file({name: t.contiguous() for name, t in tensors.items()}, out, metadata=metadata)
    return out


def setting(place: str, value: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    def change(header: dict[str, Any], _: dict[str, Tensor]) -> None:
        *folders, name = place.split(".")
        for folder in folders:
            header = header[folder]
        if value is ...:
            del header[name]
        else:
            header[name] = value

    return change


def tensor(name: str, value: Callable[[Tensor], Tensor] | None) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    def change(_: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value(tensors.get(name, torch.zeros(3)))

    return change


@pytest.fixture
def nothing_is_built(monkeypatch) -> None:
    """A refusal comes before memory is taken for a model."""
    monkeypatch.setattr(model_file_module, "untouched", lambda *_, **__: pytest.fail("a model is built"))
    monkeypatch.setattr(trainer_module, "drawn", lambda *_, **__: pytest.fail("a model is built"))


def test_a_copy_of_the_state_is_read(digits, state, tmp_path):
    """The crafted files below differ from this one in one place."""
    path = craft(state, tmp_path / "copy", lambda *_: None)
    one, other = Trainer.load(state, digits), Trainer.load(path, digits)
    assert one.config == other.config == CONFIG
    assert one.step_count == other.step_count == 4
    momentum = load_file(state)
    for i, (p, q) in enumerate(zip(one.model.parameters(), other.model.parameters(), strict=True)):
        assert torch.equal(p, q)
        assert torch.equal(one.optimizer.state[p]["momentum_buffer"], momentum[f"momentum.{i}"])
        assert torch.equal(other.optimizer.state[q]["momentum_buffer"], momentum[f"momentum.{i}"])


# 10^400 is a number that no float and no 64-bit integer holds.
BAD_HEADERS = [
    ("config.depth", 10**9, r"the tensor model.hidden_weight must have the shape \(999999998, 15, 15\), got \(3, 15"),
    ("config.depth", 3 * 10**7, "the tensor model.hidden_weight must have the shape"),
    ("config.depth", 10**400, r"config.depth must be below 2\*\*63, got an int of 1329 bits"),
    ("config.depth", 2.5, "config.depth must be an int, got 2.5"),
    ("config.depth", 5.0, "config.depth must be an int, got 5.0"),
    ("config.depth", "12", "config.depth must be an int, got '12'"),
    ("config.depth", 1, "config.depth must be at least 2, got 1"),
    ("config.depth", True, "config.depth must be an int, got True"),
    ("config.depth", ..., "config.depth is missing"),
    ("config.scale", 10**400, "config.scale must be finite and positive, got an int of 1329 bits"),
    ("config.scale", 1e300, "scale must have scale"),
    ("config.scale", 0, "config.scale must be finite and positive, got 0"),
    ("config.scale", None, "config.scale must be finite and positive, got None"),
    ("config.lr", 10**400, "config.lr must be finite and positive, got an int of 1329 bits"),
    ("config.lr", "1e-3", "config.lr must be finite and positive, got '1e-3'"),
    ("config.rho", -1, "config.rho must be finite and not negative, got -1"),
    ("config.beta", [], r"config.beta must be finite and not negative, got \[\]"),
    ("config.momentum", 1, "config.momentum must be at least 0 and below 1, got 1"),
    ("config.checkpoint", 2**63, r"config.checkpoint must be below 2\*\*63, got 9223372036854775808"),
    ("config.checkpoint", [2, 2**63], r"config.checkpoint must be below 2\*\*63, got \[2, "),
    ("config.checkpoint", 0, "config.checkpoint must be at least 1 layer a segment, got 0"),
    ("config.checkpoint", [0, 2], "config.checkpoint must be at least 1 layer a segment"),
    ("config.checkpoint", [1, 2, 3], r"config.checkpoint must be 'auto', 'none' or an int, got \[1, 2, 3\]"),
    ("config.checkpoint", "some", "config.checkpoint must be 'auto', 'none' or an int, got 'some'"),
    ("config.arch", "rnn", "config.arch must be one of mlp, cnn, got 'rnn'"),
    ("config.arch", ["mlp"], "config.arch must be one of mlp, cnn"),
    ("config.form", "other", "config.form must be 'offset' or 'plain', got 'other'"),
    ("config.init", "kaiming", "init='kaiming' needs form='plain'"),
    ("config.dtype", "float64", "the tensor model.first_weight must have the dtype torch.float64, got torch.float32"),
    ("config.dtype", "bfloat16", "config.dtype must be one of float32, float64, got 'bfloat16'"),
    ("config.decay", "cosine", "config.decay must be none or linear, got 'cosine'"),
    ("config.epochs", 0, "config.epochs must be an int of at least 1, got 0"),
    ("config.batch_size", 10**400, r"config.batch_size must be below 2\*\*63"),
    ("config.seed", 2**63, "config.seed must be at least 0 and below 2..63, got 9223372036854775808"),
    ("config.pool", "4", "config.pool must be an int of at least 1, got '4'"),
    ("config.predicted_loss", "low", "config.predicted_loss must be finite and not negative, got 'low'"),
    ("config.more", 1, "config.more is not known, got 1"),
    ("config", [], r"config must be an object, got \[\]"),
    ("config", ..., "config is missing"),
    ("epoch", "a", "epoch must be an int of at least 0, got 'a'"),
    ("epoch", None, "epoch must be an int of at least 0, got None"),
    ("epoch", -1, "epoch must be an int of at least 0, got -1"),
    ("epoch", 10**400, r"epoch must be below 2\*\*63"),
    ("step_in_epoch", 3, "step_in_epoch must be below the 3 steps of an epoch, got 3"),
    ("step_in_epoch", 1.5, "step_in_epoch must be an int of at least 0, got 1.5"),
    ("seconds", -1, "seconds must be finite and not negative, got -1"),
    ("seconds", math.nan, "seconds must be finite and not negative, got nan"),
    ("seconds", math.inf, "seconds must be finite and not negative, got inf"),
    ("threads", 0, "threads must be an int of at least 1, got 0"),
    ("in_features", 10**9, r"the tensor model.first_weight must have the shape \(1000000011, 1000000000\)"),
    ("out_features", 0, "out_features must be an int of at least 1, got 0"),
    ("in_features", None, "in_features must be an int of at least 1, got None"),
]


@pytest.mark.parametrize(("place", "value", "message"), BAD_HEADERS)
def test_a_crafted_header_is_refused(digits, state, tmp_path, place, value, message):
    path = craft(state, tmp_path / "crafted", setting(place, value))
    with pytest.raises(DamagedFileError, match=f"^{path} is damaged or not a narrowdeep file: {message}"):
        Trainer.load(path, digits)
    if place.startswith("config.") or "features" in place:
        with pytest.raises(DamagedFileError, match=f"^{path} is damaged or not a narrowdeep file: {message}"):
            training.load_model(path)


@pytest.mark.usefixtures("nothing_is_built")
@pytest.mark.parametrize("place", ["config.depth", "in_features", "out_features"])
@pytest.mark.parametrize("value", [3 * 10**7, 10**9, 2**63 - 1])
@pytest.mark.parametrize("form", ["offset", "plain"])
def test_a_size_is_refused_before_memory_is_taken(digits, state, tmp_path, place, value, form):
    def change(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        header["config"]["form"] = form
        setting(place, value)(header, tensors)

    path = craft(state, tmp_path / "crafted", change)
    for load in (lambda: Trainer.load(path, digits), lambda: training.load_model(path)):
        with pytest.raises(DamagedFileError, match=r"the tensor model\.\w+ must have the shape"):
            load()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it must be JSON, got ''"),
        ("null", "it must be an object, got None"),
        ("[1]", r"it must be an object, got \[1\]"),
        ("[" * 100_000, "it must be JSON"),
        ('{"epoch": ' + "1" * 5000 + "}", "it must be JSON|config is missing"),
    ],
)
def test_a_header_that_is_no_object(digits, state, tmp_path, text, message):
    path = craft(state, tmp_path / "crafted", lambda *_: text)
    for load in (lambda: Trainer.load(path, digits), lambda: training.load_model(path)):
        with pytest.raises(DamagedFileError, match=f"^{path} is damaged or not a narrowdeep file: ({message})"):
            load()


MISSHAPEN = {
    "too few": lambda t: t.flatten()[:-1],
    "too many": lambda t: torch.zeros(47_999),
    "broadcasts": lambda t: t[:1],
    "none": lambda t: t.new_zeros(0),
    "scalar": lambda t: t.new_zeros(()),
    "flat": lambda t: t.flatten(),
    "one more dimension": lambda t: t[None],
}


@pytest.mark.usefixtures("nothing_is_built")
@pytest.mark.parametrize(
    ("name", "how"),
    [
        (name, how)
        for name in ("momentum.0", "momentum.2", "momentum.5", "model.hidden_weight", "random_state", "sums")
        for how in MISSHAPEN
        if how != "flat" or "weight" in name or name in ("momentum.0", "momentum.2")  # the others are flat
    ],
)
def test_a_tensor_of_another_shape_is_refused(digits, state, tmp_path, name, how):
    """A momentum of another shape made the fused optimizer write past its end."""
    original = load_file(state)[name]
    value = MISSHAPEN[how](original).to(original.dtype)
    assert value.shape != original.shape
    path = craft(state, tmp_path / "crafted", tensor(name, lambda _: value))
    with pytest.raises(DamagedFileError, match=f"^{path} is .*: the tensor {name} must have the shape .*, got "):
        Trainer.load(path, digits)


@pytest.mark.usefixtures("nothing_is_built")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (tensor("momentum.0", None), "the tensor momentum.0 is missing"),
        (tensor("momentum.0", Tensor.double), "momentum.0 must have the dtype torch.float32, got torch.float64"),
        (tensor("momentum.0", Tensor.half), "momentum.0 must have the dtype torch.float32, got None"),
        (tensor("momentum.1", Tensor.int), "momentum.1 must have the dtype torch.float32, got None"),
        (tensor("momentum.6", lambda t: t), "the tensor momentum.6 is not known"),
        (tensor("momentum.x", lambda t: t), "the tensor momentum.x is not known"),
        (tensor("more", lambda t: t), "the tensor more is not known"),
        (tensor("model.more", lambda t: t), "the tensor model.more is not known"),
        (tensor("model.last_bias", None), "the tensor model.last_bias is missing"),
        (tensor("model.last_bias", Tensor.double), "model.last_bias must have the dtype torch.float32, got torch.f"),
        (tensor("random_state", Tensor.float), "random_state must have the dtype torch.uint8, got torch.float32"),
        (tensor("random_state", None), "the tensor random_state is missing"),
        (tensor("sums", Tensor.float), "sums must have the dtype torch.float64, got torch.float32"),
        (lambda header, _: header.update(epoch=0, step_in_epoch=0), "the tensor momentum.0 is not known"),
        (setting("config.momentum", 0.0), "the tensor momentum.0 is not known"),
    ],
)
def test_tensors_that_do_not_belong_are_refused(digits, state, tmp_path, change, message):
    path = craft(state, tmp_path / "crafted", change)
    with pytest.raises(DamagedFileError, match=f"^{path} is damaged or not a narrowdeep file: (the tensor )?{message}"):
        Trainer.load(path, digits)


@pytest.mark.parametrize("name", ["momentum.0", "model.hidden_weight", "sums"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused(digits, state, tmp_path, name, value):
    """No run writes them."""
    path = craft(state, tmp_path / "crafted", tensor(name, lambda t: torch.full_like(t, value)))
    with pytest.raises(DamagedFileError, match=f"the tensor {name} must be finite"):
        Trainer.load(path, digits)


def test_a_random_state_of_nonsense_is_refused(digits, state, tmp_path):
    path = craft(state, tmp_path / "crafted", tensor("random_state", lambda t: torch.full_like(t, 255)))
    with pytest.raises(DamagedFileError, match=str(path)):
        Trainer.load(path, digits)


@pytest.mark.usefixtures("nothing_is_built")
@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("model.depth", 3 * 10**7, "the tensor model.hidden_weight.0 must have the shape"),
        ("model.depth", "9", "model.depth must be an int, got '9'"),
        ("model.chunks", 4, "it must hold 12 parameters as its settings say, got 10"),
        ("model.chunks", 8, "chunks must be at most the number of hidden layers, 7, got 8"),
        ("model.chunks", 0, "model.chunks must be an int of at least 1, got 0"),
        ("model.kernel_size", 3, r"the tensor model.first_weight must have the shape \(4, 1, 3, 3\), got \(4, 1, 5"),
        ("model.kernel_size", 2.5, "model.kernel_size must be an int of at least 1, got 2.5"),
        ("model.arch", "mlp", r"the tensor model.first_weight must have the shape \(4, 1\), got \(4, 1, 5, 5\)"),
        ("model.scale", 10**400, "model.scale must be finite and positive, got an int of 1329 bits"),
        ("model.checkpoint", 2**63, r"model.checkpoint must be below 2\*\*63, got 9223372036854775808"),
        ("model.optimizer", "lion", "model.optimizer must be one of sgd, momentum, .*, fused-momentum, got 'lion'"),
        ("model.budget", "2GiB", "model.budget must be an int of at least 0, got '2GiB'"),
        ("model.more", 1, "model.more is not known, got 1"),
        ("model.form", ..., "model.form is missing"),
        ("model", [], r"model must be an object, got \[\]"),
        ("more", [], r"more is not known, got \[\]"),
    ],
)
def test_a_crafted_model_is_refused(model, tmp_path, place, value, message):
    path = craft(model, tmp_path / "crafted", setting(place, value))
    with pytest.raises(DamagedFileError, match=f"^{path} is damaged or not a narrowdeep file: {message}"):
        training.load_model(path)


@pytest.mark.usefixtures("nothing_is_built")
def test_many_chunks_take_no_memory(model, tmp_path):
    def change(header: dict[str, Any], _: dict[str, Tensor]) -> None:
        header["model"] |= {"depth": 2**62, "chunks": 2**61}

    path = craft(model, tmp_path / "crafted", change)
    with pytest.raises(DamagedFileError, match="it must hold 4611686018427387908 parameters .*, got 10"):
        training.load_model(path)


def test_files_from_before_are_read(digits, state, model, tmp_path):
    """They say nothing of budgets, and not where their learning rate came from."""

    def older(header: dict[str, Any], _: dict[str, Tensor]) -> None:
        for part in (header.get("config", {}), header.get("model", {})):
            for name in ("lr_predicted", "budget", "optimizer"):
                part.pop(name, None)

    assert Trainer.load(craft(state, tmp_path / "state", older), digits).config == CONFIG
    found = training.load_model(craft(model, tmp_path / "model", older))
    assert found.budget is None
    assert found.chunks == 3


def test_no_file(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "none", tmp_path, tmp_path / "fifo"):
        with pytest.raises(FileNotFoundError, match=f"^{path} does not exist"):
            training.load_model(path)


MODELS: list[Callable[[], DeepNarrowMLP | DeepNarrowCNN]] = [
    lambda: DeepNarrowMLP(3, 2, 9, chunks=3, checkpoint=(2, 3), rho=0.5, beta=0.25, scale=1e-3, form="plain"),
    lambda: DeepNarrowMLP(3, 2, 2, checkpoint="none", init="kaiming", form="plain", dtype=torch.float64),
    lambda: DeepNarrowMLP(3, 2, 9, budget="3MiB", optimizer="adam"),
    lambda: DeepNarrowCNN(2, 1, 7, kernel_size=5, chunks=2, checkpoint=4, scale=1e8),
    lambda: DeepNarrowCNN(1, 2, 3, kernel_size=1, budget=10**9, dtype=torch.float64),
]


def assert_same_model(found: nn.Module, expected: nn.Module) -> None:
    assert type(found) is type(expected)
    assert repr(found) == repr(expected)
    names = ("depth", "scale", "rho", "beta", "init", "form", "checkpoint", "chunks", "budget", "optimizer", "width")
    for name in names:
        assert getattr(found, name) == getattr(expected, name), name
    ours, theirs = dict(found.named_parameters()), dict(expected.named_parameters())
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        assert torch.equal(ours[name], theirs[name])


@pytest.mark.parametrize("make", MODELS)
def test_every_setting_survives(tmp_path, make):
    expected = make()
    training.save_model(expected, tmp_path / "model")
    assert_same_model(training.load_model(tmp_path / "model"), expected)


@pytest.mark.parametrize("make", MODELS)
def test_the_shapes_of_settings_are_those_of_the_model(tmp_path, make):
    model = make()
    training.save_model(model, tmp_path / "model")
    header = json.loads(safe_open(tmp_path / "model", framework="pt").metadata()["header"])["model"]
    shapes = training.model_file.ModelSettings(**header).shapes()
    assert shapes == {name: tuple(p.shape) for name, p in model.named_parameters()}
    if model.chunks == 1:
        assert list(shapes) == [name for name, _ in model.named_parameters()]


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch 2.13's own compiler
def test_what_wraps_a_model_is_taken_off(tmp_path):
    expected = DeepNarrowMLP(3, 2, 9, checkpoint=3, dtype=torch.float64)
    compiled = torch.compile(copy.deepcopy(expected))
    in_place = copy.deepcopy(expected)
    in_place.compile()
    wrapped: dict[str, Any] = {
        "compiled": compiled,
        "compiled in place": in_place,
        "parallel": nn.DataParallel(copy.deepcopy(expected)),
        "distributed": nn.parallel.DistributedDataParallel(copy.deepcopy(expected)),
        "compiled distributed": torch.compile(nn.parallel.DistributedDataParallel(copy.deepcopy(expected))),
        "distributed compiled": nn.parallel.DistributedDataParallel(torch.compile(copy.deepcopy(expected))),
        "averaged": torch.optim.swa_utils.AveragedModel(expected),
    }
    for name, model in wrapped.items():
        training.save_model(model, tmp_path / name)
        assert_same_model(training.load_model(tmp_path / name), expected)


def pruned() -> nn.Module:
    return prune.l1_unstructured(DeepNarrowMLP(3, 2, 9), "hidden_weight", amount=0.5)


def normed() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(DeepNarrowMLP(3, 2, 9), "first_weight")


def normed_chunk() -> nn.Module:
    model = DeepNarrowMLP(3, 2, 9, chunks=2)
    nn.utils.parametrizations.orthogonal(model.hidden_weight, "0")
    return model


def extended() -> nn.Module:
    model = DeepNarrowMLP(3, 2, 9)
    model.register_parameter("more", nn.Parameter(torch.ones(1)))
    return model


def stretched() -> nn.Module:
    model = DeepNarrowMLP(3, 2, 9)
    model.last_bias = nn.Parameter(torch.ones(3))
    return model


class Derived(DeepNarrowMLP):
    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (pruned, ValueError, "model must not be pruned or parametrized.*prune.remove.*hidden_weight_orig"),
        (normed, ValueError, "model must not be pruned or parametrized.*remove_parametrizations"),
        (normed_chunk, ValueError, "model must not be pruned or parametrized.*remove_parametrizations"),
        (extended, ValueError, "the tensor model.more is not known"),
        (stretched, ValueError, r"model.last_bias must have the shape \(2,\), got \(3,\)"),
        (lambda: DeepNarrowMLP(3, 2, 9).bfloat16(), ValueError, "must have the dtype torch.float32, got torch.bf"),
        (lambda: DeepNarrowMLP(3, 2, 9, device="meta"), TypeError, "plain tensors in memory, got one without data"),
        (lambda: Derived(3, 2, 9), TypeError, "not a subclass, got Derived"),
        (lambda: nn.Linear(3, 2), TypeError, "model must be a DeepNarrowMLP or DeepNarrowCNN.*got Linear"),
        (lambda: nn.Sequential(DeepNarrowMLP(3, 2, 9)), TypeError, "got Sequential"),
        (lambda: None, TypeError, "got NoneType"),
    ],
)
def test_what_would_not_come_back_is_refused_before_it_is_written(tmp_path, make, error, message):
    path = tmp_path / "model"
    path.write_bytes(b"old")
    with pytest.raises(error, match=message):
        training.save_model(make(), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_pruned_model_made_permanent(tmp_path):
    model = pruned()
    prune.remove(model, "hidden_weight")
    training.save_model(model, tmp_path / "model")
    weight = training.load_model(tmp_path / "model").get_parameter("hidden_weight")
    assert torch.equal(weight, model.get_parameter("hidden_weight"))
    assert (weight == 0).double().mean() >= 0.5


def test_a_call_that_reads_leaves_the_random_state(digits, state, model, tmp_path):
    def states() -> list[Any]:
        return [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]  # noqa: NPY002

    before = states()
    training.load_model(model)
    training.load_model(state)
    training.read_config(state)
    trainer = Trainer.load(state, digits)
    Trainer(CONFIG, digits)
    network = training.build_model(CONFIG, digits)
    predict_step_size(network, digits, steps=3, batch_size=500, samples=8)
    load_task("digits")
    training.save_model(network, tmp_path / "model")
    fit(trainer, tmp_path / "run")
    assert states() == before


def test_build_model_draws_the_same_numbers_whatever_the_random_state(digits):
    torch.manual_seed(1)
    one = training.build_model(CONFIG, digits)
    torch.manual_seed(2)
    assert_same_model(training.build_model(CONFIG, digits), one)


LINE = json.dumps(dataclasses.asdict(METRIC))


def line(**values: Any) -> bytes:
    return (json.dumps(dataclasses.asdict(METRIC) | values) + "\n").encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text\n", "line 2: it must be JSON, got b'text"),
        (b"\n", "line 2: it must be JSON"),
        (b"null\n", "line 2: it must be an object, got None"),
        (b"[1]\n", r"line 2: it must be an object, got \[1\]"),
        (b"\xff\xfe\n", "line 2: it must be JSON"),
        (b"{}\n", "line 2: epoch is missing"),
        (line(train_loss=math.nan), "line 2: train_loss must be finite and not negative, got nan"),
        (line(test_loss=math.inf), "line 2: test_loss must be finite and not negative, got inf"),
        (line(test_loss=10**400), "line 2: test_loss must be finite and not negative, got an int of 1329 bits"),
        (line(train_loss=None), "line 2: train_loss must be finite and not negative, got None"),
        (line(train_loss="0.5"), "line 2: train_loss must be finite and not negative, got '0.5'"),
        (line(train_accuracy=2), "line 2: train_accuracy must be between 0 and 1, got 2"),
        (line(epoch=1.5), "line 2: epoch must be an int of at least 1, got 1.5"),
        (line(epoch=0), "line 2: epoch must be an int of at least 1, got 0"),
        (line(epoch=10**400), r"line 2: epoch must be below 2\*\*63"),
        (line(more=1), "line 2: more is not known, got 1"),
        (b"[" * 9_000 + b"\n", "line 2: it must be JSON"),
        (b"x" * 100_000, r"line 2 must be an epoch's, got b'xxx"),
    ],
)
def test_damaged_metrics_are_named(tmp_path, content, message):
    path = tmp_path / METRICS
    path.write_bytes(LINE.encode() + b"\n" + content)
    with pytest.raises(DamagedFileError, match=f"^{path} is damaged: {message}") as caught:
        training.read_metrics(tmp_path)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("rest", [b"", b"{", b"\xff", b'{"epoch": 2, "st'])
def test_metrics_cut_short_are_read(tmp_path, rest):
    (tmp_path / METRICS).write_bytes(f"{LINE}\n".encode() + rest)
    assert training.read_metrics(tmp_path) == [METRIC]


def test_metrics_that_are_no_file(digits, tmp_path):
    os.mkfifo(tmp_path / METRICS)  # to open it would wait for a writer
    with pytest.raises(DamagedFileError, match=f"^{tmp_path / METRICS} is damaged: it must be a regular file"):
        fit(Trainer(CONFIG, digits), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [METRICS]


def test_numbers_beyond_every_float():
    for name in ("scale", "lr", "rho", "epochs", "seed", "momentum", "depth", "checkpoint"):
        with pytest.raises(ValueError, match=rf"^{name} must .*, got an int of 1329 bits$"):
            dataclasses.replace(CONFIG, **{name: 10**400})
    with pytest.raises(ValueError, match=r"checkpoint must be below 2\*\*63, got 9223372036854775808"):
        dataclasses.replace(CONFIG, checkpoint=2**63)


def test_numpys_numbers_are_numbers(digits, tmp_path):
    config = dataclasses.replace(CONFIG, depth=np.int64(5), scale=np.float32(5), epochs=np.int32(3), checkpoint=[2, 3])
    assert config == CONFIG
    assert type(config.depth) is int
    assert type(config.scale) is float
    Trainer(config, digits).save(tmp_path / "state")
    assert training.read_config(tmp_path / "state") == CONFIG


def test_a_prediction_is_for_its_number_of_epochs(digits, tmp_path):
    config = dataclasses.replace(CONFIG, predicted_loss=0.25, lr_predicted=True)
    assert config.for_epochs(3) is config
    longer = config.for_epochs(4)
    assert (longer.epochs, longer.predicted_loss, longer.lr_was_predicted) == (4, None, True)
    older = dataclasses.replace(CONFIG, predicted_loss=0.25).for_epochs(4)
    assert (older.predicted_loss, older.lr_was_predicted) == (None, True)
    assert not CONFIG.for_epochs(4).lr_was_predicted
    fit(Trainer(config, digits), tmp_path, plot=False)
    resumed = Trainer.load(tmp_path / CHECKPOINT, digits, epochs=4)
    assert resumed.config == longer
    assert fit(resumed, tmp_path, plot=False)  # the same run
    assert training.read_config(tmp_path / CHECKPOINT) == longer


def test_a_plot_shows_the_prediction_only_of_its_epochs(digits, tmp_path, monkeypatch):
    shown: list[float | None] = []
    monkeypatch.setattr(training.run, "plot_metrics", lambda *_, predicted, **__: shown.append(predicted))
    fit(Trainer(dataclasses.replace(CONFIG, predicted_loss=0.25, lr_predicted=True), digits), tmp_path)
    fit(Trainer.load(tmp_path / CHECKPOINT, digits), tmp_path)
    fit(Trainer.load(tmp_path / CHECKPOINT, digits, epochs=4), tmp_path)
    assert shown == [0.25, 0.25, None]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660), (0o077, 0o600)])
def test_the_files_of_a_run_follow_the_umask(digits, tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        fit(Trainer(CONFIG, digits), tmp_path)
        training.save_model(DeepNarrowMLP(1, 1, 3), tmp_path / "model")
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()}
    assert modes == dict.fromkeys((CHECKPOINT, METRICS, CURVES, "model"), mode)


def test_what_looks_like_temporary_files_is_left_alone(digits, tmp_path):
    (tmp_path / "victim").write_text("mine")
    for name in (CHECKPOINT, METRICS, CURVES):
        (tmp_path / f"{name}.tmp").symlink_to(tmp_path / "victim")
    fit(Trainer(CONFIG, digits), tmp_path)
    assert (tmp_path / "victim").read_text() == "mine"
    assert all((tmp_path / f"{name}.tmp").is_symlink() for name in (CHECKPOINT, METRICS, CURVES))


def test_a_folder_takes_one_run(digits, tmp_path):
    fit(Trainer(CONFIG, digits), tmp_path, plot=False)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    caught: list[BaseException] = []

    def another(trainer: Trainer) -> None:
        def work() -> None:
            try:
                fit(Trainer(CONFIG, digits), tmp_path, plot=False)
            except BaseException as error:
                caught.append(error)

        if trainer.step_count == 10:
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()

    longer = Trainer.load(tmp_path / CHECKPOINT, digits, epochs=6)
    assert fit(longer, tmp_path, plot=False, on_step=another)
    (error,) = caught
    assert isinstance(error, files.FolderInUseError)
    assert f"{tmp_path} is in use by another run: process {os.getpid()} on " in str(error)
    assert [m.epoch for m in training.read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(before)


def test_a_full_disk_names_the_metrics(digits, tmp_path, monkeypatch):
    trainer = Trainer(CONFIG, digits)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill(trainer: Trainer) -> None:
        if trainer.step_count == 2:
            monkeypatch.setattr(os, "write", full)

    with pytest.raises(OSError, match=f"^{tmp_path / METRICS} cannot be written: No space left on device$"):
        fit(trainer, tmp_path, plot=False, on_step=fill)
    monkeypatch.undo()
    assert fit(Trainer.load(tmp_path / CHECKPOINT, digits), tmp_path, plot=False)
    assert [m.epoch for m in training.read_metrics(tmp_path)] == [1, 2, 3]


def test_metrics_are_on_the_disk_before_the_state_that_knows_them(digits, tmp_path, monkeypatch):
    calls: list[str] = []
    for kind, name in ((files.Log, "write"), (files.Log, "sync"), (Trainer, "save")):
        original = getattr(kind, name)

        def record(*arguments: Any, name: str = name, original: Any = original) -> Any:
            calls.append(name)
            return original(*arguments)

        monkeypatch.setattr(kind, name, record)
    fit(Trainer(CONFIG, digits), tmp_path, plot=False, save_every=0)
    assert calls.count("write") == 3
    assert calls.count("save") == 1 + 9 + 1  # at the start, after each step, at the end
    assert all(before == "sync" for before, call in itertools.pairwise(calls) if call == "save")


@pytest.mark.parametrize("arch", ["mlp", "cnn"])
@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_state_of_a_shallow_run(digits, tmp_path, arch, depth, momentum):
    """Parameters of no layers have a momentum, too."""
    config = dataclasses.replace(CONFIG, arch=arch, depth=depth, momentum=momentum, checkpoint="auto")
    trainer = Trainer(config, digits)
    for _ in range(2):
        trainer.step()
    trainer.save(tmp_path / "state")
    other = Trainer.load(tmp_path / "state", digits)
    trainer.step()
    other.step()
    for p, q in zip(trainer.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert_same_model(training.load_model(tmp_path / "state"), Trainer.load(tmp_path / "state", digits).model)
