"""Training on several ranks: the steps of one process, runs that resume, and errors that all ranks end with."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from narrowdeep import DeepNarrowCNN, DeepNarrowMLP
from narrowdeep.data import load_task
from narrowdeep.distributed import LostRankError, Ranks
from narrowdeep.optim import GramGaussNewton
from narrowdeep.training import TrainConfig, Trainer, fit, load_model, read_metrics
from tests.distributed.ranks import TORCHRUN, commands, run

TOY = TrainConfig(
    task="toy",
    arch="mlp",
    depth=80,
    scale=80.0,
    rho=1.0,
    beta=1.0,
    init="ntk",
    form="offset",
    checkpoint="auto",
    pool=1,
    epochs=7,
    batch_size=67,  # 67, 67 and 66 of 200: no two ranks, or three, have as many
    lr=0.1 / 80**3,
    momentum=0.9,
    seed=0,
    dtype="float64",
)
TWO_LAYERS = dataclasses.replace(TOY, depth=2, scale=2.0, lr=0.01, batch_size=2, epochs=1)
CNN = dataclasses.replace(TOY, task="digits01", arch="cnn", depth=20, scale=20.0, lr=1e-6, batch_size=60)


def trainer(config: TrainConfig, ranks: Ranks) -> Trainer:
    return Trainer(config, load_task(config.task, dtype=getattr(torch, config.dtype)), ranks=ranks)


def steps(one: Trainer, count: int) -> list[Any]:
    metrics = [one.step() for _ in range(count)]
    numbers = [[m.train_loss, m.test_loss, m.train_accuracy, m.test_accuracy] for m in metrics if m is not None]
    return [[number for number in line if number is not None] for line in numbers]


def _steps(rank: int, config: TrainConfig, folder: str) -> Any:
    """20 steps, and the same with a stop after 7 of them; parameters and metrics of both."""
    ranks = Ranks.of()
    whole, first = trainer(config, ranks), trainer(config, ranks)
    metrics = steps(whole, 20)
    found = steps(first, 7)
    first.save(f"{folder}/state")
    dist.barrier()
    again = Trainer.load(f"{folder}/state", load_task(config.task, dtype=torch.float64), ranks=ranks)
    assert again.saved_ranks == ranks.size
    found += steps(again, 13)
    return metrics, found, whole.model.state_dict(), again.model.state_dict()


@pytest.mark.parametrize(
    ("ranks", "config"), [(2, TOY), (3, dataclasses.replace(TOY, epochs=10)), (3, TWO_LAYERS), (2, CNN)]
)
def test_ranks_take_the_steps_of_one_process(ranks: int, config: TrainConfig, tmp_path: Path) -> None:
    results = run(_steps, ranks, config, str(tmp_path))
    alone = trainer(config, Ranks())
    start = {name: value.clone() for name, value in alone.model.state_dict().items()}
    expected = steps(alone, 20)
    for metrics, resumed, state, again in results:
        assert metrics == results[0][0]
        assert resumed == metrics
        assert metrics == [pytest.approx(line, rel=1e-12) for line in expected]
        for name, value in alone.model.state_dict().items():
            assert torch.equal(state[name], results[0][2][name])
            assert torch.equal(again[name], state[name])
            if value.numel():
                moved = (value - start[name]).abs().max()
                assert (state[name] - value).abs().max() <= 1e-12 * value.abs().max()
                assert name == "_extra_state" or moved > 0


def _gauss_newton(rank: int, kind: str, samples: int) -> Any:
    model, x, y = gauss_newton_problem(kind, samples)
    options: dict[str, Any] = {"ranks": Ranks.of()} if dist.is_initialized() else {}
    kernel: Any = "empirical" if kind == "cnn" else "features"
    optimizer = GramGaussNewton(model, kernel=kernel, damping=1e-4, batch_size=5, **options)
    seen = []
    found = [optimizer.step(x, y, at=x[:2] / 2, on_batch=lambda *done: seen.append(done)) for _ in range(2)]
    assert seen[-1] == (4 * samples, 4 * samples)
    lines = [(step.loss, step.predicted, step.measured, step.fitted, step.outputs) for step in found]
    return lines, model.state_dict()


def gauss_newton_problem(kind: str, samples: int) -> Any:
    generator = torch.Generator().manual_seed(3)
    model: Any = DeepNarrowMLP(2, 2, 30, scale=1e5, dtype=torch.float64)
    if kind == "cnn":
        model = DeepNarrowCNN(1, 2, 12, scale=1e5, dtype=torch.float64)
    model.reset_parameters(generator)
    shape = (1, 4, 4) if kind == "cnn" else (2,)
    x = torch.rand(samples, *shape, dtype=torch.float64, generator=generator)
    return model, x, torch.rand(samples, 2, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize(("kind", "samples"), [("mlp", 61), ("mlp", 12), ("cnn", 2)])
def test_ranks_share_a_step_of_gauss_newton(kind: str, samples: int) -> None:
    """With more samples than features, fewer, and fewer than ranks."""
    results = run(_gauss_newton, 3, kind, samples)
    expected, state = _gauss_newton(0, kind, samples)
    for lines, found in results:
        for name, value in state.items():
            assert torch.equal(found[name], results[0][1][name])
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9)
        for line, wanted in zip(lines, expected, strict=True):
            assert line[0] == results[0][0][lines.index(line)][0]
            assert line[:3] == pytest.approx(wanted[:3], rel=1e-6, abs=1e-12)
            for a, b in zip(line[3:], wanted[3:], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def _different(rank: int, folder: str) -> list[str]:
    errors = []
    task = load_task("toy", dtype=torch.float64)
    other = dataclasses.replace(task, y_train=task.y_train + (1e-9 if rank else 0.0))
    config = dataclasses.replace(TOY, seed=rank)
    for one in (Trainer(TOY, other, ranks=Ranks.of()), trainer(config, Ranks.of())):
        try:
            fit(one, folder)
        except ValueError as error:  # noqa: PERF203 (two trainers)
            errors.append(str(error))
    return errors


def test_ranks_with_other_data_or_settings_do_not_begin(tmp_path: Path) -> None:
    for data, seed in run(_different, 2, str(tmp_path)):
        assert data.startswith("ranks must have the same data: rank 0 has ")
        assert seed == "ranks must have the same seed: rank 0 has 0, rank 1 has 1"
    assert list(tmp_path.iterdir()) == []


def _stopped(rank: int, folder: str) -> Any:
    one = trainer(TOY, Ranks.of())

    def ask(one: Trainer) -> None:
        if rank == 1 and one.step_count == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    return fit(one, folder, plot=False, on_step=ask), one.step_count


def test_all_ranks_stop_where_one_is_asked_to(tmp_path: Path) -> None:
    assert run(_stopped, 2, str(tmp_path)) == [(False, 4), (False, 4)]
    assert Trainer.load(tmp_path / "checkpoint.safetensors", load_task("toy", dtype=torch.float64)).step_count == 4
    assert [metrics.epoch for metrics in read_metrics(tmp_path)] == [1]


def _hangs(rank: int) -> Any:
    short = dist.new_group(timeout=timedelta(seconds=2))
    ranks = Ranks.of(short)
    dist.barrier()
    assert ranks.any(rank == 1)
    if rank == 1:
        time.sleep(6)
        return None
    began = time.monotonic()
    with pytest.raises(LostRankError, match="rank 0 of 2 has lost the others") as caught:
        ranks.any(False)
    return str(caught.value), time.monotonic() - began


def test_a_rank_that_does_not_answer() -> None:
    message, seconds = run(_hangs, 2)[0]
    assert "\n" not in message
    assert seconds < 6


# ---- the command ----


def test_the_command_on_two_ranks(tmp_path: Path) -> None:
    """It writes once, and goes on at another number of ranks with a warning; lr is that of one process."""
    settings = ["train", "--task", "digits01", "--depth", "30", "--dtype", "float64", "--no-plot"]
    automatic = [*settings, "--lr", "auto", "--epochs", "2", "--out", str(tmp_path / "auto")]
    (status, out, error), (other, silent, nothing) = commands(automatic, automatic)
    assert (status, other, silent, nothing) == (0, 0, "", "")
    assert out.count("epoch 2: train loss") == 1
    assert error.count("epoch 1 of 2") == 1
    ((status, alone, _),) = commands([*automatic[:-1], str(tmp_path / "alone")])
    assert status == 0
    assert alone.splitlines()[0] == out.splitlines()[0]
    assert alone.startswith("lr ")
    pairs = zip(read_metrics(tmp_path / "auto"), read_metrics(tmp_path / "alone"), strict=True)
    assert all(a.train_loss == pytest.approx(b.train_loss, rel=1e-11) for a, b in pairs)
    ((status, out, error),) = commands(
        ["train", "--out", str(tmp_path / "auto"), "--resume", "--epochs", "3", "--no-plot"]
    )
    assert status == 0
    assert "warning: the run had 2 ranks and goes on with 1: the last bits may differ" in error


def _first_step(rank: int, way: str) -> Any:
    """Of a network at its initialisation, behind DDP or with a hook on one of the ranks."""
    torch.manual_seed(1)
    model, x = DeepNarrowMLP(3, 2, 20, scale=50.0, dtype=torch.float64), torch.rand(10, 3, dtype=torch.float64)
    y = torch.sin(4 * x[:, :2])
    whole = torch.nn.parallel.DistributedDataParallel(model) if way == "ddp" else model
    own = slice(5 * rank, 5 * rank + 5) if way == "ddp" else slice(None)
    if way == "hook" and rank == 0:
        model.last_weight.register_hook(lambda grad: None)
    ranks = {} if way == "ddp" else {"ranks": Ranks.of()}
    GramGaussNewton(whole, damping=1e-2, kernel="features", adaptive=False, **ranks).step(x[own], y[own])  # type: ignore
    return torch.cat([param.detach().flatten() for param in model.parameters()])


@pytest.mark.parametrize("way", ["ddp", "hook", "ranks"])
def test_ranks_take_the_same_first_step(way: str) -> None:
    one, other = run(_first_step, 2, way)
    assert torch.equal(one, other)


def test_gauss_newton_on_two_ranks(tmp_path: Path) -> None:
    arguments = ["train", "--task", "digits01", "--depth", "30", "--optimizer", "gauss-newton", "--no-plot"]
    arguments += ["--dtype", "float64", "--out"]
    results = commands([*arguments, str(tmp_path / "two")], [*arguments, str(tmp_path / "two")])
    assert [status for status, *_ in results] == [0, 0]
    assert commands([*arguments, str(tmp_path / "one")])[0][0] == 0
    two, one = (read_metrics(tmp_path / name)[0] for name in ("two", "one"))
    assert two.test_loss == pytest.approx(one.test_loss, rel=1e-9)
    assert two.test_accuracy == one.test_accuracy


def test_an_error_of_one_rank_ends_all_of_them(tmp_path: Path) -> None:
    good = ["train", "--task", "toy", "--depth", "20", "--epochs", "1", "--no-plot", "--out", str(tmp_path / "run")]
    (status, _, error), (other, _, theirs) = commands(good, [*good, "--rho", "-1"])
    assert (status, other) == (2, 2)
    assert theirs == "error: rho must be finite and not negative, got -1.0\n"
    assert error == f"error: rank 1 has failed: {theirs.removeprefix('error: ')}"
    (status, _, error), (other, _, theirs) = commands([*good, "--rho", "-1"], [*good, "--rho", "-1"])
    assert (status, other, theirs) == (2, 2, "")  # what both say is said once
    assert error.startswith("error: rho must be")
    (status, _, error), (other, _, _) = commands(good, [*good, "--seed", "4"])
    assert (status, other) == (2, 2)
    assert error == "error: ranks must have the same seed: rank 0 has 0, rank 1 has 4\n"
    assert not (tmp_path / "run" / "settings.toml").exists()


def test_a_build_of_torch_without_a_backend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from narrowdeep.cli import app

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "is_gloo_available", lambda: False)
    result = CliRunner().invoke(app, ["train", "--task", "toy", "--out", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: several processes need the backend gloo of torch.distributed")


def workers(launcher: int) -> dict[int, int]:
    """Rank -> process of what ``launcher`` has started."""
    found = {}
    for process in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        for entry in Path(f"/proc/{process}/environ").read_bytes().split(b"\0"):
            if entry.startswith(b"RANK="):
                found[int(entry[5:])] = int(process)
    return found


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds processes in /proc")
def test_a_rank_that_hangs_is_given_up_after_the_timeout(tmp_path: Path) -> None:
    command = [*TORCHRUN, "2", "--monitor-interval", "10", "-m", "narrowdeep", "train", "--timeout", "3"]
    command += ["--task", "toy", "--depth", "20", "--epochs", "1000000", "--no-plot", "--out", str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path) as launcher:
        stopped = None
        try:
            deadline = time.monotonic() + 90
            while len(read_metrics(tmp_path / "run")) < 2 and launcher.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
            stopped = workers(launcher.pid)[1]
            os.kill(stopped, signal.SIGSTOP)
            began = time.monotonic()
            while "has lost the others" not in (line := next(iter(launcher.stderr or ()), "has lost the others")):
                pass
            seconds = time.monotonic() - began
        finally:
            if stopped is not None:
                os.kill(stopped, signal.SIGKILL)
            launcher.kill()
    assert line.startswith("error: rank 0 of 2 has lost the others")
    assert seconds < 30  # torch's own is 1800


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds processes in /proc")
def test_a_rank_that_is_killed(tmp_path: Path) -> None:
    # torchrun ends the other rank when it looks, which is not before that one has seen it for itself.
    command = [*TORCHRUN, "2", "--monitor-interval", "10", "-m", "narrowdeep", "train"]
    command += ["--task", "toy", "--depth", "20", "--epochs", "1000000", "--save-every", "0", "--no-plot"]
    command += ["--out", str(tmp_path / "run")]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path) as launcher:
        try:
            deadline = time.monotonic() + 90
            while len(read_metrics(tmp_path / "run")) < 5 and launcher.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
            os.kill(workers(launcher.pid)[1], signal.SIGKILL)
            _, error = launcher.communicate(timeout=60)
        finally:
            launcher.kill()
    assert launcher.returncode != 0
    line = next(line for line in error.splitlines() if "has lost the others" in line)
    assert line.startswith("error: rank 0 of 2")
    assert line.endswith("(the last state is whole: go on with --resume)")
    lines = read_metrics(tmp_path / "run")
    state = Trainer.load(tmp_path / "run" / "checkpoint.safetensors", load_task("toy"))
    assert len(lines) >= 5
    assert state.epoch >= len(lines) - 1
    assert load_model(tmp_path / "run" / "checkpoint.safetensors").depth == 20
    assert not [path.name for path in (tmp_path / "run").iterdir() if path.name.endswith((".tmp", ".lock"))]
