from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
import typing
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from narrowdeep import DeepNarrowCNN, training
from narrowdeep.cli import COMMANDS, app
from narrowdeep.commands import demo
from narrowdeep.data import load_task
from narrowdeep.step_size import predict_step_size

ROOT = Path(__file__).parent.parent
FAST = ["--task", "digits", "--pool", "4", "--depth", "4", "--batch-size", "500", "--epochs", "2", "--no-plot"]


def run(*arguments: object, terminal: bool = False) -> Result:
    environment = {"FORCE_COLOR": "1", "NO_COLOR": "1"} if terminal else {}
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"NARROWDEEP_DATA": None, **environment})


def train(*arguments: object) -> dict:
    result = run("train", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refused(*arguments: object) -> str:
    """The one line on standard error of a command that ends with status 2."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def numbers(folder: Path) -> list[tuple[float, float]]:
    return [(m.train_loss, m.test_loss) for m in training.read_metrics(folder)]


@pytest.mark.parametrize("command", [[], ["train"], ["ntk"], ["plan"], ["profile"], ["info"]])
def test_help(command):
    result = run(*command, "--help")
    assert result.exit_code == 0
    commands = ("train", "ntk", "plan", "profile", "info")
    for option in ("--json", "--seed", "--device", "--dtype") if command else commands:
        assert option in result.output


def test_help_states_the_defaults_in_force(tmp_path):
    text = " ".join(run("train", "--help").output.split())
    config = train("--epochs", 1, "--pool", 4, "--out", tmp_path, "--no-plot", "--depth", 3)["config"]
    assert (config["task"], config["batch_size"], config["momentum"]) == ("digits", 128, 0.97)
    assert config["lr"] == pytest.approx(0.015 / (3 * 3**2))
    assert config["rho"] == pytest.approx(2 * 4**0.5)
    assert "128 for digits" in text
    assert "0.97 for digits" in text
    assert "0.015 for digits" in text
    assert "2 sqrt(inputs) for digits" in text


def test_train_leaves_a_run(tmp_path):
    out = tmp_path / "new" / "run"
    result = train(*FAST[:-1], "--seed", 5, "--dtype", "float64", "--scale", 10, "--tau", 0.01, "--out", out)
    assert result["finished"]
    names = ["checkpoint.safetensors", "curves.png", "metrics.jsonl", "settings.toml"]
    assert sorted(p.name for p in out.iterdir()) == names
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert lines[1] == result["metrics"]
    assert result["config"]["lr"] == pytest.approx(0.01 / (4 * 10**2))
    model = training.load_model(out / "checkpoint.safetensors")
    assert (model.depth, model.scale, model.in_features) == (4, 10.0, 4)
    assert model.first_weight.dtype == torch.float64
    assert result["peak_memory_bytes"] > 2**20


def test_same_seed_same_numbers(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(*FAST, "--seed", seed, "--out", tmp_path / name)
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")
    assert numbers(tmp_path / "a") != numbers(tmp_path / "c")


def test_kaiming_in_plain_form(tmp_path):
    config = train(*FAST, "--init", "kaiming", "--form", "plain", "--lr", 0.01, "--out", tmp_path)["config"]
    assert (config["init"], config["form"], config["lr"]) == ("kaiming", "plain", 0.01)


def test_lr_auto_is_predicted_and_recorded(tmp_path):
    result = train(*FAST, "--lr", "auto", "--out", tmp_path / "a")
    config = result["config"]
    assert config["predicted_loss"] > 0
    task = load_task("digits", pool=4)
    model = training.build_model(training.TrainConfig(**config), task)
    expected = predict_step_size(model, task, steps=6, batch_size=500)
    assert (config["lr"], config["momentum"]) == (expected.lr, expected.momentum)
    assert config["predicted_loss"] == expected.loss
    given = train(*FAST, "--lr", "auto", "--momentum", 0.5, "--out", tmp_path / "b")["config"]
    assert given["momentum"] == 0.5
    decayed = train(*FAST, "--lr", "auto", "--decay", "linear", "--out", tmp_path / "d")["config"]
    assert (decayed["lr"], decayed["decay"]) == (expected.lr, "linear")
    assert decayed["predicted_loss"] > expected.loss  # half the kernel time
    text = run("train", *FAST, "--lr", "auto", "--out", tmp_path / "c").stdout
    assert f"lr {expected.lr:.4g} (kernel time {expected.tau:.4g}), momentum {expected.momentum:.4g}" in text
    assert f"predicts a training loss of {expected.loss:.4g} at the end" in text


def test_lr_auto_resumes_to_the_same_bits(tmp_path):
    train(*FAST, "--lr", "auto", "--epochs", 3, "--out", tmp_path / "whole")
    config = training.read_config(tmp_path / "whole" / "checkpoint.safetensors")
    (tmp_path / "run").mkdir()
    early = training.Trainer(config, load_task("digits", pool=4))
    for _ in range(2):
        early.step()
    early.save(tmp_path / "run" / "checkpoint.safetensors")
    result = train("--out", tmp_path / "run", "--resume", "--lr", "auto", "--no-plot")
    assert result["config"]["lr"] == config.lr
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")
    states = [training.load_model(tmp_path / name / "checkpoint.safetensors").state_dict() for name in ("run", "whole")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    train(*FAST, "--lr", 1e-5, "--out", tmp_path / "given")
    assert "lr must be 1e-05 as in the run" in refused("train", "--out", tmp_path / "given", "--resume", "--lr", "auto")


@pytest.mark.parametrize(("task", "outputs"), [("digits", 10), ("digits01", 1)])
def test_cnn_run_stops_and_goes_on(tmp_path, task, outputs):
    options = ["--arch", "cnn", "--task", task, *FAST[2:], "--checkpoint", 2, "--batch-size", 100]
    result = train(*options, "--epochs", 3, "--out", tmp_path / "whole")
    assert result["config"]["arch"] == "cnn"
    assert result["metrics"]["test_accuracy"] is not None
    train(*options, "--epochs", 1, "--out", tmp_path / "run")
    train("--out", tmp_path / "run", "--resume", "--epochs", 3, "--no-plot")
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")
    run, whole = (training.load_model(tmp_path / name / "checkpoint.safetensors") for name in ("run", "whole"))
    assert isinstance(run, DeepNarrowCNN)
    assert repr(run) == repr(whole)
    assert (run.in_channels, run.out_channels, run.depth) == (1, outputs, 4)
    assert all(torch.equal(a, b) for a, b in zip(run.parameters(), whole.parameters(), strict=True))


def test_a_folder_with_a_run_is_refused(tmp_path):
    train(*FAST, "--out", tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert f"out must not hold a run already (go on with --resume, or take another folder), got {tmp_path}" in refused(
        "train", *FAST, "--out", tmp_path
    )
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_resume_trains_longer_with_the_runs_settings(tmp_path):
    train(*FAST, "--seed", 7, "--out", tmp_path / "a")
    result = train("--out", tmp_path / "a", "--resume", "--epochs", 3, "--no-plot")
    assert result["config"]["seed"] == 7
    train(*FAST, "--seed", 7, "--epochs", 3, "--out", tmp_path / "b")
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")


def test_resume_refuses_other_settings(tmp_path):
    train(*FAST, "--out", tmp_path)
    same = ("train", "--out", tmp_path, "--resume", "--no-plot")
    assert "depth must be 4 as in the run" in refused(*same, "--depth", 5)
    assert "lr must be" in refused(*same, "--tau", 0.3)
    assert run(*same, "--depth", 4, "--tau", 0.015).exit_code == 0


def test_resume_without_a_run(tmp_path):
    assert f"{tmp_path / 'none' / 'checkpoint.safetensors'} does not exist" in refused(
        "train", "--resume", "--out", tmp_path / "none"
    )
    assert not (tmp_path / "none").exists()


def test_a_damaged_checkpoint_is_refused_and_nothing_is_written(tmp_path):
    train(*FAST, "--out", tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.iterdir()}
    assert f"{path} is damaged" in refused("train", "--resume", "--out", tmp_path, "--epochs", 9)
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.iterdir()} == before


def test_damaged_metrics_are_refused_and_nothing_is_written(tmp_path):
    train(*FAST, "--out", tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n')
    before = (tmp_path / "checkpoint.safetensors").stat().st_mtime_ns
    assert f"{tmp_path / 'metrics.jsonl'} is damaged" in refused("train", "--resume", "--out", tmp_path, "--epochs", 9)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"epoch": 1}\n'
    assert (tmp_path / "checkpoint.safetensors").stat().st_mtime_ns == before


def test_a_run_killed_before_its_first_epoch_can_go_on(tmp_path):
    train(*FAST, "--out", tmp_path / "whole")
    config = training.read_config(tmp_path / "whole" / "checkpoint.safetensors")
    (tmp_path / "run").mkdir()
    training.Trainer(config, load_task("digits", pool=4)).save(tmp_path / "run" / "checkpoint.safetensors")
    train("--out", tmp_path / "run", "--resume", "--no-plot")
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")


def test_out_must_be_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in refused("train", *FAST, "--out", tmp_path / "file")
    assert "file" in refused("train", *FAST, "--out", tmp_path / "file" / "below")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that nobody can write to")
def test_out_that_cannot_be_written(monkeypatch):
    monkeypatch.setattr(training, "fit", lambda *_, **__: pytest.fail("training has started"))
    assert "/proc cannot be written: " in refused("train", *FAST, "--out", "/proc")


def test_resume_at_another_number_of_threads_warns(tmp_path):
    train(*FAST, "--out", tmp_path)
    same = ("train", "--out", tmp_path, "--resume", "--no-plot", "--json")
    assert run(*same).stderr == ""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        result = run(*same)
    finally:
        torch.set_num_threads(threads)
    assert result.exit_code == 0
    warning = f"warning: the run had {threads} threads and goes on with {threads + 1}: the last bits may differ\n"
    assert result.stderr == warning


@pytest.mark.parametrize("epochs", [1, 2])
def test_progress_of_a_run_that_is_already_done(tmp_path, epochs):
    train(*FAST, "--out", tmp_path)
    result = run("train", "--out", tmp_path, "--resume", "--no-plot", "--epochs", epochs, terminal=True)
    assert result.exit_code == 0
    assert f"epoch {epochs} " in result.stderr
    assert f"{3 * epochs}/{3 * epochs}" in result.stderr  # 1437 samples in batches of 500
    assert "nan" not in result.stderr


def test_progress_ends_with_the_last_loss(tmp_path):
    options = ("--task", "toy", "--depth", 4, "--epochs", 3, "--no-plot")
    result = run("train", *options, "--out", tmp_path, terminal=True)
    assert f"loss {training.read_metrics(tmp_path)[-1].train_loss:.4g} " in result.stderr


@pytest.mark.parametrize("name", ["checkpoint.safetensors", "metrics.jsonl"])
def test_the_demo_deletes_only_the_files_of_a_run(tmp_path, name):
    folder = tmp_path / "demo"
    folder.mkdir()
    for kept in ("curves.png", "thesis.tex"):
        (folder / kept).write_text("mine")
    demo.forget(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["curves.png", "thesis.tex"]  # no run
    (folder / name).write_text("")
    demo.forget(folder)
    assert [p.name for p in folder.iterdir()] == ["thesis.tex"]
    demo.forget(tmp_path / "none")


def test_divergence_ends_with_one_line(tmp_path):
    result = run("train", *FAST, "--lr", 1e6, "--epochs", 30, "--out", tmp_path)
    assert result.exit_code == 1
    assert "error: the loss is no longer finite" in result.stderr
    assert "start again in another --out with a smaller --lr or --tau" in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
@pytest.mark.parametrize("command", ["train", "info"])
def test_cuda_without_a_gpu(command, tmp_path):
    out = ["--out", tmp_path / "run"] if command == "train" else []
    message = "device must be one that this machine has: it has 0 CUDA devices, got 'cuda'"
    assert message in refused(command, "--device", "cuda", *out)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--depth", "1"], "depth must be at least 2, got 1"),
        (["--depth", "0"], "depth must be"),
        (["--scale", "nan"], "scale must be"),
        (["--scale", "-3"], "scale must be"),
        (["--scale", "1e300"], "lr must be finite and positive, got 0.0"),
        (["--rho", "-1"], "rho must be finite and not negative, got -1.0"),
        (["--epochs", "0"], "epochs must be an int of at least 1, got 0"),
        (["--batch-size", "-2"], "batch_size must be an int of at least 1, got -2"),
        (["--lr", "nan"], "lr must be finite and positive, got nan"),
        (["--lr", "best"], "lr must be a number or 'auto', got 'best'"),
        (["--lr", "auto", "--tau", "0.1"], "lr and tau set the same thing"),
        (["--lr", "auto", "--init", "kaiming", "--form", "plain"], "init must be 'ntk'"),
        (["--lr", "auto", "--epochs", "0"], "epochs must be an int of at least 1, got 0"),
        (["--lr", "auto", "--scale", "1e300"], "scale must "),
        (["--arch", "cnn", "--task", "toy"], "task must be one of digits, digits01, mnist, mnist01 with arch 'cnn'"),
        (["--tau", "inf"], "tau must be finite and positive, got inf"),
        (["--lr", "0.1", "--tau", "0.1"], "lr and tau set the same thing"),
        (["--momentum", "1"], "momentum must be at least 0 and below 1, got 1.0"),
        (["--checkpoint", "0"], "checkpoint must be at least 1 layer a segment, got 0"),
        (["--checkpoint", "some"], "checkpoint must be 'auto', 'none' or an int, got 'some'"),
        (["--init", "kaiming"], "init='kaiming' needs form='plain'"),
        (["--init", "kaiming", "--form", "plain", "--rho", "2"], "rho is not used by init 'kaiming': leave it out"),
        (["--init", "kaiming", "--form", "plain", "--beta", "0"], "beta is not used by init 'kaiming'"),
        (["--checkpoint", "--3"], "checkpoint must be 'auto', 'none' or an int, got '--3'"),
        (["--pool", "3"], "pool must be at least 1 and divide the 8x8 images of 'digits', got 3"),
        (["--task", "mnist"], "data must name the folder that holds MNIST/raw"),
        (["--task", "mnist", "--data", "."], "data must hold the 4 MNIST files"),
        (["--device", "tpu"], "device must be cpu, cuda or cuda:N, got 'tpu'"),
        (["--device", "mps"], "device must be cpu, cuda or cuda:N, got 'mps'"),
    ],
)
def test_bad_values(arguments, message, tmp_path):
    assert message in refused("train", *arguments, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments", [["--task", "cifar"], ["--depth", "deep"], ["--dtype", "float16"], ["--nonsense"]]
)
def test_bad_options(arguments):
    result = run("train", *arguments)
    assert result.exit_code == 2
    assert "Error: " in result.stderr


@pytest.mark.parametrize("command", ["plan", "profile"])
def test_bad_checkpoint(command):
    message = "checkpoint must be 'auto', 'none' or an int, got '--3'"
    assert message in refused(command, "--depth", 5, "--checkpoint", "--3")


def test_info():
    facts = json.loads(run("info", "--json").stdout)
    assert facts["narrowdeep"] == version("narrowdeep")
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    cpu, triton = facts["backends"]["cpu"], facts["backends"]["triton"]
    assert cpu["instruction_sets"][-1] == "scalar"
    assert cpu["used"] == cpu["instruction_sets"][0]
    assert triton["available"] == (triton["reason"] is None)
    text = run("info").stdout
    assert all(name in text for name in (*facts, *cpu, *triton))


def test_info_says_which_instruction_set_is_used(monkeypatch):
    monkeypatch.setenv("NARROWDEEP_ISA", "scalar")
    assert json.loads(run("info", "--json").stdout)["backends"]["cpu"]["used"] == "scalar"
    monkeypatch.setenv("NARROWDEEP_ISA", "mmx")
    assert "NARROWDEEP_ISA must be one of" in refused("info")


def _start(folder: Path, *, save_every: float) -> subprocess.Popen[str]:
    """A run in a process of its own, long enough to be caught in the middle of it, once its first epochs are done."""
    command = [sys.executable, "-m", "narrowdeep.cli", "train", *FAST, "--out", str(folder), "--epochs", "100000"]
    process = subprocess.Popen(
        [*command, "--batch-size", "100", "--save-every", str(save_every)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or (folder / "metrics.jsonl").read_text().count("\n") < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


def _assert_same_as_never_stopped(folder: Path, other: Path) -> None:
    epochs = training.read_metrics(folder)[-1].epoch + 2
    train("--out", folder, "--resume", "--epochs", epochs, "--no-plot")
    train(*FAST, "--batch-size", 100, "--epochs", epochs, "--out", other)
    assert numbers(folder) == numbers(other)
    stopped, whole = (training.load_model(f / "checkpoint.safetensors").state_dict() for f in (folder, other))
    assert all(torch.equal(stopped[name], whole[name]) for name in whole)


def test_ctrl_c_keeps_every_step(tmp_path):
    process = _start(tmp_path / "run", save_every=1e9)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    steps = re.search(r"all (\d+) steps are kept. Go on with: narrowdeep train --out (\S+) --resume", stdout)
    assert steps is not None, stdout
    assert int(steps[1]) >= 3 * 15
    assert steps[2] == str(tmp_path / "run")
    _assert_same_as_never_stopped(tmp_path / "run", tmp_path / "whole")


def test_kill_loses_no_more_than_the_last_checkpoint(tmp_path):
    process = _start(tmp_path / "run", save_every=0)
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    _assert_same_as_never_stopped(tmp_path / "run", tmp_path / "whole")


def _narrowdeep(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "narrowdeep", *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


def test_names_of_the_package():
    code = """if True:
        import sys
        import narrowdeep
        assert "torch" not in sys.modules
        assert {"ntk", "memory", "optim", "training", "DeepNarrowMLP", "__version__"} <= set(dir(narrowdeep))
        print(narrowdeep.__version__)
        narrowdeep.ntk.empirical_ntk, narrowdeep.memory.plan, narrowdeep.optim.FusedSGD, narrowdeep.training.load_model
        from narrowdeep import *
        assert DeepNarrowMLP is narrowdeep.DeepNarrowMLP
        try:
            narrowdeep.nonsense
        except AttributeError as error:
            assert str(error) == "module 'narrowdeep' has no attribute 'nonsense'"
        else:
            raise AssertionError
    """
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{version('narrowdeep')}\n"


def test_the_command_as_a_module():
    assert _narrowdeep("--version").stdout == f"narrowdeep {version('narrowdeep')}\n"
    short, long = _narrowdeep("-h"), _narrowdeep("--help")
    assert short.returncode == 0
    assert short.stdout == long.stdout
    assert short.stdout.startswith("Usage: narrowdeep ")
    assert run("plan", "-h").output == run("plan", "--help").output


def test_the_help_loads_no_torch():
    code = """if True:
        import sys
        from narrowdeep.cli import app
        try:
            app(["--help"])
        finally:
            assert not {"torch", "numpy"} & set(sys.modules)
    """
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def _number_options() -> list[tuple[str, str, type]]:
    """(command, option, type) of every option that takes a number."""
    found: list[tuple[str, str, type]] = []
    for command in COMMANDS:
        function = getattr(importlib.import_module(f"narrowdeep.commands.{command}"), command)
        for parameter in inspect.signature(function, eval_str=True).parameters.values():
            kind = parameter.annotation
            names = set(re.findall(r"\w+", repr(typing.get_args(kind)[0] if typing.get_args(kind) else kind)))
            numeric = float if "float" in names else int if "int" in names or parameter.name == "checkpoint" else None
            if numeric is not None:
                found.append((command, parameter.name.replace("_", "-"), numeric))
    return found


@pytest.mark.parametrize(("command", "option", "kind"), _number_options())
def test_numbers_that_no_machine_holds(command, option, kind, tmp_path):
    name = {"record": ["mlp-1m"], "reproduce": ["fig-3.1"]}.get(command, [])
    values = [-(10**400)] if option == "save-every" else [10**400, -(10**400)]  # seconds without end: never
    for value in values:
        result = run(command, *name, f"--{option}", value, *(["--out", tmp_path / "run"] if command == "train" else []))
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        assert option.replace("-", "_") in result.stderr.replace("-", "_")
        if not result.stderr.startswith("Usage"):  # typer's own check of an option with a range
            (line,) = result.stderr.splitlines()
            assert line.startswith("error: ")
            assert len(line) < 600
    if kind is float and option != "save-every":  # which has a range
        assert f"{option.replace('-', '_')} must be a number, got nan" in refused(
            command, f"--{option}", "nan"
        ).replace("-", "_")


def test_there_are_number_options():
    assert {("train", "depth", int), ("train", "rho", float), ("ntk", "depth", int), ("plan", "checkpoint", int)} <= {
        *_number_options()
    }


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["ntk", "--out-features", 2**63 - 1], "depth must leave the weights addressable, got "),
        (["plan", "--inputs", 2**63 - 1], "depth must leave the weights addressable, got "),
        (["plan", "--arch", "cnn", "--kernel-size", 10**11 + 1], "depth must leave the weights addressable, got "),
        (["profile", "--batch-size", 2**62, "--depth", 3, "--no-eager"], "this needs more memory than there is"),
        (["ntk", "--draws", 10**12], "this needs more memory than there is"),
    ],
)
def test_what_needs_more_memory_than_there_is(arguments, error, tmp_path):
    out = ["--out", tmp_path / "k.npz"] if arguments[0] == "ntk" else []
    assert f"error: {error}" in refused(*arguments, *out)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("delay", [0.3, 0.8, 1.4, 2.0])
def test_ctrl_c_while_it_starts_is_one_line(delay, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "narrowdeep", "ntk", "--depth", "3000", "--draws", "100000", "--points", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
    )
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout, stderr) == (130, "", "stopped\n")
    assert not list(tmp_path.iterdir())


def test_lines_of_progress_off_a_terminal(monkeypatch, tmp_path):
    from narrowdeep.commands import progress

    monkeypatch.setattr(progress, "SECONDS", 0.05)
    arguments = ("ntk", "--depth", 2000, "--draws", 40, "--out", tmp_path / "k.npz", "--no-plot")
    result = run(*arguments, "--json")
    assert json.loads(result.stdout)["draws"] == 40
    assert re.search(r"^kernels, depth 2,000: \d+ of 40, \d+ s", result.stderr, re.MULTILINE), result.stderr
    monkeypatch.setattr(progress, "SECONDS", 1e3)
    assert run(*arguments).stderr == ""  # what is done sooner


def test_what_there_is_to_reproduce_as_json():
    listed = json.loads(run("reproduce", "--json").stdout)
    assert next(iter(listed)) == "fig-3.1"
    assert set(listed["table-4.1"]) == {"title", "source"}
