"""safetensors files with a header that a schema describes, checksums, and no tensor that the header does not mean.

Nothing of a file is used before its header, and the name, shape and dtype of every tensor in it, are what they must be.
More than 400 lines with the examples of its docstrings.
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol, TypeVar, get_type_hints

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.optim.swa_utils import AveragedModel

from narrowdeep import files
from narrowdeep.checks import shown
from narrowdeep.distributed.gathered import full
from narrowdeep.extras import optional
from narrowdeep.memory.planning import OPTIMIZER_TENSORS, Optimizer
from narrowdeep.modules import DeepNarrowCNN, DeepNarrowMLP
from narrowdeep.schema import Count, Index, Integer, NotNegative, Positive, Rule, check_fields, from_json
from narrowdeep.training.config import (
    DTYPES,
    MODELS,
    AnyCheckpoint,
    AnyForm,
    AnyInit,
    Arch,
    Depth,
    TrainConfig,
    untouched,
)

with optional():
    from safetensors import SafetensorError, safe_open

FORMAT = "narrowdeep 1"

T = TypeVar("T")

_NAMES = {torch.float32: "F32", torch.float64: "F64", torch.uint8: "U8"}
_TYPES = {name: dtype for dtype, name in _NAMES.items()}

Shapes = Mapping[str, tuple[tuple[int, ...], Sequence[torch.dtype]]]
"""What a file must hold: for each tensor its shape and the dtypes that it may have."""


class DamagedFileError(ValueError):
    """A file that cannot be trusted; the message starts with its path.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from narrowdeep.training import DamagedFileError, load_model
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "model.safetensors"
        ...     _ = path.write_bytes(b"not a model")
        ...     try:
        ...         load_model(path)
        ...     except DamagedFileError as error:
        ...         print(str(error).startswith(f"{path} is damaged"))
        True
    """


@dataclass(frozen=True)
class ModelSettings:
    """The arguments of the constructor of ``MODELS[arch]``; ``in_features`` and ``out_features`` are a CNN's channels.

    ``kernel_size`` is None for an MLP; in a CNN's file of a run it is 3 and not written.
    """

    arch: Arch
    in_features: Count
    out_features: Count
    depth: Depth
    scale: Positive
    rho: NotNegative
    beta: NotNegative
    init: AnyInit
    form: AnyForm
    checkpoint: AnyCheckpoint
    chunks: Count = 1
    kernel_size: Count | None = None
    budget: Index | None = None
    optimizer: Annotated[Optimizer, Rule(f"must be one of {', '.join(OPTIMIZER_TENSORS)}")] = "sgd"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.chunks > max(1, self.depth - 2):
            raise ValueError(f"chunks must be at most the number of hidden layers, {self.depth - 2}, got {self.chunks}")

    @classmethod
    def of_run(cls, config: TrainConfig, in_features: int, out_features: int) -> ModelSettings:
        names = ("arch", "depth", "scale", "rho", "beta", "init", "form", "checkpoint", "budget")
        settings = {name: getattr(config, name) for name in names} | {"optimizer": config.planned_optimizer}
        return cls(in_features=in_features, out_features=out_features, **settings)

    def count(self) -> int:
        """How many parameters the model has."""
        return 6 if self.chunks == 1 else 4 + 2 * self.chunks

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of each parameter, of any depth in no time; in one chunk, in the order of the model's own."""
        n = self.in_features + 1 + self.out_features
        tap = () if self.arch == "mlp" else (self.kernel_size or 3,) * 2
        borders = [(self.depth - 2) * i // self.chunks for i in range(self.chunks + 1)]
        parts = [("", self.depth - 2)]
        if self.chunks > 1:
            parts = [(f".{i}", end - begin) for i, (begin, end) in enumerate(pairwise(borders))]
        return {
            "first_weight": (n, self.in_features, *tap),
            "first_bias": (n,),
            **{f"hidden_weight{suffix}": (layers, n, n, *tap) for suffix, layers in parts},
            **{f"hidden_bias{suffix}": (layers, n) for suffix, layers in parts},
            "last_weight": (self.out_features, n, *tap),
            "last_bias": (self.out_features,),
        }


class _Header(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Any]]

    def model_settings(self) -> ModelSettings: ...

    def dtypes(self) -> Sequence[torch.dtype]: ...


@dataclass(frozen=True)
class RunPosition:
    """The header of a run's state: its configuration, where it stands, and on what it ran."""

    config: TrainConfig
    in_features: Count
    out_features: Count
    epoch: Index
    step_in_epoch: Index
    seconds: NotNegative
    threads: Count | None = None
    ranks: Count | None = None
    damping: NotNegative | None = None
    """Of Gauss-Newton, as its steps have adapted it."""
    growth: Positive | None = None
    """Of the damping, at the next step that does not lower the loss."""

    def model_settings(self) -> ModelSettings:
        return ModelSettings.of_run(self.config, self.in_features, self.out_features)

    def dtypes(self) -> Sequence[torch.dtype]:
        return (DTYPES[self.config.dtype],)


@dataclass(frozen=True)
class _ModelHeader:
    model: ModelSettings

    def model_settings(self) -> ModelSettings:
        return self.model

    def dtypes(self) -> Sequence[torch.dtype]:
        return tuple(DTYPES.values())


@dataclass(frozen=True)
class _Checksums:
    header: Integer
    tensors: Annotated[dict[str, Integer], Rule("must hold a number for each part")]


def save_model(model: nn.Module, path: str | Path) -> None:
    """Write a model, its settings and its exact parameters (Delta in offset form) to a safetensors file, atomically.

    A compiled model, and one in DistributedDataParallel, DataParallel or AveragedModel, is written as what it wraps.
    One that ``fully_shard`` has sharded is gathered, for which all its ranks must call this; the first one writes.

    Raises: TypeError or ValueError, before anything is written, for what would not come back as it is: another class or
        ``forward``, a pruned or parametrized model, layers that share a parameter, buffers, parameters of other names,
        shapes or dtypes. OSError naming ``path``.

    Examples:
        >>> import tempfile, torch
        >>> from narrowdeep import DeepNarrowMLP
        >>> from narrowdeep.training import load_model, save_model
        >>> model, x = DeepNarrowMLP(2, 1, depth=100), torch.rand(5, 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_model(model, f"{folder}/model.safetensors")
        ...     again = load_model(f"{folder}/model.safetensors")
        >>> torch.equal(again(x), model(x))
        True
    """
    found = _unwrapped(model)
    inputs, outputs = (
        (found.in_channels, found.out_channels)
        if isinstance(found, DeepNarrowCNN)
        else (found.in_features, found.out_features)
    )
    settings = ModelSettings(
        arch="cnn" if isinstance(found, DeepNarrowCNN) else "mlp",
        in_features=inputs,
        out_features=outputs,
        kernel_size=found.kernel_size if isinstance(found, DeepNarrowCNN) else None,
        depth=found.depth,
        scale=found.scale,
        rho=found.rho,
        beta=found.beta,
        init=found.init,
        form=found.form,
        checkpoint=found.checkpoint,
        chunks=found.chunks,
        budget=found.budget,
        optimizer=found.optimizer,
    )
    tensors = {name: full(tensor) for name, tensor in model_tensors(found).items()}
    for name, tensor in tensors.items():
        if type(tensor) is not Tensor or tensor.is_meta:
            kind = "one without data" if type(tensor) is Tensor else type(tensor).__name__
            raise TypeError(f"the parameters of the model must be plain tensors in memory, got {kind} for {name}")
    names: dict[int, str] = {}
    for name, parameter in found.named_parameters(remove_duplicate=False):
        if (other := names.setdefault(id(parameter), name)) != name:
            raise ValueError(
                f"model must have a parameter of its own in each place, got one as {other} and {name}: what is loaded "
                "would be trained apart"
            )
    tensors_and_buffers = {**tensors, **{f"model.{name}": buffer for name, buffer in found.named_buffers()}}
    found_shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors_and_buffers.items()}
    try:
        _check_tensors(found_shapes, _shapes(_ModelHeader(settings)))
    except ValueError as error:
        raise ValueError(f"model must have the parameters that its settings mean: {error}") from None
    if not (_sharded(found) and dist.get_rank()):
        write_tensors(path, tensors, {"model": asdict(settings)})


def load_model(path: str | Path, *, device: torch.device | str = "cpu") -> DeepNarrowMLP | DeepNarrowCNN:
    """The model in a file of ``save_model`` or in a run's state, dtype as saved. The random state is left as it is.

    Raises: FileNotFoundError, DamagedFileError.

    Examples:
        >>> import tempfile
        >>> from narrowdeep import DeepNarrowCNN
        >>> from narrowdeep.training import load_model, save_model
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_model(DeepNarrowCNN(1, 2, depth=50, scale=20.0), f"{folder}/model.safetensors")
        ...     model = load_model(f"{folder}/model.safetensors")
        >>> type(model).__name__, model.depth, model.scale
        ('DeepNarrowCNN', 50, 20.0)
    """

    schemas: tuple[type[_Header], ...] = (_ModelHeader, RunPosition)
    header, tensors = read_tensors(path, schemas, lambda header, count: _shapes(header, count), prefix="model.")
    settings = header.model_settings()
    arguments = asdict(settings)
    sizes = arguments.pop("arch"), arguments.pop("in_features"), arguments.pop("out_features")
    budget, kernel_size = arguments.pop("budget"), arguments.pop("kernel_size")
    if settings.arch == "cnn":
        arguments["kernel_size"] = kernel_size or 3
    with damage_named(path):
        model = untouched(*sizes, **arguments, dtype=tensors["model.first_weight"].dtype)
        model.budget = budget
        fill(model, tensors)
    return model.to(device)


def fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy the tensors ``model.*`` into the parameters of a model; their shapes have been checked."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters as a file holds them."""
    return {f"model.{name}": p.detach() for name, p in model.named_parameters(remove_duplicate=False)}


def run_shapes(position: RunPosition, _: int) -> Shapes:
    """What the state of a run holds: parameters, a momentum for each once there is one, random state and sums."""
    model = _shapes(position)
    begun = position.epoch + position.step_in_epoch > 0
    momentum = model.values() if begun and position.config.momentum > 0 else ()
    return {
        **model,
        **{f"momentum.{i}": expected for i, expected in enumerate(momentum)},
        "random_state": (tuple(torch.Generator().get_state().shape), (torch.uint8,)),
        "sums": ((2,), (torch.float64,)),
    }


def _shapes(header: _Header, count: int | None = None) -> Shapes:
    """The tensors of a model of which a file holds ``count``; compared first, because chunks may be said to be many."""
    settings = header.model_settings()
    if count is not None and count != settings.count():
        raise ValueError(f"it must hold {settings.count()} parameters as its settings say, got {count}")
    return {f"model.{name}": (shape, header.dtypes()) for name, shape in settings.shapes().items()}


def _unwrapped(model: Any) -> DeepNarrowMLP | DeepNarrowCNN:
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)
    while True:
        if isinstance(model, wrappers):
            model = model.module
        elif isinstance(model, nn.Module) and isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # of torch.compile
        else:
            break
    if isinstance(model, (DeepNarrowMLP, DeepNarrowCNN)):
        names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
        if any(map(is_parametrized, model.modules())) or any(n.endswith(("_orig", "_g", "_v")) for n in names):
            raise ValueError(
                "model must not be pruned or parametrized, whose parameters are computed from others: make it "
                "permanent first (torch.nn.utils.prune.remove, torch.nn.utils.parametrize.remove_parametrizations, "
                f"torch.nn.utils.remove_weight_norm), got the parameters {', '.join(sorted(names))}"
            )
    kind = type(model).__bases__[-1] if _sharded(model) else type(model)
    if kind not in MODELS.values():
        raise TypeError(
            f"model must be a DeepNarrowMLP or DeepNarrowCNN, not a subclass, got {type(model).__name__}: the file "
            "holds no code (for other modules, save model.state_dict())"
        )
    if "forward" in vars(model):
        raise ValueError(
            "model must have the forward of its class, got a replaced one: the file holds no code (save "
            "model.state_dict())"
        )
    return model


def _sharded(model: nn.Module) -> bool:
    """Whether ``fully_shard`` has given it a class of its own; where nobody has loaded that, it has not."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(model, fsdp.FSDPModule)


@contextmanager
def damage_named(path: str | Path) -> Iterator[None]:
    """Whatever goes wrong while a file's content is interpreted is the file's fault: say which file."""
    try:
        yield
    except (ArithmeticError, LookupError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        raise DamagedFileError(f"{path} is damaged or not a narrowdeep file: {error}") from error


def checksum(tensors: Mapping[str, Tensor]) -> int:
    """Of names, dtypes, shapes and values."""
    return _crc32({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def _crc32(tensors: Mapping[str, Tensor]) -> int:
    checksum = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        checksum = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), checksum)
        if tensor.numel():
            checksum = zlib.crc32(_bytes(tensor), checksum)
    return checksum


def _bytes(tensor: Tensor) -> Any:
    return tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b""


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write a file of ``read_tensors``, atomically.

    Raises: OSError naming ``path``.
    """
    cpu = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    metadata = {"format": FORMAT, "header": json.dumps(header, allow_nan=False)}
    # safetensors has no checksum: one for each prefix, so that the model alone can be read and checked.
    prefixes = {name.partition(".")[0] for name in cpu}
    checksums = {p: _crc32({n: t for n, t in cpu.items() if n.partition(".")[0] == p}) for p in prefixes}
    metadata["crc32"] = json.dumps({"header": zlib.crc32(metadata["header"].encode()), "tensors": checksums})
    # The format is a line of JSON and the bytes one after another. Its library writes through a temporary file of its
    # own, which a kill leaves behind and whose mode is 0600, or holds the whole file in memory.
    entries: dict[str, Any] = {"__metadata__": metadata}
    order = sorted(cpu, key=lambda name: (-cpu[name].element_size(), name))  # every tensor aligned
    position = 0
    for name in order:
        end = position + cpu[name].numel() * cpu[name].element_size()
        entries[name] = {
            "dtype": _NAMES[cpu[name].dtype],
            "shape": list(cpu[name].shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    with files.replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(_bytes(cpu[name]))


def read_tensors(
    path: str | Path,
    schemas: tuple[type[T], ...],
    expected: Callable[[T, int], Shapes] | None,
    *,
    prefix: str = "",
) -> tuple[T, dict[str, Tensor]]:
    """Header and tensors of a file of ``write_tensors``: those whose names begin with ``prefix``.

    The header is an instance of the first schema that it fits; ``expected(header, count)`` says which tensors with the
    prefix the file, which has ``count`` of them, must hold; None that none is read.

    Raises: FileNotFoundError; DamagedFileError before any tensor is read where the header, or a name, shape or dtype,
        is not as it must be, and after where a checksum does not match.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, or is no file")
    with damage_named(path), safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(f"its format must be {FORMAT!r}, got {shown(metadata.get('format'))}")
        checksums = from_json(_Checksums, metadata["crc32"])
        if zlib.crc32(metadata["header"].encode()) != checksums.header:
            raise ValueError("the checksum of its header does not match")
        header = _header(metadata["header"], schemas)
        if expected is None:
            return header, {}
        found = {}
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            if name.startswith(prefix):
                part = file.get_slice(name)
                found[name] = tuple(part.get_shape()), _TYPES.get(part.get_dtype())
        _check_tensors(found, expected(header, len(found)))
        tensors = {name: file.get_tensor(name) for name in found}
        for part in sorted({name.partition(".")[0] for name in tensors}):
            if _crc32({n: t for n, t in tensors.items() if n.partition(".")[0] == part}) != checksums.tensors.get(part):
                raise ValueError(f"the checksum of its part {part!r} does not match")
    return header, tensors


def _header(text: str, schemas: Sequence[type[T]]) -> T:
    errors = []
    for schema in schemas:
        try:
            return from_json(schema, text)
        except ValueError as error:  # noqa: PERF203 (a schema or two)
            # What has not even the first field is meant for another schema.
            errors.append((str(error) == f"{next(iter(get_type_hints(schema)))} is missing", str(error)))
    raise ValueError(min(errors, key=lambda error: error[0])[1])


def _check_tensors(found: Mapping[str, tuple[tuple[int, ...], torch.dtype | None]], expected: Shapes) -> None:
    """Raise ValueError where a tensor is missing, is not known, or has another shape or dtype than it must have."""
    for name, (shape, dtypes) in expected.items():
        if name not in found:
            raise ValueError(f"the tensor {name} is missing")
        if found[name][0] != shape:
            raise ValueError(f"the tensor {name} must have the shape {shape}, got {found[name][0]}")
        if found[name][1] not in dtypes:
            raise ValueError(f"the tensor {name} must have the dtype {dtypes[0]}, got {found[name][1]}")
    for name in found:
        if name not in expected:
            raise ValueError(f"the tensor {name} is not known")
    types = {found[name][1] for name in expected if name.startswith("model.")}
    if len(types) > 1:
        raise ValueError(f"the tensors of the model must have one dtype, got {', '.join(sorted(map(str, types)))}")
