"""What a run is: its configuration and what it reports, as schemas, and the network that a configuration means."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch

from narrowdeep.data import Task
from narrowdeep.extras import optional
from narrowdeep.functional import Form
from narrowdeep.modules import DeepNarrowCNN, DeepNarrowMLP
from narrowdeep.modules.base import Checkpoint, Init
from narrowdeep.schema import Count, Finite, Integer, NotNegative, Pair, Positive, Rule, Share, check_fields
from narrowdeep.schema import below_2_63 as _below
from narrowdeep.step_size import Decay

with optional():
    from pydantic import AfterValidator, Field

DTYPES = {"float32": torch.float32, "float64": torch.float64}

MODELS: dict[str, type[DeepNarrowMLP] | type[DeepNarrowCNN]] = {"mlp": DeepNarrowMLP, "cnn": DeepNarrowCNN}


def _checkpoint(value: Checkpoint) -> Checkpoint:
    for part in value if isinstance(value, tuple) else [value]:
        if not isinstance(part, str):
            if part < 1:
                raise ValueError("must be at least 1 layer a segment")
            _below(part)
    return value


def _depth(value: int) -> int:
    if value < 2:
        raise ValueError("must be at least 2")
    return _below(value)


Arch = Annotated[str, Field(pattern="^(mlp|cnn)$"), Rule("must be one of mlp, cnn")]
Depth = Annotated[Integer, Rule("must be an int"), AfterValidator(_depth)]
AnyInit = Annotated[Init, Rule("must be 'ntk' or 'kaiming'")]
AnyForm = Annotated[Form, Rule("must be 'offset' or 'plain'")]
AnyCheckpoint = Annotated[
    Integer | Literal["auto", "none"] | Pair, Rule("must be 'auto', 'none' or an int"), AfterValidator(_checkpoint)
]
_Momentum = Annotated[Finite, Field(ge=0, lt=1), Rule("must be at least 0 and below 1")]
_Seed = Annotated[Integer, Field(ge=0, lt=2**63), Rule("must be at least 0 and below 2**63")]
_Dtype = Annotated[Literal["float32", "float64"], Rule("must be one of float32, float64")]
_Decay = Annotated[Decay, Rule("must be none or linear")]
_Optimizer = Annotated[Literal["sgd", "gauss-newton"], Rule("must be sgd or gauss-newton")]


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run's numbers, together with the task's data and the device. On the CPU the last bits
    are also those of a given number of threads and instruction set: both change the order of sums.

    ``lr`` is the step size eta of SGD on the loss ``1/(2N) sum ||f(x_n) - y_n||^2``; one step without momentum advances
    kernel time by ``lr L C_L^2``. With ``decay`` "linear", step i of n (from 0) takes ``lr (1 - i/n)``.
    ``predicted_loss`` is the training loss that ``--lr auto`` predicted for the end of ``epochs``, None where it
    predicted none or for another number of epochs; ``lr_predicted`` says that ``lr`` came from there. ``budget`` is in
    bytes (``narrowdeep.memory.plan``). The other fields are the arguments of ``narrowdeep train`` of the same name.

    With ``optimizer`` "gauss-newton" a step is one pass over all training samples, ``batch_size`` of them at a time,
    and ``lr`` is 1/(L C_L^2), a part of the method; ``damping`` is the one that it starts with, None for SGD.

    Raises: ValueError naming the field, the rule and the value.

    Examples:
        >>> from narrowdeep.training import TrainConfig
        >>> config = TrainConfig(
        ...     task="toy", arch="mlp", depth=50, scale=50.0, rho=1.0, beta=1.0, init="ntk", form="offset",
        ...     checkpoint="auto", pool=1, epochs=2, batch_size=200, lr=4e-6, momentum=0.0, seed=0, dtype="float32",
        ... )
        >>> config.for_epochs(10).epochs
        10
    """

    task: Annotated[str, Rule("must be the name of a task")]
    arch: Arch
    depth: Depth
    scale: Positive
    rho: NotNegative
    beta: NotNegative
    init: AnyInit
    form: AnyForm
    checkpoint: AnyCheckpoint
    pool: Count
    epochs: Count
    batch_size: Count
    lr: Positive
    momentum: _Momentum
    seed: _Seed
    dtype: _Dtype
    predicted_loss: NotNegative | None = None
    decay: _Decay = "none"
    lr_predicted: Annotated[bool, Rule("must be true or false")] = False
    budget: Count | None = None
    optimizer: _Optimizer = "sgd"
    damping: NotNegative | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.budget is not None and self.checkpoint != "auto":
            raise ValueError(f"budget needs checkpoint 'auto', got {self.checkpoint!r}")
        if self.optimizer == "sgd":
            if self.damping is not None:
                raise ValueError(f"damping must be left out for optimizer 'sgd', got {self.damping}")
            return
        needed = {"init": "ntk", "momentum": 0.0, "decay": "none", "budget": None}
        needed["lr"] = 1 / self.depth / self.scale / self.scale
        for name, value in needed.items():
            if getattr(self, name) != value:
                raise ValueError(f"{name} must be {value!r} for optimizer 'gauss-newton', got {getattr(self, name)!r}")
        if self.damping is None:
            raise ValueError("damping must be given for optimizer 'gauss-newton', got None")

    @property
    def planned_optimizer(self) -> Literal["sgd", "momentum"]:
        """What a plan of the run's memory counts (``narrowdeep.memory.plan``)."""
        return "momentum" if self.momentum > 0 else "sgd"

    def for_epochs(self, epochs: int) -> TrainConfig:
        """The same run for another number of epochs: what was predicted for the end of the old number is dropped."""
        if epochs == self.epochs:
            return self
        return dataclasses.replace(self, epochs=epochs, predicted_loss=None, lr_predicted=self.lr_was_predicted)

    @property
    def lr_was_predicted(self) -> bool:
        """``lr_predicted``, also of runs saved before it was recorded."""
        return self.lr_predicted or self.predicted_loss is not None


@dataclass(frozen=True)
class EpochMetrics:
    """One line of ``metrics.jsonl``.

    Training loss and accuracy are means over the epoch's steps, each measured before its update; test loss and
    accuracy are measured after the last. Losses are ``1/(2N) sum ||f - y||^2``; accuracies are None for a regression
    task. ``seconds`` is the time of the training steps alone. An epoch of Gauss-Newton is one step, whose training loss
    and accuracy are those after it; ``predicted_...`` is what the kernel said before it, None for SGD.

    Raises: ValueError naming the field, the rule and the value.

    Examples:
        >>> from narrowdeep.training import EpochMetrics
        >>> EpochMetrics(
        ...     epoch=1, step=10, train_loss=0.5, train_accuracy=None, test_loss=-1.0, test_accuracy=None, seconds=1.0,
        ...     samples_per_second=2000.0,
        ... )
        Traceback (most recent call last):
        ValueError: test_loss must be finite and not negative, got -1.0
    """

    epoch: Count
    step: Count
    train_loss: NotNegative
    train_accuracy: Share | None
    test_loss: NotNegative
    test_accuracy: Share | None
    seconds: NotNegative
    samples_per_second: NotNegative
    predicted_train_loss: NotNegative | None = None
    predicted_test_loss: NotNegative | None = None
    predicted_test_accuracy: Share | None = None

    def __post_init__(self) -> None:
        check_fields(self)


def build_model(
    config: TrainConfig, task: Task, *, device: torch.device | str = "cpu"
) -> DeepNarrowMLP | DeepNarrowCNN:
    """The network of ``config`` for ``task``, drawn from ``config.seed``: the same numbers on every device.

    Examples:
        >>> from narrowdeep.data import load_task
        >>> from narrowdeep.training import TrainConfig, build_model
        >>> config = TrainConfig(
        ...     task="toy", arch="mlp", depth=50, scale=50.0, rho=1.0, beta=1.0, init="ntk", form="offset",
        ...     checkpoint="auto", pool=1, epochs=2, batch_size=200, lr=4e-6, momentum=0.0, seed=0, dtype="float32",
        ... )
        >>> build_model(config, load_task("toy")).depth
        50
    """
    task = inputs_for(config.arch, task)
    return drawn(config, task, device, torch.Generator().manual_seed(config.seed))


def drawn(
    config: TrainConfig, task: Task, device: torch.device | str, generator: torch.Generator
) -> DeepNarrowMLP | DeepNarrowCNN:
    """The network of ``config`` for a task of ``inputs_for``, drawn from ``generator``."""
    model = untouched(
        config.arch,
        task.in_features,
        task.out_features,
        depth=config.depth,
        scale=config.scale,
        rho=config.rho,
        beta=config.beta,
        init=config.init,
        form=config.form,
        checkpoint=config.checkpoint,
        budget=config.budget,
        optimizer=config.planned_optimizer,
        dtype=DTYPES[config.dtype],
    )
    model.reset_parameters(generator)
    return model.to(device)


def untouched(arch: str, inputs: int, outputs: int, **settings: Any) -> DeepNarrowMLP | DeepNarrowCNN:
    """A network on the CPU whose numbers do not matter: the global random state stays where it is."""
    with torch.random.fork_rng(devices=[]):
        return MODELS[arch](inputs, outputs, device="cpu", **settings)


def steps_per_epoch(config: TrainConfig, task: Task) -> int:
    """Steps of one pass over the training samples, the last one on what is left; one of Gauss-Newton.

    Examples:
        >>> from narrowdeep.data import load_task
        >>> from narrowdeep.training import TrainConfig, steps_per_epoch
        >>> config = TrainConfig(
        ...     task="toy", arch="mlp", depth=50, scale=50.0, rho=1.0, beta=1.0, init="ntk", form="offset",
        ...     checkpoint="auto", pool=1, epochs=2, batch_size=200, lr=4e-6, momentum=0.0, seed=0, dtype="float32",
        ... )
        >>> steps_per_epoch(config, load_task("toy"))  # 200 samples in batches of 200
        1
    """
    if config.optimizer == "gauss-newton":
        return 1
    return -(-task.x_train.shape[0] // config.batch_size)


def inputs_for(arch: str, task: Task) -> Task:
    """The task with samples as the network takes them: (N, C, H, W) for a CNN, so that ``in_features`` is C.

    Examples:
        >>> from narrowdeep.data import load_task
        >>> from narrowdeep.training import inputs_for
        >>> inputs_for("cnn", load_task("digits01")).x_test.shape[1:]
        torch.Size([1, 8, 8])
    """
    if arch != "cnn":
        return task
    if task.image_shape is None:
        raise ValueError(f"arch 'cnn' needs a task of images, got {task.name!r}")
    train, test = (x.unflatten(1, task.image_shape) for x in (task.x_train, task.x_test))
    return dataclasses.replace(task, x_train=train, x_test=test)
