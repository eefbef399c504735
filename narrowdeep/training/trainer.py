"""One run: model, optimizer, random state and position, and the file that keeps them."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from narrowdeep.data import Task
from narrowdeep.distributed.ranks import ALONE, Ranks
from narrowdeep.memory import plan
from narrowdeep.step_size import decay_factor
from narrowdeep.training.config import EpochMetrics, TrainConfig, drawn, inputs_for, steps_per_epoch
from narrowdeep.training.model_file import (
    RunPosition,
    checksum,
    damage_named,
    fill,
    model_tensors,
    read_tensors,
    run_shapes,
    write_tensors,
)

_EVALUATION_BATCH = 1024

if TYPE_CHECKING:
    from narrowdeep.optim import GramGaussNewton


class DivergedError(RuntimeError):
    """The loss, a parameter or its momentum is no longer finite.

    Examples:
        >>> from narrowdeep.data import load_task
        >>> from narrowdeep.training import DivergedError, TrainConfig, Trainer
        >>> config = TrainConfig(
        ...     task="toy", arch="mlp", depth=50, scale=50.0, rho=1.0, beta=1.0, init="ntk", form="offset",
        ...     checkpoint="auto", pool=1, epochs=2, batch_size=200, lr=4e-6, momentum=0.0, seed=0, dtype="float32",
        ... )
        >>> import dataclasses
        >>> trainer = Trainer(dataclasses.replace(config, lr=1e3), load_task("toy"))
        >>> try:
        ...     while trainer.step():
        ...         pass
        ... except DivergedError:
        ...     print("the step is too large")
        the step is too large
    """


def thesis_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """``1/(2N) sum_n ||f(x_n) - y_n||^2`` (thesis section 3.2) of two (N, out) tensors: a scalar.

    Examples:
        >>> import torch
        >>> from narrowdeep.training import thesis_loss
        >>> thesis_loss(torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1))  # (1 + 9) / (2 * 2)
        tensor(2.5000)
    """
    return (prediction - target).square().sum() / (2 * prediction.shape[0])


def _check_task(config: TrainConfig, task: Task) -> None:
    if task.name != config.task:
        raise ValueError(f"task must be {config.task!r} as the configuration says, got {task.name!r}")


class Trainer:
    """One run: model, optimizer, random state and position, advanced a step at a time.

    ``position`` is (epochs finished, steps done in the current epoch). The order of an epoch's samples follows from
    the random state at its start, so a run can stop after any step and go on with the same numbers. ``saved_threads``
    is the number of threads of the process that saved a loaded run, None for a new one. ``on_batch`` is called with
    (samples done, samples in all) within a step of Gauss-Newton.

    Several ``ranks`` (``Ranks.of()`` under torchrun) divide the samples of every step, and take the same steps: each
    has a trainer of its own, with the same configuration and task, and all call the same methods. The first one saves.
    A run is the same, bit for bit, at a given number of ranks; ``saved_ranks`` is that of a loaded run.

    Examples:
        >>> from narrowdeep.data import load_task
        >>> from narrowdeep.training import TrainConfig, Trainer
        >>> config = TrainConfig(
        ...     task="toy", arch="mlp", depth=50, scale=50.0, rho=1.0, beta=1.0, init="ntk", form="offset",
        ...     checkpoint="auto", pool=1, epochs=2, batch_size=200, lr=4e-6, momentum=0.0, seed=0, dtype="float32",
        ... )
        >>> trainer = Trainer(config, load_task("toy"))
        >>> while not trainer.finished:
        ...     metrics = trainer.step()
        >>> metrics.epoch, metrics.step
        (2, 2)
    """

    def __init__(
        self, config: TrainConfig, task: Task, *, device: torch.device | str = "cpu", ranks: Ranks = ALONE
    ) -> None:
        _check_task(config, task)
        self.config, self.ranks = config, ranks
        self.device = torch.device(device)
        task = inputs_for(config.arch, task)
        self.task = task.to(self.device)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.model = drawn(config, task, device, self.generator)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=config.lr, momentum=config.momentum, fused=True)
        self.gauss_newton: GramGaussNewton | None = None
        if config.damping is not None:
            from narrowdeep.optim import GramGaussNewton  # which needs scipy

            options: dict[str, Any] = {"damping": config.damping, "batch_size": config.batch_size, "ranks": ranks}
            self.gauss_newton = GramGaussNewton(self.model, kernel="features", **options)
        self.on_batch: Callable[[int, int], None] | None = None
        self.epoch = 0
        self.saved_threads: int | None = None
        self.saved_ranks: int | None = None
        self._last_loss = math.nan
        self.steps_per_epoch = steps_per_epoch(config, task)
        self._begin_epoch(self.generator.get_state())

    def require_room(self) -> None:
        """Raise BudgetError where a step cannot keep to ``config.budget``, which otherwise the first one does."""
        x = self.task.x_train[: self.config.batch_size]
        if self.config.budget is not None:
            plan(self.model, batch_size=len(x), input_shape=tuple(x.shape[1:]))

    def require_same(self) -> None:
        """Raises: ValueError naming what differs from rank to rank: a setting, the data, where the run stands."""
        if self.ranks.size == 1:
            return
        task, values = self.task, dataclasses.asdict(self.config)
        values["data"] = checksum({"x": task.x_train, "y": task.y_train, "x_test": task.x_test, "y_test": task.y_test})
        values["parameters"] = checksum(model_tensors(self.model))
        values |= {"epoch": self.epoch, "step": self.step_in_epoch, "torch": torch.__version__}
        values |= {"device": self.device.type, "random state": self._epoch_random_state.tolist()}
        self.ranks.require_same(values)

    def _begin_epoch(self, random_state: Tensor) -> None:
        self._epoch_random_state = random_state
        self.generator.set_state(random_state)
        self._order = torch.randperm(self.task.x_train.shape[0], generator=self.generator).to(self.device)
        self.step_in_epoch = 0
        # Sums over the samples seen in this epoch: loss, correct predictions. Float64, on the device: no wait per step.
        self._sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        self._seconds = 0.0

    @property
    def step_count(self) -> int:
        """Optimisation steps since the start of the run."""
        return self.epoch * self.steps_per_epoch + self.step_in_epoch

    @property
    def finished(self) -> bool:
        return self.epoch >= self.config.epochs

    @property
    def samples_seen(self) -> int:
        """Samples of the current epoch that have been trained on."""
        return min(self.step_in_epoch * self.config.batch_size, self.task.x_train.shape[0])

    def running_loss(self) -> float:
        """Mean training loss over the current epoch so far; before its first step, over the last one (nan without)."""
        return self._sums[0].item() / self.samples_seen if self.samples_seen else self._last_loss

    def step(self) -> EpochMetrics | None:
        """One step; the epoch's metrics after its last step, otherwise None.

        Raises: DivergedError at the end of an epoch whose loss is not finite; numpy.linalg.LinAlgError where the system
        of a step of Gauss-Newton is singular.
        """
        start = time.perf_counter()
        if self.gauss_newton is not None:
            return self._gauss_newton_step(self.gauss_newton, start)
        batch = self._order[self.samples_seen :][: self.config.batch_size]
        own = batch[self.ranks.share(len(batch))]
        target = self.task.y_train[own]
        prediction = self.model(self.task.x_train[own])
        loss = (prediction - target).square().sum() / (2 * len(batch))  # thesis_loss, of which a rank has a part
        self.optimizer.zero_grad()
        loss.backward()
        self.ranks.sum_(*(p.grad for p in self.model.parameters() if p.grad is not None))
        steps = self.config.epochs * self.steps_per_epoch
        factor = decay_factor(self.config.decay, self.step_count, steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * factor
        self.optimizer.step()
        with torch.no_grad():
            sums = torch.zeros_like(self._sums)
            sums[0] = loss.double() * len(batch)
            if self.task.accuracy_kind is not None:
                sums[1] = self.task.correct(prediction, target)
            self.ranks.sum_(sums)
            self._sums += sums
        self.step_in_epoch += 1
        self._seconds += time.perf_counter() - start
        return self._end_epoch() if self.step_in_epoch == self.steps_per_epoch else None

    def _gauss_newton_step(self, optimizer: GramGaussNewton, start: float) -> EpochMetrics:
        task = self.task
        step = optimizer.step(task.x_train, task.y_train, at=task.x_test, on_batch=self.on_batch)
        assert step.outputs is not None
        self._sums[0] = (step.measured if step.accepted else step.loss) * len(step.fitted)
        accuracy = None
        if task.accuracy_kind is not None:
            self._sums[1] = task.correct(step.fitted, task.y_train)
            accuracy = float(task.correct(step.outputs, task.y_test)) / len(step.outputs)
        self._seconds += time.perf_counter() - start
        return dataclasses.replace(
            self._end_epoch(),
            predicted_train_loss=step.predicted,
            predicted_test_loss=float(thesis_loss(step.outputs, task.y_test)),
            predicted_test_accuracy=accuracy,
        )

    def _end_epoch(self) -> EpochMetrics:
        start = time.perf_counter()
        loss, correct = (self._sums / self.task.x_train.shape[0]).tolist()  # on a GPU, this waits for the last step
        seconds = self._seconds + time.perf_counter() - start
        test_loss, test_accuracy = self.evaluate()
        self.require_finite(test_loss)
        self._last_loss = loss
        self.epoch += 1
        metrics = EpochMetrics(
            epoch=self.epoch,
            step=self.epoch * self.steps_per_epoch,
            train_loss=loss,
            train_accuracy=None if self.task.accuracy_kind is None else correct,
            test_loss=test_loss,
            test_accuracy=test_accuracy,
            seconds=seconds,
            samples_per_second=self.task.x_train.shape[0] / seconds,
        )
        self._begin_epoch(self.generator.get_state())
        return metrics

    def require_finite(self, test_loss: float = 0.0) -> None:
        """Raise DivergedError if the current epoch's training loss, or the test loss given, is not finite."""
        if not math.isfinite(self._sums[0].item() + test_loss):
            raise self._diverged("loss is")

    def _diverged(self, what: str) -> DivergedError:
        return DivergedError(
            f"the {what} no longer finite in epoch {self.epoch + 1}: lr = {self.config.lr:g} is too large "
            "(start again in another --out with a smaller --lr or --tau)"
        )

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float | None]:
        """Loss and accuracy on the test samples; accuracy is None for a regression task."""
        loss = correct = 0.0
        task, count = self.task, self.task.x_test.shape[0]
        share = self.ranks.share(count)
        parts = (of[share].split(_EVALUATION_BATCH) for of in (task.x_test, task.y_test))
        for x, y in zip(*parts, strict=True) if share.stop > share.start else ():
            prediction = self.model(x)
            loss += thesis_loss(prediction, y).item() * len(x)
            if task.accuracy_kind is not None:
                correct += task.correct(prediction, y).item()
        sums = torch.tensor([loss, correct], dtype=torch.float64, device=self.ranks.device)
        self.ranks.sum_(sums)
        loss, correct = (sums / count).tolist()
        return loss, None if task.accuracy_kind is None else correct

    def save(self, path: str | Path) -> None:
        """Write the whole state of the run to ``path``, atomically; its mode follows the umask. The first rank does.

        Raises: DivergedError, leaving ``path`` as it is, if the current epoch's loss, a parameter or its momentum is
        not finite; OSError if ``path`` cannot be written.
        """
        self.require_finite()
        if not self.ranks.is_first:
            return
        tensors = model_tensors(self.model)
        momentum = [self.optimizer.state[p].get("momentum_buffer") for p in self.model.parameters()]
        if any(buffer is not None for buffer in momentum):  # those of no layers have no gradient, and so none
            for i, (buffer, parameter) in enumerate(zip(momentum, self.model.parameters(), strict=True)):
                tensors[f"momentum.{i}"] = parameter.detach() if buffer is None else buffer
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise self._diverged("parameters are")
        tensors["random_state"] = self._epoch_random_state
        tensors["sums"] = self._sums
        position = RunPosition(
            config=self.config,
            in_features=self.task.in_features,
            out_features=self.task.out_features,
            epoch=self.epoch,
            step_in_epoch=self.step_in_epoch,
            seconds=self._seconds,
            threads=torch.get_num_threads(),
            ranks=self.ranks.size,
            damping=None if self.gauss_newton is None else self.gauss_newton.damping,
            growth=None if self.gauss_newton is None else self.gauss_newton.state_dict()["growth"],
        )
        write_tensors(path, tensors, dataclasses.asdict(position))

    @classmethod
    def load(
        cls,
        path: str | Path,
        task: Task,
        *,
        device: torch.device | str = "cpu",
        epochs: int | None = None,
        ranks: Ranks = ALONE,
    ) -> Trainer:
        """The run saved at ``path``, to go on with, on any number of ``ranks``, each of which reads it.

        ``epochs`` replaces the number of epochs to train in all.

        Raises: FileNotFoundError, DamagedFileError; ValueError when ``task`` is not the run's task.
        """
        position, tensors = read_tensors(path, (RunPosition,), run_shapes)
        config = position.config
        sizes = position.in_features, position.out_features
        found = inputs_for(config.arch, task).in_features, task.out_features
        if sizes != found:
            raise ValueError(f"task must have {sizes} features as the run in {path}, got {found}")
        if epochs is not None:
            config = config.for_epochs(epochs)
        _check_task(config, task)
        with damage_named(path):
            trainer = cls(config, task, device=device, ranks=ranks)
            if position.step_in_epoch >= trainer.steps_per_epoch:
                raise ValueError(
                    f"step_in_epoch must be below the {trainer.steps_per_epoch} steps of an epoch, got "
                    f"{position.step_in_epoch}"
                )
            for name, tensor in tensors.items():
                if tensor.is_floating_point() and not tensor.isfinite().all():
                    raise ValueError(f"the tensor {name} must be finite")
            fill(trainer.model, tensors)
            for i, parameter in enumerate(trainer.model.parameters()):
                if f"momentum.{i}" in tensors:
                    buffer = torch.empty_like(parameter).copy_(tensors[f"momentum.{i}"])
                    trainer.optimizer.state[parameter]["momentum_buffer"] = buffer
            if trainer.gauss_newton is not None:  # made for the network as it was drawn: its features are there
                kept = {"damping": position.damping, "growth": position.growth}
                trainer.gauss_newton.load_state_dict({**trainer.gauss_newton.state_dict(), **kept})
            trainer.epoch = position.epoch
            trainer.saved_threads, trainer.saved_ranks = position.threads, position.ranks
            trainer._begin_epoch(tensors["random_state"])
            trainer.step_in_epoch, trainer._seconds = position.step_in_epoch, position.seconds
            trainer._sums.copy_(tensors["sums"])
        return trainer
