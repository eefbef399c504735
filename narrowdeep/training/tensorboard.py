"""Scalars of a run's epochs for TensorBoard, in the run's folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from narrowdeep.extras import optional
from narrowdeep.training.config import EpochMetrics
from narrowdeep.training.run import read_metrics
from narrowdeep.training.trainer import Trainer

TAGS = {
    "loss/train": "train_loss",
    "loss/test": "test_loss",
    "loss/train, predicted": "predicted_train_loss",
    "loss/test, predicted": "predicted_test_loss",
    "accuracy/train": "train_accuracy",
    "accuracy/test": "test_accuracy",
    "accuracy/test, predicted": "predicted_test_accuracy",
    "samples per second": "samples_per_second",
}
"""Tag -> the field of ``EpochMetrics``. What is before the slash is drawn in one group."""


@contextmanager
def scalars(trainer: Trainer, folder: Path) -> Iterator[Callable[[EpochMetrics], None]]:
    """What ``fit`` takes for ``on_epoch``: writes ``TAGS`` against the step, for ``tensorboard --logdir``.

    Of a run that goes on, events of steps that are done again are hidden, and epochs from before there were events are
    written first.

    Raises: MissingExtraError where tensorboard is not installed.
    """
    with optional():
        from torch.utils.tensorboard import SummaryWriter

    done = trainer.epoch * trainer.steps_per_epoch
    earlier = [] if any(folder.glob("events.out.tfevents.*")) else read_metrics(folder)
    with SummaryWriter(str(folder), purge_step=done + 1 if done else None) as writer:

        def write(metrics: EpochMetrics) -> None:
            for tag, field in TAGS.items():
                value = getattr(metrics, field)
                if value is not None:
                    writer.add_scalar(tag, value, metrics.step)

        for metrics in earlier:
            if metrics.epoch <= trainer.epoch:
                write(metrics)
        yield write
