"""The tangent kernels of a run: that of its network as it was drawn and as it is now, on some training samples."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from narrowdeep import ntk, training  # what needs scipy is loaded where it is used
from narrowdeep.data import load_task
from narrowdeep.step_size import SAMPLES, decay_factor
from narrowdeep.training.model_file import RunPosition, read_tensors


@dataclass(frozen=True)
class RunKernels:
    """Kernels are scaled and averaged over outputs, eigenvalues over the number of samples and in falling order."""

    before: np.ndarray
    """(samples,), of the network as it was drawn."""
    now: np.ndarray
    """(samples,)"""
    moved: float
    """``|K_now - K_before| / |K_before|``, Frobenius norms."""
    time: float | None
    """Kernel time that descent has run for, momentum counted: a mode of eigenvalue lambda has fallen by
    ``exp(-lambda time)``. None for Gauss-Newton, which takes no time."""
    predicted: float | None
    """Loss on the samples after the steps of the run, had the kernel stayed ``before`` and every step seen all samples.
    None where there is no ``time``."""
    loss: float
    """Loss on the samples now."""

    def to_dict(self) -> dict[str, Any]:
        """As numbers and lists, for JSON."""
        return {**asdict(self), "before": self.before.tolist(), "now": self.now.tolist()}


def run_kernels(folder: Path, data: Path | None = None) -> RunKernels:
    """Of the run in ``folder``, on at most ``SAMPLES`` training samples, the same for every run of a task.

    Raises: OSError, ValueError where the run or its task cannot be read, or the kernel is not finite.
    """
    path = folder / training.CHECKPOINT
    position = read_tensors(path, (RunPosition,), None)[0]
    config = position.config
    dtype = training.DTYPES[config.dtype]
    task = training.inputs_for(config.arch, load_task(config.task, data=data, pool=config.pool, dtype=dtype))
    chosen = torch.randperm(len(task.x_train), generator=torch.Generator().manual_seed(0))[:SAMPLES]
    x, y = task.x_train[chosen], task.y_train[chosen]
    drawn, trained = training.build_model(config, task), training.load_model(path)
    kernels = [ntk.empirical_ntk(model, x, reduce="trace").numpy() / y.shape[1] for model in (drawn, trained)]
    if not all(np.isfinite(kernel).all() for kernel in kernels):
        raise ValueError(f"{path}: the kernel must be finite, got NaN or infinity")
    before, now = ((np.linalg.eigvalsh(kernel)[::-1] / len(x)).clip(0) for kernel in kernels)
    with torch.no_grad():
        start, end = drawn(x), trained(x)
    time = predicted = None
    if config.optimizer == "sgd":
        an_epoch = training.steps_per_epoch(config, task)
        tau = config.lr * config.depth * config.scale**2
        factors = [decay_factor(config.decay, i, config.epochs * an_epoch) for i in range(config.epochs * an_epoch)]
        taus = [tau * factor for factor in factors[: position.epoch * an_epoch + position.step_in_epoch]]
        time = sum(taus) / (1 - config.momentum)
        predicted = float(
            ntk.loss_curve(kernels[0], y, len(taus), tau=taus, momentum=config.momentum, initial=start)[-1]
        )
    return RunKernels(
        before=before,
        now=now,
        moved=float(np.linalg.norm(kernels[1] - kernels[0]) / np.linalg.norm(kernels[0])),
        time=time,
        predicted=predicted,
        loss=float(training.thesis_loss(end, y)),
    )
