"""Networks of sizes that eager layers do not reach, each run once and measured against a number stated beforehand."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from narrowdeep import memory, ntk
from narrowdeep.data import load_task
from narrowdeep.modules import DeepNarrowCNN, DeepNarrowMLP
from narrowdeep.ntk import empirical_ntk, limit_ntk_mlp
from narrowdeep.optim import FusedSGD
from narrowdeep.training import peak_memory, thesis_loss


@dataclass(frozen=True)
class Check:
    """A measured number and the most that it may be."""

    measured: float
    at_most: float

    @property
    def passed(self) -> bool:
        return self.measured <= self.at_most  # NaN does not pass

    def to_dict(self) -> dict[str, Any]:
        measured = self.measured if math.isfinite(self.measured) else None  # JSON has no NaN
        return {"measured": measured, "at_most": self.at_most, "passed": self.passed}


@dataclass(frozen=True)
class Outcome:
    """What a record's run came to."""

    depth: int
    parameters: int
    peak_bytes: int
    """Of the process, interpreter and libraries included, in the training steps that the record is about."""
    seconds_per_step: float
    checks: dict[str, Check]
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """One run: ``run(settings, progress)`` with ``settings`` a frozen dataclass that has a ``depth``."""

    name: str
    title: str
    settings: Any
    run: Callable[[Any, Progress], Outcome]


def run_record(record: Record, settings: Any, *, seed: int = 0, progress: Progress | None = None) -> dict[str, Any]:
    """Run a record in this process, whose peak it measures.

    Returns: plain JSON data: "record", "depth", "parameters", "peak_bytes", "seconds_per_step", "seconds" (all of it),
        "result" ("pass" or "fail"), "checks" (by name: "measured", "at_most", "passed") and "details".

    Raises: NotImplementedError where the peak of a step cannot be measured (it needs Linux).
    """
    torch.manual_seed(seed)
    start = time.perf_counter()
    outcome = record.run(settings, progress or Progress(disable=True))
    return {
        "record": record.name,
        "depth": outcome.depth,
        "parameters": outcome.parameters,
        "peak_bytes": outcome.peak_bytes,
        "seconds_per_step": outcome.seconds_per_step,
        "seconds": time.perf_counter() - start,
        "threads": torch.get_num_threads(),
        "seed": seed,
        "result": "pass" if all(check.passed for check in outcome.checks.values()) else "fail",
        "checks": {name: check.to_dict() for name, check in outcome.checks.items()},
        "details": outcome.details,
    }


def _count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _descend(
    model: DeepNarrowMLP | DeepNarrowCNN,
    x: Tensor,
    y: Tensor,
    optimizer: torch.optim.Optimizer,
    steps: int,
    progress: Progress,
) -> float:
    """Full-batch steps on the thesis's loss; the median seconds of one."""
    seconds = []
    for _ in progress.track(range(steps), description=f"training, L = {model.depth:,}"):
        start = time.perf_counter()
        optimizer.zero_grad()
        thesis_loss(model(x), y).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _kernel_descent(kernel: Tensor, y: Tensor, steps: int, tau: float) -> Tensor:
    """What ``steps`` steps from outputs 0 learn where the tangent kernel stays what it is.

    ``kernel`` (M, N) is that of M points with the N of the training set, which come first; ``y`` is (N, out). Returns
    the outputs (M, out).
    """
    outputs = kernel.new_zeros(kernel.shape[0], y.shape[1])
    for _ in range(steps):
        outputs = outputs - (tau / y.shape[0]) * (kernel @ (outputs[: y.shape[0]] - y))
    return outputs


def _off(outputs: Tensor, predicted: Tensor) -> float:
    """Largest deviation, relative to the largest predicted value."""
    return ((outputs.double() - predicted).abs().max() / predicted.abs().max()).item()


@dataclass(frozen=True)
class MlpWideSettings:
    depth: int = 4000
    inputs: int = 784
    outputs: int = 10
    samples: int = 512
    chunks: int = 40
    checkpoint: int = 64
    steps: int = 2
    gigabytes: float = 14.0
    tolerance: float = 0.1
    """Of the outputs against descent with the limit kernel, from which a kernel strays by about 1/sqrt(L)."""


def _mlp_wide(settings: MlpWideSettings, progress: Progress) -> Outcome:
    x = torch.rand(settings.samples, settings.inputs)
    y = x[:, : settings.outputs].contiguous()
    # Its own kernel would take a second copy of the parameters.
    kernel = limit_ntk_mlp(x.double(), out_features=settings.outputs)
    tau = 0.5 * ntk.max_learning_rate(kernel)
    sizes = (settings.inputs, settings.outputs, settings.depth)
    model = DeepNarrowMLP(*sizes, chunks=settings.chunks, checkpoint=settings.checkpoint)
    optimizer = FusedSGD(model, lr=tau * model.ntk_lr)
    before = thesis_loss(torch.zeros_like(y), y).item()  # outputs are exactly 0 at initialisation
    with progress:
        seconds = _descend(model, x, y, optimizer, settings.steps, progress)
        with torch.no_grad():
            learned = model(x)
    predicted = _kernel_descent(kernel, y.double(), settings.steps, tau)
    loss, predicted_loss = thesis_loss(learned, y).item(), thesis_loss(predicted, y.double()).item()
    bytes_ = _count(model) * x.element_size()
    return Outcome(
        depth=settings.depth,
        parameters=_count(model),
        peak_bytes=peak_memory(),
        seconds_per_step=seconds,
        checks={
            "peak, GB": Check(peak_memory() / 1e9, settings.gigabytes),
            "loss over loss before": Check(loss / before, 1.05 * predicted_loss / before),
            "outputs off the limit kernel's prediction": Check(_off(learned, predicted), settings.tolerance),
        },
        details={
            "samples": settings.samples,
            "steps": settings.steps,
            "chunks": settings.chunks,
            "tau": tau,
            "loss_before": before,
            "loss": loss,
            "predicted_loss": predicted_loss,
            "parameter_bytes": bytes_,
            "eager_bytes": 2 * bytes_ + (settings.depth - 1) * model.width * settings.samples * x.element_size(),
        },
    )


@dataclass(frozen=True)
class MlpMillionSettings:
    depth: int = 1_000_000
    samples: int = 128
    passes: int = 1
    damping: float = 1e-6
    loss: float = 1e-6
    tolerance: float = 1e-4
    """Of the learned function at test points against ridge regression with the initial kernel."""
    seconds: float = 30.0


def _mlp_million(settings: MlpMillionSettings, progress: Progress) -> Outcome:
    from narrowdeep.optim import GramGaussNewton  # which needs scipy

    start = time.perf_counter()
    task = load_task("toy", samples=settings.samples)
    x, y = task.x_train, task.y_train
    model = DeepNarrowMLP(2, 1, settings.depth)
    optimizer = GramGaussNewton(model, kernel="features", damping=settings.damping)
    seconds = []
    with progress:
        bar = progress.add_task(f"one pass, L = {settings.depth:,}", total=None)
        for _ in range(settings.passes):
            begun = time.perf_counter()
            step = optimizer.step(
                x, y, at=task.x_test, on_batch=lambda n, total: progress.update(bar, completed=n, total=total)
            )
            seconds.append(time.perf_counter() - begun)
    with torch.no_grad():
        learned, loss = model(task.x_test), thesis_loss(model(x), y).item()
    assert step.outputs is not None
    return Outcome(
        depth=settings.depth,
        parameters=_count(model),
        peak_bytes=peak_memory(),
        seconds_per_step=statistics.median(seconds),
        checks={
            "training loss": Check(loss, settings.loss),
            "learned function off its own kernel's prediction": Check(_off(learned, step.outputs), settings.tolerance),
            "seconds": Check(time.perf_counter() - start, settings.seconds),
        },
        details={
            "passes": settings.passes,
            "samples": len(x),
            "damping": settings.damping,
            "loss": loss,
            "predicted_loss": step.predicted,
            "test_loss": thesis_loss(learned, task.y_test).item(),
        },
    )


@dataclass(frozen=True)
class CnnMillionSettings:
    depth: int = 1_000_000
    samples: int = 32
    image: int = 7
    tolerance: float = 1e-3


def _contrast(samples: int, image: int) -> tuple[Tensor, Tensor]:
    """Random images (N, 1, H, H) and the standard deviation of their pixels (N, 1)."""
    x = torch.rand(samples, 1, image, image)
    return x, x.flatten(1).std(1, keepdim=True)


def _cnn_million(settings: CnnMillionSettings, progress: Progress) -> Outcome:
    x, y = _contrast(settings.samples, settings.image)
    model = DeepNarrowCNN(1, 1, settings.depth)
    with progress:
        waiting = progress.add_task(f"its kernel, L = {settings.depth:,}", total=None)
        kernel = empirical_ntk(model, x, reduce="trace").double()
        progress.remove_task(waiting)
        tau = 0.5 * ntk.max_learning_rate(kernel)
        optimizer = torch.optim.SGD(model.parameters(), lr=tau * model.ntk_lr, fused=True)
        before = thesis_loss(torch.zeros_like(y), y).item()  # outputs are exactly 0 at initialisation
        seconds = _descend(model, x, y, optimizer, 1, progress)
    with torch.no_grad():
        learned = model(x)
    after = thesis_loss(learned, y).item()
    return Outcome(
        depth=settings.depth,
        parameters=_count(model),
        peak_bytes=peak_memory(),
        seconds_per_step=seconds,
        checks={
            "loss after the step over loss before": Check(after / before, 0.5),
            "outputs off its own kernel's prediction": Check(
                _off(learned, _kernel_descent(kernel, y.double(), 1, tau)), settings.tolerance
            ),
        },
        details={
            "samples": len(x),
            "image": [settings.image, settings.image],
            "tau": tau,
            "loss_before": before,
            "loss": after,
        },
    )


@dataclass(frozen=True)
class CnnLongSettings:
    depth: int = 20_000
    samples: int = 512
    image: int = 7
    repeats: int = 3
    share: float = 0.01
    """Of the activation memory of eager layers."""
    slow_down: float = 1.45
    """Over the time of a step that saves every state."""
    tolerance: float = 0.25
    """Of a predicted slow-down."""


def _cnn_long(settings: CnnLongSettings, progress: Progress) -> Outcome:
    x, y = _contrast(settings.samples, settings.image)
    model = DeepNarrowCNN(1, 1, settings.depth)
    shape = tuple(x.shape[1:])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1 * model.ntk_lr, fused=True)
    planned = memory.plan(model, batch_size=len(x), input_shape=shape)
    fixed = planned.total - planned.activations
    state = model.width * x.numel() * x.element_size()
    kept = (model.depth - 1) * state  # by eager layers, without what autograd itself takes
    budgets = [fixed + int(part * settings.share * kept) for part in (1.0, 0.25)]

    def timed(checkpoint: Any) -> float:
        model.checkpoint = checkpoint
        _descend(model, x, y, optimizer, 1, progress)  # memory that the process has not had before is slow
        return _descend(model, x, y, optimizer, settings.repeats, progress)

    with progress:
        plans = [memory.plan(model, batch_size=len(x), input_shape=shape, budget=budget) for budget in budgets]
        seconds = [timed(p.checkpoint) for p in plans]
        peak = peak_memory()
        seconds_every_state = timed("none")
        waiting = progress.add_task(f"eager layers, L = {model.depth:,}", total=None)
        measured = []
        eager = None
        for p in plans:
            model.checkpoint = p.checkpoint
            profiled = memory.profile(model, x, eager=eager is None)
            measured.append(profiled.measured - fixed)
            eager = profiled.eager or eager
        progress.remove_task(waiting)
    activations = kept if eager is None else eager - fixed
    slow_downs = [s / seconds_every_state for s in seconds]
    predicted_ratio = plans[1].slow_down / plans[0].slow_down
    return Outcome(
        depth=model.depth,
        parameters=_count(model),
        peak_bytes=peak,
        seconds_per_step=seconds[0],
        checks={
            "activation memory over that of eager layers": Check(measured[0] / activations, settings.share),
            "time over that of a step that saves every state": Check(slow_downs[0], settings.slow_down),
            "with a quarter of the budget: activation memory over that of eager layers": Check(
                measured[1] / activations, settings.share / 4
            ),
            "with a quarter of the budget: slow-down off the planned one": Check(
                abs(slow_downs[1] / plans[1].slow_down - 1), settings.tolerance
            ),
            "with a quarter of the budget: time over that with all of it, off the planned ratio": Check(
                abs(seconds[1] / seconds[0] / predicted_ratio - 1), settings.tolerance
            ),
        },
        details={
            "samples": len(x),
            "image": list(x.shape[2:]),
            "eager_activation_bytes": activations,
            "eager_measured": eager is not None,
            "seconds_per_step_every_state": seconds_every_state,
            "plans": [
                {
                    "budget_bytes": p.budget,
                    "segment": p.segment,
                    "snapshots": p.snapshots,
                    "activation_bytes_planned": p.activations,
                    "activation_bytes": bytes_,
                    "slow_down_planned": p.slow_down,
                    "slow_down": slow_down,
                    "seconds_per_step": s,
                }
                for p, bytes_, slow_down, s in zip(plans, measured, slow_downs, seconds, strict=True)
            ],
        },
    )


RECORDS: dict[str, Record] = {
    record.name: record
    for record in (
        Record("cnn-20k", "20,000-layer CNN of 3 channels, batches of 512 images of 7x7", CnnLongSettings(), _cnn_long),
        Record("mlp-795", "4,000-layer MLP of width 795, training steps under 14 GB", MlpWideSettings(), _mlp_wide),
        Record(
            "mlp-1m",
            "1,000,000-layer MLP of width 4 learns x1 x2 on the arc in one pass",
            MlpMillionSettings(),
            _mlp_million,
        ),
        Record("cnn-1m", "1,000,000-layer CNN of 3 channels, one training step", CnnMillionSettings(), _cnn_million),
    )
}
"""All records, as ``narrowdeep record`` takes them."""
