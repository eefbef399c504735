from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.kernel_ridge import KernelRidge

from narrowdeep import DeepNarrowCNN, DeepNarrowMLP, training
from narrowdeep.data import Task, load_task
from narrowdeep.ntk import empirical_ntk
from narrowdeep.training import CHECKPOINT, CURVES, METRICS, DamagedFileError, TrainConfig, Trainer, fit, thesis_loss

CONFIG = TrainConfig(
    task="digits",
    arch="mlp",
    depth=5,
    scale=5.0,
    rho=1.0,
    beta=1.0,
    init="ntk",
    form="offset",
    checkpoint="auto",
    pool=4,
    epochs=3,
    batch_size=500,
    lr=0.02 / (5 * 25),
    momentum=0.9,
    seed=3,
    dtype="float32",
)
TOY = dataclasses.replace(CONFIG, task="toy", pool=1, batch_size=200, dtype="float64", momentum=0.0)


@pytest.fixture(scope="module")
def digits() -> Task:
    return load_task("digits", pool=4)


@pytest.fixture(scope="module")
def toy() -> Task:
    return load_task("toy", dtype=torch.float64)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def losses(folder: Path) -> list[tuple[float, float]]:
    return [(m.train_loss, m.test_loss) for m in training.read_metrics(folder)]


def test_thesis_loss():
    prediction = torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, 0.0]])
    target = torch.tensor([[0.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    assert thesis_loss(prediction, target).item() == pytest.approx((1 + 4 + 1) / 6)


@pytest.mark.parametrize(("decay", "factors"), [("none", [1, 1, 1, 1, 1, 1]), ("linear", [6, 5, 4, 3, 2, 1])])
def test_a_step_is_gradient_descent_in_the_order_of_the_epoch(digits, decay, factors):
    """Against plain torch: eager network in float64, gradients by autograd, heavy ball written out."""
    config = dataclasses.replace(CONFIG, dtype="float64", epochs=2, decay=decay)
    task = load_task("digits", pool=4, dtype=torch.float64)
    trainer = Trainer(config, task)
    generator = torch.Generator().manual_seed(config.seed)
    model = DeepNarrowMLP(4, 10, 5, scale=5.0, dtype=torch.float64)
    model.reset_parameters(generator)
    eager = model.to_sequential()
    batches = [b for _ in range(2) for b in torch.randperm(1437, generator=generator).split(500)]
    velocity = [torch.zeros_like(p) for p in eager.parameters()]
    losses = []
    for batch, factor in zip(batches, factors, strict=True):
        loss = 0.5 * (eager(task.x_train[batch]) - task.y_train[batch]).square().sum() / len(batch)
        losses.append(loss.item() * len(batch))
        gradients = torch.autograd.grad(loss, list(eager.parameters()))
        with torch.no_grad():
            for p, v, g in zip(eager.parameters(), velocity, gradients, strict=True):
                v.mul_(config.momentum).add_(g)
                p.sub_(config.lr * factor / factors[0] * v)
    metrics = [trainer.step() for _ in range(6)]
    assert [metric is None for metric in metrics] == [True, True, False] * 2
    for metric, total in zip((metrics[2], metrics[5]), (sum(losses[:3]), sum(losses[3:])), strict=True):
        assert metric.train_loss == pytest.approx(total / 1437, rel=1e-12)
    torch.testing.assert_close(trainer.model(task.x_test), eager(task.x_test), rtol=1e-10, atol=1e-12)


def test_metrics_are_those_of_the_model(digits):
    trainer = Trainer(CONFIG, digits)
    metrics = None
    while metrics is None:
        metrics = trainer.step()
    out = trainer.model(digits.x_test)
    assert metrics.test_loss == pytest.approx(thesis_loss(out, digits.y_test).item(), rel=1e-6)
    right = (out.argmax(1) == digits.y_test.argmax(1)).double().mean().item()
    assert metrics.test_accuracy == right
    assert (metrics.epoch, metrics.step) == (1, 3)


def test_regression_has_no_accuracy(toy, tmp_path):
    assert fit(Trainer(TOY, toy), tmp_path)
    metrics = training.read_metrics(tmp_path)
    assert [m.epoch for m in metrics] == [1, 2, 3]
    assert all(m.train_accuracy is None and m.test_accuracy is None for m in metrics)
    assert metrics[2].train_loss < metrics[0].train_loss


def test_gradient_descent_follows_the_networks_own_kernel():
    """n steps of kernel time tau multiply the residual by (I - tau K / N)^n, K the scaled NTK (thesis section 3.2).

    The kernel drifts by about 0.27 / C_L (docs/theory.md), so at C_L = 1e6 the two agree to 1e-5. Only right if the
    loss, the learning rate and the update all have the factors they claim.
    """
    task = load_task("toy", samples=17, dtype=torch.float64)
    tau, steps, scale = 0.5, 60, 1e6
    lr = tau / (5 * scale**2)
    trainer = Trainer(dataclasses.replace(TOY, epochs=steps, scale=scale, lr=lr, batch_size=17), task)
    rows = []
    for x in task.x_train:
        gradients = torch.autograd.grad(trainer.model(x), list(trainer.model.parameters()))
        rows.append(torch.cat([g.flatten() for g in gradients]))
    jacobian = torch.stack(rows)
    kernel = jacobian @ jacobian.T / (5 * scale**2)
    residual = -task.y_train
    for _ in range(steps):
        metrics = trainer.step()
        assert metrics is not None
        assert metrics.train_loss == pytest.approx(residual.square().sum().item() / (2 * 17), rel=1e-4)
        residual = residual - tau / 17 * kernel @ residual
    torch.testing.assert_close(trainer.model(task.x_train) - task.y_train, residual, rtol=0, atol=1e-5)
    assert residual.norm() < 0.5 * task.y_train.norm()


def test_same_seed_same_numbers(digits, tmp_path):
    runs = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        trainer = Trainer(dataclasses.replace(CONFIG, seed=seed), digits)
        fit(trainer, tmp_path / name, plot=False)
        runs.append((losses(tmp_path / name), weights(trainer)))
    assert runs[0][0] == runs[1][0]
    assert_same(runs[0][1], runs[1][1])
    assert runs[0][0] != runs[2][0]


@pytest.mark.parametrize(("momentum", "decay"), [(0.0, "none"), (0.9, "none"), (0.9, "linear")])
@pytest.mark.parametrize("stop", [0, 1, 2, 3, 4, 7, 9])
def test_resume_is_bitwise(digits, tmp_path, momentum, decay, stop):
    """Stopped after any step, inside an epoch or between two, saved, loaded into a new trainer."""
    config = dataclasses.replace(CONFIG, momentum=momentum, decay=decay)
    whole = Trainer(config, digits)
    fit(whole, tmp_path / "whole", plot=False)
    first = Trainer(config, digits)
    before = [m for m in (first.step() for _ in range(stop)) if m is not None]
    first.save(tmp_path / "state")
    for _ in range(2):  # what happens after the save must not matter
        first.step()
    second = Trainer.load(tmp_path / "state", digits)
    assert second.step_count == stop
    after = []
    while not second.finished:
        after.append(second.step())
    got = [(m.train_loss, m.test_loss) for m in before + [m for m in after if m is not None]]
    assert got == losses(tmp_path / "whole")
    assert_same(weights(second), weights(whole))


def test_resume_can_train_longer(digits, tmp_path):
    fit(Trainer(dataclasses.replace(CONFIG, epochs=2), digits), tmp_path / "short", plot=False)
    longer = Trainer.load(tmp_path / "short" / CHECKPOINT, digits, epochs=3)
    assert fit(longer, tmp_path / "short", plot=False)
    whole = Trainer(CONFIG, digits)
    fit(whole, tmp_path / "whole", plot=False)
    assert losses(tmp_path / "short") == losses(tmp_path / "whole")
    assert_same(weights(longer), weights(whole))


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step_and_keeps_it(digits, tmp_path, signal_number):
    handler = signal.getsignal(signal_number)

    def interrupt(trainer: Trainer) -> None:
        if trainer.step_count == 5:
            os.kill(os.getpid(), signal_number)

    trainer = Trainer(CONFIG, digits)
    assert not fit(trainer, tmp_path, on_step=interrupt)
    assert trainer.step_count == 5
    assert signal.getsignal(signal_number) is handler
    assert [m.epoch for m in training.read_metrics(tmp_path)] == [1]
    resumed = Trainer.load(tmp_path / CHECKPOINT, digits)
    assert resumed.step_count == 5
    assert resumed.running_loss() == trainer.running_loss()
    assert fit(resumed, tmp_path)
    whole = Trainer(CONFIG, digits)
    fit(whole, tmp_path / "whole", plot=False)
    assert losses(tmp_path) == losses(tmp_path / "whole")
    assert_same(weights(resumed), weights(whole))


@pytest.fixture
def interruptible():
    """Python's own answer to Ctrl-C, which a process started in the background does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_second_interrupt_stops_at_once_and_keeps_the_last_checkpoint(digits, tmp_path):
    def interrupt(trainer: Trainer) -> None:
        if trainer.step_count == 4:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(Trainer(CONFIG, digits), tmp_path, on_step=interrupt, save_every=1e9)
    assert Trainer.load(tmp_path / CHECKPOINT, digits).step_count == 0


def test_metrics_past_the_checkpoint_are_dropped_on_resume(digits, tmp_path):
    """A killed run has written lines, the last one in part, that its checkpoint does not know."""
    fit(Trainer(CONFIG, digits), tmp_path, plot=False)
    whole = losses(tmp_path)
    early = Trainer(CONFIG, digits)
    for _ in range(4):
        early.step()
    early.save(tmp_path / CHECKPOINT)
    with open(tmp_path / METRICS, "a") as file:
        file.write('{"epoch": 4, "st')
    fit(Trainer.load(tmp_path / CHECKPOINT, digits), tmp_path, plot=False)
    assert losses(tmp_path) == whole


def test_a_failed_save_leaves_the_old_checkpoint(digits, tmp_path, monkeypatch):
    trainer = Trainer(CONFIG, digits)
    path = tmp_path / CHECKPOINT
    trainer.save(path)
    before = path.read_bytes()
    trainer.step()

    def full_disk(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        trainer.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_divergence_is_an_error_and_not_saved(digits, tmp_path):
    config = dataclasses.replace(CONFIG, lr=1e3, epochs=50)
    with pytest.raises(training.DivergedError, match="the loss is no longer finite in epoch .*lr = 1000"):
        fit(Trainer(config, digits), tmp_path, plot=False)
    state = Trainer.load(tmp_path / CHECKPOINT, digits)
    assert all(torch.isfinite(value).all() for value in weights(state).values())
    for line in (tmp_path / METRICS).read_text().splitlines():
        assert all(v is None or math.isfinite(v) for v in json.loads(line).values())


@pytest.mark.parametrize("what", ["parameter", "momentum"])
def test_no_checkpoint_of_what_is_not_finite(digits, tmp_path, what):
    """The loss of a step is measured before its update: it is still finite when the update goes wrong."""
    trainer = Trainer(CONFIG, digits)
    trainer.step()
    path = tmp_path / CHECKPOINT
    trainer.save(path)
    before = path.read_bytes()
    parameter = trainer.model.hidden_bias
    tensor = parameter if what == "parameter" else trainer.optimizer.state[parameter]["momentum_buffer"]
    with torch.no_grad():
        tensor.view(-1)[3] = math.inf
    with pytest.raises(training.DivergedError, match="parameters are no longer finite .*another --out with a smaller"):
        trainer.save(path)
    assert path.read_bytes() == before


def test_divergence_in_the_last_step_keeps_the_checkpoint_before(digits, tmp_path):
    def break_it(trainer: Trainer) -> None:
        if trainer.step_count == 4:
            with torch.no_grad():
                trainer.model.last_bias[0] = math.nan
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(training.DivergedError):
        fit(Trainer(CONFIG, digits), tmp_path, on_step=break_it, save_every=1e9)
    assert Trainer.load(tmp_path / CHECKPOINT, digits).step_count == 0


def test_fit_refuses_the_folder_of_another_run_and_changes_nothing(digits, tmp_path):
    fit(Trainer(CONFIG, digits), tmp_path, plot=False)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=f"out must not hold a run with another configuration .*got {tmp_path}"):
        fit(Trainer(dataclasses.replace(CONFIG, seed=4), digits), tmp_path, plot=False)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_fit_reads_the_metrics_before_it_writes(digits, tmp_path):
    (tmp_path / METRICS).write_text("{}\n")
    with pytest.raises(DamagedFileError, match=METRICS):
        fit(Trainer(CONFIG, digits), tmp_path, plot=False)
    assert [p.name for p in tmp_path.iterdir()] == [METRICS]


def test_save_where_nothing_can_be_written_names_the_path(digits, tmp_path):
    path = tmp_path / "missing" / CHECKPOINT
    with pytest.raises(OSError, match=f"{path} cannot be written: "):
        Trainer(CONFIG, digits).save(path)


def test_the_checkpoint_knows_the_number_of_threads(digits, tmp_path):
    threads = torch.get_num_threads()
    trainer = Trainer(CONFIG, digits)
    assert trainer.saved_threads is None
    torch.set_num_threads(threads + 1)
    try:
        trainer.save(tmp_path / CHECKPOINT)
    finally:
        torch.set_num_threads(threads)
    assert Trainer.load(tmp_path / CHECKPOINT, digits).saved_threads == threads + 1


def test_running_loss_between_two_epochs_is_that_of_the_last(toy):
    trainer = Trainer(TOY, toy)
    assert math.isnan(trainer.running_loss())
    metrics = trainer.step()  # one step an epoch
    assert metrics is not None
    assert trainer.running_loss() == metrics.train_loss


@pytest.fixture
def saved(digits, tmp_path) -> Path:
    trainer = Trainer(CONFIG, digits)
    trainer.step()
    trainer.save(tmp_path / CHECKPOINT)
    return tmp_path / CHECKPOINT


@pytest.mark.parametrize("position", [0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999])
def test_one_flipped_bit_is_found(digits, saved, position):
    content = bytearray(saved.read_bytes())
    content[int(position * len(content))] ^= 4
    saved.write_bytes(content)
    with pytest.raises(DamagedFileError, match=str(saved)):
        Trainer.load(saved, digits)


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_a_truncated_file_is_found(digits, saved, length):
    saved.write_bytes(saved.read_bytes()[:length])
    with pytest.raises(DamagedFileError, match=str(saved)):
        Trainer.load(saved, digits)
    with pytest.raises(DamagedFileError, match=str(saved)):
        training.load_model(saved)


def test_another_file_is_refused(digits, tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "other")
    (tmp_path / "pickle").write_bytes(pickle.dumps({"model": 1}))
    training.save_model(DeepNarrowMLP(4, 10, 3), tmp_path / "model")
    for name in ("other", "pickle", "model"):  # a model is no run
        with pytest.raises(DamagedFileError, match=name):
            Trainer.load(tmp_path / name, digits)
    with pytest.raises(FileNotFoundError, match="missing"):
        Trainer.load(tmp_path / "missing", digits)
    with pytest.raises(FileNotFoundError, match="missing"):
        training.load_model(tmp_path / "missing")


def test_loading_needs_the_runs_task(saved, toy):
    with pytest.raises(ValueError, match="task must have"):
        Trainer.load(saved, toy)
    with pytest.raises(ValueError, match="task must be 'digits'"):
        Trainer(CONFIG, toy)


@pytest.mark.parametrize("form", ["offset", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [(1, 1, 2), (3, 2, 5)])
def test_save_model_keeps_every_bit(tmp_path, form, dtype, sizes):
    model = DeepNarrowMLP(*sizes, scale=7.5, rho=0.5, beta=2.0, form=form, checkpoint=3, dtype=dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 1e-9)
    training.save_model(model, tmp_path / "model.safetensors")
    loaded = training.load_model(tmp_path / "model.safetensors")
    assert repr(loaded) == repr(model)
    assert_same(loaded.state_dict(), model.state_dict())


@pytest.mark.parametrize("form", ["offset", "plain"])
@pytest.mark.parametrize("sizes", [(1, 1, 2, 1), (3, 2, 5, 3), (2, 1, 3, 5)])
def test_save_model_keeps_every_bit_of_a_cnn(tmp_path, form, sizes):
    *counts, kernel_size = sizes
    model = DeepNarrowCNN(*counts, kernel_size=kernel_size, scale=7.5, rho=0.5, beta=2.0, form=form, checkpoint=3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 1e-9)
    training.save_model(model, tmp_path / "model.safetensors")
    loaded = training.load_model(tmp_path / "model.safetensors")
    assert isinstance(loaded, DeepNarrowCNN)
    assert repr(loaded) == repr(model)
    assert_same(loaded.state_dict(), model.state_dict())


def test_a_step_of_the_cnn_is_gradient_descent():
    """Against the eager network in float64, heavy ball written out."""
    config = dataclasses.replace(CONFIG, arch="cnn", task="digits01", pool=2, dtype="float64", epochs=1, batch_size=50)
    task = load_task("digits01", pool=2, dtype=torch.float64)
    trainer = Trainer(config, task)
    generator = torch.Generator().manual_seed(config.seed)
    model = DeepNarrowCNN(1, 1, 5, scale=5.0, dtype=torch.float64)
    model.reset_parameters(generator)
    eager = model.to_sequential()
    images = task.x_train.unflatten(1, (1, 4, 4))
    velocity = [torch.zeros_like(p) for p in eager.parameters()]
    for batch in torch.randperm(len(images), generator=generator).split(50):
        loss = 0.5 * (eager(images[batch]) - task.y_train[batch]).square().sum() / len(batch)
        gradients = torch.autograd.grad(loss, list(eager.parameters()))
        with torch.no_grad():
            for p, v, g in zip(eager.parameters(), velocity, gradients, strict=True):
                v.mul_(config.momentum).add_(g)
                p.sub_(config.lr * v)
        metrics = trainer.step()
    assert metrics is not None
    test = task.x_test.unflatten(1, (1, 4, 4))
    torch.testing.assert_close(trainer.model(test), eager(test), rtol=1e-9, atol=1e-12)
    assert metrics.test_loss == pytest.approx(thesis_loss(eager(test), task.y_test).item())


def test_cnn_needs_images(toy):
    with pytest.raises(ValueError, match="arch 'cnn' needs a task of images, got 'toy'"):
        Trainer(dataclasses.replace(TOY, arch="cnn"), toy)


def test_load_model_reads_a_run(digits, saved):
    model = training.load_model(saved)
    assert repr(model) == repr(Trainer.load(saved, digits).model)
    assert_same(model.state_dict(), weights(Trainer.load(saved, digits)))
    assert load_file(saved)["model.first_weight"].dtype == torch.float32


def test_plot_is_a_picture(digits, toy, tmp_path):
    for name, config, task, panels in (("digits", CONFIG, digits, 2), ("toy", TOY, toy, 1)):
        fit(Trainer(config, task), tmp_path / name)
        content = (tmp_path / name / CURVES).read_bytes()
        assert content.startswith(b"\x89PNG")
        width, height = (int.from_bytes(content[i : i + 4], "big") for i in (16, 20))
        assert width / height == pytest.approx(5.2 * panels / 3.8, rel=0.01)
        assert not list((tmp_path / name).glob("*.tmp"))


GAUSS_NEWTON = dataclasses.replace(
    CONFIG, depth=200, scale=1e6, optimizer="gauss-newton", damping=1e-3, momentum=0.0, lr=1 / 200 / 1e6 / 1e6
)


def test_a_pass_of_gauss_newton_is_ridge_regression_with_the_networks_kernel(digits, tmp_path):
    trainer = Trainer(GAUSS_NEWTON, digits)
    kernel = empirical_ntk(trainer.model, digits.x_train, reduce="trace").numpy() / 10
    cross = empirical_ntk(trainer.model, digits.x_test, digits.x_train, reduce="trace").numpy() / 10
    alpha = 1e-3 * kernel.diagonal().mean()
    ridge = KernelRidge(kernel="precomputed", alpha=alpha).fit(kernel, digits.y_train.numpy())
    metrics = trainer.step()
    for predicted, got, x, y in [
        (metrics.predicted_train_loss, metrics.train_loss, kernel, digits.y_train),
        (metrics.predicted_test_loss, metrics.test_loss, cross, digits.y_test),
    ]:
        loss = thesis_loss(torch.from_numpy(ridge.predict(x)), y).item()
        assert predicted == pytest.approx(loss, rel=1e-4)
        assert got == pytest.approx(loss, rel=1e-3)
    expected = digits.correct(torch.from_numpy(ridge.predict(cross)), digits.y_test) / len(digits.y_test)
    assert metrics.predicted_test_accuracy == pytest.approx(float(expected))
    assert metrics.test_accuracy == pytest.approx(float(expected), abs=1.01 / len(digits.y_test))
    outputs = trainer.model(digits.x_train).detach()
    assert metrics.train_accuracy == digits.correct(outputs, digits.y_train) / len(outputs)
    assert (metrics.epoch, metrics.step) == (1, 1)


def test_gauss_newton_resumes_bitwise(digits, tmp_path):
    whole = Trainer(GAUSS_NEWTON, digits)
    fit(whole, tmp_path / "whole", plot=False)
    first = Trainer(GAUSS_NEWTON, digits)
    first.step()
    first.save(tmp_path / "state")
    second = Trainer.load(tmp_path / "state", digits)
    while not second.finished:
        second.step()
    assert_same(weights(second), weights(whole))
    assert second.gauss_newton.state_dict()["damping"] == whole.gauss_newton.state_dict()["damping"] != 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"damping": None}, "damping must be given for optimizer 'gauss-newton', got None"),
        ({"damping": -1.0}, "damping must be .*got -1.0"),
        ({"momentum": 0.9}, "momentum must be 0.0 for optimizer 'gauss-newton', got 0.9"),
        ({"lr": 1.0}, "lr must be .* for optimizer 'gauss-newton', got 1.0"),
        ({"decay": "linear"}, "decay must be 'none' for optimizer 'gauss-newton', got 'linear'"),
        ({"init": "kaiming"}, "init must be 'ntk' for optimizer 'gauss-newton', got 'kaiming'"),
        ({"optimizer": "sgd"}, "damping must be left out for optimizer 'sgd', got 0.001"),
        ({"optimizer": "adam"}, "optimizer must be sgd or gauss-newton, got 'adam'"),
    ],
)
def test_bad_settings_of_gauss_newton(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(GAUSS_NEWTON, **change)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("epochs", 1.5),
        ("batch_size", 0),
        ("lr", math.nan),
        ("lr", 0.0),
        ("lr", math.inf),
        ("decay", "cosine"),
        ("momentum", 1.0),
        ("momentum", -0.1),
        ("momentum", math.nan),
        ("seed", -1),
        ("arch", "rnn"),
        ("dtype", "float16"),
    ],
)
def test_bad_settings(field, value):
    with pytest.raises(ValueError, match=f"{field} must be .*got {value!r}"):
        dataclasses.replace(CONFIG, **{field: value})
