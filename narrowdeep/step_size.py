"""The step size and momentum of SGD, predicted from the spectrum of the network's own tangent kernel.

In these networks training is linear in function space to a close approximation (thesis section 3.2), so what a step
size does follows from the kernel at initialisation. With lambda_max its largest eigenvalue over N samples, n steps,
batches of B:

- momentum is Polyak's for the modes down to ``lambda_max (4/n)^2``, which is as far as n steps reach;
- the kernel time tau of a step is ``N / lambda_max``, a quarter of Polyak's step: between the edges of stability a mode
  shrinks by sqrt(momentum) a step whatever tau is, and this leaves room for batches and for the rest of the data;
- tau is at most ``(1 - momentum) B / mean k(x, x)``, less where the batch is a good part of the data: the noise of
  batches then takes back at most half of what descent gains. (With alpha = tau / (1 - momentum), descent multiplies
  mode m's mean square residual E_m by ``1 - 2 alpha lambda_m / N`` in a unit of time, and sampling adds
  ``alpha^2 lambda_m^2 / (N^2 B) sum E``; the sum falls if and only if ``alpha tr(K) / (N B) < 2``.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from narrowdeep import ntk  # its spectra are loaded where a step is predicted, not where a run takes a number
from narrowdeep.checks import check_count, shown
from narrowdeep.data import Task
from narrowdeep.modules import DeepNarrowCNN, DeepNarrowMLP

Decay = Literal["none", "linear"]
"""Whether the step size stays what it is, or falls to 0 over the run, which averages the noise of batches out."""

SAMPLES = 128
"""Training samples that the kernel is computed on, at most."""


def decay_factor(decay: Decay, step: int, steps: int) -> float:
    """What the step size of step ``step`` (from 0) is multiplied by in a run of ``steps``."""
    return 1.0 if decay == "none" else max(0.0, 1.0 - step / steps)


@dataclass(frozen=True)
class StepSize:
    """A prediction, in kernel time and in what ``torch.optim.SGD`` takes.

    Attributes:
        tau: kernel time of a step without momentum; ``lr = tau * model.ntk_lr`` for the thesis's loss.
        momentum: in the convention of torch.optim.SGD.
        samples: how many training samples the kernel was computed on.
        largest: the kernel's largest eigenvalue over ``samples``.
        loss: the training loss on these samples after the last step, if every step saw all of them.
    """

    tau: float
    lr: float
    momentum: float
    samples: int
    largest: float
    loss: float


def predict_step_size(
    model: DeepNarrowMLP | DeepNarrowCNN,
    task: Task,
    *,
    steps: int,
    batch_size: int,
    momentum: float | None = None,
    decay: Decay = "none",
    samples: int = SAMPLES,
    seed: int = 0,
) -> StepSize:
    """Step size and momentum for ``steps`` steps of SGD on batches of ``batch_size``.

    Arguments:
        model: freshly initialised with init="ntk", whose kernel is nearly a multiple of the identity over outputs.
        task: ``x_train`` (N, in) or (N, C, H, W) as the model takes it, of the model's dtype and device.
        steps, batch_size: at least 1.
        momentum: taken as it is instead of predicted.
        decay: of the step size over the run; it decides ``loss`` alone.
        samples: at most so many training samples are looked at, drawn from ``seed``.

    Raises: TypeError or ValueError naming the argument; ValueError when the model has another initialisation, or a
        scale whose square leaves float64.
    """
    counts: dict[str, Any] = {"steps": steps, "batch_size": batch_size, "samples": samples}
    for name, value in counts.items():
        check_count(name, value, 1)
    if momentum is not None and not 0 <= momentum < 1:
        raise ValueError(f"momentum must be at least 0 and below 1, got {shown(momentum)}")
    if model.init != "ntk":
        raise ValueError(f"init must be 'ntk' to predict the step size from the kernel, got {model.init!r}")
    if not 1e-100 < model.scale < 1e100:
        raise ValueError(f"scale must be between 1e-100 and 1e100 for its kernel to be computed, got {model.scale}")
    count = task.x_train.shape[0]
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:samples].to(task.x_train.device)
    x, y = task.x_train[chosen], task.y_train[chosen]
    kernel = ntk.empirical_ntk(model, x, reduce="trace").cpu() / y.shape[1]
    tau = 0.5 * ntk.max_learning_rate(kernel)  # N / lambda_max
    largest = 1.0 / tau
    if momentum is None:
        reach = min(1.0, (4.0 / steps) ** 2)
        _, momentum = ntk.heavy_ball(kernel, smallest=reach * largest * len(chosen))
    batch = min(batch_size, count)
    if batch < count:
        noise = (count - batch) / (count - 1)  # of a batch drawn without replacement
        tau = min(tau, (1.0 - momentum) * batch / (noise * kernel.diagonal().mean().item()))
    taus = [tau * decay_factor(decay, step, steps) for step in range(steps)]
    losses = ntk.loss_curve(kernel, y, steps, tau=taus, momentum=momentum)
    return StepSize(
        tau=tau,
        lr=tau * model.ntk_lr,
        momentum=momentum,
        samples=len(chosen),
        largest=largest,
        loss=float(losses[-1]),
    )
