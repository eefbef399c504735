"""Train a deep narrow network on a task: SGD or Gauss-Newton on the thesis's loss, in runs that can be stopped and
resumed exactly.

A run lives in one folder: ``checkpoint.safetensors``, its state (everything needed to go on, bit for bit),
``metrics.jsonl`` (one line an epoch) and ``curves.png``. safetensors files hold numbers only: loading one never
executes code. A model's ``checkpoint=`` is another thing: what its backward keeps.
"""

from narrowdeep.training.config import (
    DTYPES,
    MODELS,
    EpochMetrics,
    TrainConfig,
    build_model,
    inputs_for,
    steps_per_epoch,
)
from narrowdeep.training.model_file import DamagedFileError, load_model, save_model
from narrowdeep.training.plots import plot_metrics
from narrowdeep.training.run import (
    CHECKPOINT,
    CURVES,
    METRICS,
    fit,
    holds_run,
    peak_memory,
    read_config,
    read_metrics,
    require_writable,
)
from narrowdeep.training.trainer import DivergedError, Trainer, thesis_loss

__all__ = [
    "CHECKPOINT",
    "CURVES",
    "DTYPES",
    "METRICS",
    "MODELS",
    "DamagedFileError",
    "DivergedError",
    "EpochMetrics",
    "TrainConfig",
    "Trainer",
    "build_model",
    "fit",
    "holds_run",
    "inputs_for",
    "load_model",
    "peak_memory",
    "plot_metrics",
    "read_config",
    "read_metrics",
    "require_writable",
    "save_model",
    "steps_per_epoch",
    "thesis_loss",
]
