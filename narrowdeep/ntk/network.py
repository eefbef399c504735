"""How this package reads a model: which one is a narrow model, what its parameters are, and that it leaves no trace.

A network is "ours" when it is a narrow model as the library made it, alone or behind modules without parameters: its
kernels then come from the fused ops. Every other module is called as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize

from narrowdeep.functional import check_tensor, conv_chain, mlp_chain
from narrowdeep.modules import DeepNarrowCNN, DeepNarrowMLP
from narrowdeep.modules.base import PARAMETER_NAMES
from narrowdeep.ntk.modes import check_alike, exact
from narrowdeep.ops.gram import reference

Narrow = DeepNarrowMLP | DeepNarrowCNN

_FAMILIES: tuple[tuple[type[Narrow], reference.Family], ...] = (
    (DeepNarrowMLP, reference.MLP),
    (DeepNarrowCNN, reference.CNN),
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)
_READ = ("__call__", "forward", "arguments", "spans", "stacked", "in_chunks")
"""What makes a narrow model's output: who replaces one of these, in a subclass or on the instance, has another one."""

CAST_SAMPLES: ContextVar[bool] = ContextVar("CAST_SAMPLES", default=False)
"""Whether floating samples of another dtype than the model's are cast to it: estimators hold their data in float64."""


def check_module(name: str, model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {type(model).__name__}")


def plain(tensor: Tensor) -> Tensor:
    """The tensor without its history, as one that torch.func can work on."""
    return tensor.detach().clone() if tensor.is_inference() else tensor.detach()


# --- Which model it is ------------------------------------------------------------------------------------------------


def _hooked(module: nn.Module) -> str | None:
    """Where hooks of the module's own are, if any."""
    return next((name for name in _HOOKS if getattr(module, name)), None)


def _as_its_class(module: nn.Module, kind: type[nn.Module], names: tuple[str, ...] = ("__call__", "forward")) -> bool:
    """Whether calling the module does what ``kind`` does: nothing is replaced in a subclass or on the instance."""
    return not any(
        name in vars(module) or getattr(type(module), name, None) is not getattr(kind, name, None) for name in names
    )


@dataclass(frozen=True)
class Ours:
    """A narrow model at the end of ``before``, modules without parameters."""

    model: Narrow
    family: reference.Family | None
    """None: something is replaced, parametrized or hooked on the way, so that only calling the module is right."""
    before: tuple[nn.Module, ...]

    def samples(self, x: Tensor) -> Tensor:
        """x after the modules before the model, (N, ...) of its dtype."""
        if not self.before:
            return x
        call = _caller(nn.Sequential(*self.before))
        out = checked_call(lambda: call({}, x), x)
        if not isinstance(out, Tensor) or out.dim() == 0 or out.shape[0] != x.shape[0]:
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(
                f"model must map (N, ...) to (N, out) or (N,), its first modules {tuple(x.shape)} -> {got}"
            )
        if x.shape[0] > 1:
            alone = call({}, x[:1])
            size = out[:1].abs().max().item() if out[:1].numel() else 0.0
            if alone.shape != out[:1].shape or not torch.allclose(
                alone, out[:1], rtol=1e-3, atol=1e-3 * size, equal_nan=True
            ):
                raise ValueError(
                    "model must map each sample on its own, but the modules before the network give the first of "
                    f"{x.shape[0]} samples another value than when it is alone"
                )
        return out

    def places(self) -> list[tuple[Tensor, int, int]]:
        """(parameter, which of the six, its first layer there), every chunk of the hidden layers for itself."""
        found = []
        for span in self.model.spans():
            end = 0 if span.layers.start == 0 else 4 if span.layers.stop == self.model.depth else 2
            first = span.layers.start - 1 if end == 2 else 0
            found += [(span.weight, end, first), (span.bias, end + 1, first)]
        return found

    def stacked(self) -> tuple[Tensor, ...]:
        """The six parameters in the order of the ops, without history."""
        return tuple(plain(param) for param in self.model.stacked())

    def layer_flags(self) -> list[tuple[bool, bool]]:
        """Whether the weight and the bias of each layer, from the first, are trained."""
        return [span.trainable for span in self.model.spans() for _ in span.layers]

    def tied(self) -> bool:
        places = self.places()
        return len({id(param) for param, _, _ in places}) < len(places)

    def trainable_bits(self) -> int | None:
        """As the gram ops take them; None where some of the hidden layers are frozen and some are not."""
        trained: list[set[bool]] = [set() for _ in PARAMETER_NAMES]
        for param, i, _ in self.places():
            trained[i].add(param.requires_grad)
        if any(len(values) > 1 for values in trained):
            return None
        return sum(1 << i for i, values in enumerate(trained) if True in values)


def find(module: nn.Module) -> Ours | None:
    """The narrow model that the module is, or that it ends in; None for any other module.

    Raises: ValueError when the module itself is a narrow model with hooks, which the fused kernels would pass over.
    """
    before: list[nn.Module] = []
    fused = not any(getattr(torch_module, name) for name in _GLOBAL_HOOKS)
    end = module
    while not isinstance(end, Narrow):
        inner = _inside(end)
        if inner is None:
            return None
        fused = fused and _hooked(end) is None
        before += inner[:-1]
        end = inner[-1]
    if hooks := _hooked(end):
        if end is module:
            raise ValueError(
                "model must have no hooks, which its fused kernels would pass over: remove them, or wrap the model in "
                f"nn.Sequential to go through torch.func, got {len(getattr(end, hooks))} in {hooks.strip('_')}"
            )
        fused = False
    kind, family = next(pair for pair in _FAMILIES if isinstance(end, pair[0]))
    fused = fused and _as_its_class(end, kind, _READ)
    fused = fused and not any(parametrize.is_parametrized(part) for part in end.modules())
    return Ours(end, family if fused else None, tuple(before))


def _inside(module: nn.Module) -> list[nn.Module] | None:
    """The modules that a module without parameters of its own calls one after another, or None for another module."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel, torch.optim.swa_utils.AveragedModel)
    if isinstance(module, wrappers):
        return [module.module]
    if compiled(module):
        return [module.get_submodule("_orig_mod")]
    if not isinstance(module, nn.Sequential) or not len(module) or not _as_its_class(module, nn.Sequential):
        return None
    inside = list(module)
    return None if any(next(part.parameters(), None) is not None for part in inside[:-1]) else inside


def compiled(module: nn.Module) -> bool:
    """Whether the module is what torch.compile gives; without importing the compiler."""
    return type(module).__module__ == "torch._dynamo.eval_frame"


# --- Reading without a trace ------------------------------------------------------------------------------------------


@contextmanager
def reading(*models: nn.Module) -> Iterator[None]:
    """Compute in the dtype of the data whatever the global modes, and leave the models and random numbers as they were.

    Autocast, inference mode and reduced precision of float32 products are off inside, gradients are not recorded (a
    transform of torch.func records its own). Attributes, parameters, buffers and modules that a forward pass replaces
    are put back, on an exception too.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(exact({param.device.type for model in models for param in model.parameters()}))
        if any(compiled(part) or part._compiled_call_impl is not None for m in models for part in m.modules()):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        devices = {param.device for model in models for param in model.parameters() if param.device.type == "cuda"}
        stack.enter_context(torch.random.fork_rng(sorted(device.index for device in devices)))
        for model in models:
            stack.enter_context(_unchanged(model))
        yield


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    kept = [
        (part, dict(vars(part)), [(d, dict(d)) for d in (part._parameters, part._buffers, part._modules)])
        for part in model.modules()
    ]
    try:
        yield
    finally:
        for part, attributes, inner in kept:
            for now, before in ((vars(part), attributes), *inner):
                if now.keys() != before.keys() or any(now[key] is not before[key] for key in before):
                    now.clear()
                    now.update(before)


def _random_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def checked_call(call: Callable[[], Any], x: Tensor) -> Any:
    """``call()``.

    Raises: ValueError when it draws random numbers, which ``reading`` then puts back.
    """
    before = _random_states(x.device)
    out = call()
    if not all(torch.equal(a, b) for a, b in zip(before, _random_states(x.device), strict=True)):
        raise ValueError("model must give the same output every time, but it draws random numbers: call model.eval()")
    return out


# --- A module as a function of its parameters -------------------------------------------------------------------------


def _caller(module: nn.Module) -> Callable[[dict[str, Tensor], Tensor], Any]:
    """(values of the trained parameters by name, x) -> module(x) with those values.

    Every slot that holds a tensor is filled by its own name, once: a module that is used twice, and a parameter that
    two modules share, is then one value in all of its places.
    """
    slots: dict[str, str] = {}
    names: dict[int, str] = {}
    frozen: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    for path, part in module.named_modules():
        for values in (part._parameters, part._buffers):
            for own, value in values.items():
                if value is None:
                    continue
                slot = f"{path}.{own}" if path else own
                name = slots[slot] = names.setdefault(id(value), slot)
                if nn.parameter.is_lazy(value):
                    raise ValueError(f"model must be initialised, call it once, got an uninitialised {slot}")
                if not isinstance(value, nn.Parameter):
                    buffers[name] = plain(value)
                elif not value.requires_grad:
                    frozen[name] = plain(value)

    def call(values: dict[str, Tensor], x: Tensor) -> Any:
        # Copies of the buffers and of x, made inside of a transform: a forward may write to them.
        known = {**frozen, **values, **{name: value.clone() for name, value in buffers.items()}}
        given = {slot: known[name] for slot, name in slots.items()}
        return torch.func.functional_call(module, given, (x.clone(),), tie_weights=False)

    return call


@dataclass(frozen=True)
class Function:
    """A model as a function (trained parameters, x (N, ...)) -> (N, out) that torch.func can transform."""

    call: Callable[[dict[str, Tensor], Tensor], Any]
    params: dict[str, Tensor]
    transformable: bool
    """False: derivatives come from backward alone."""

    def __call__(self, params: dict[str, Tensor], x: Tensor) -> Tensor:
        out = self.call(params, x)
        if not isinstance(out, Tensor):
            raise TypeError(f"model must return a torch.Tensor, got {type(out).__name__}")
        if out.dim() == 1 and out.shape[0] == x.shape[0]:
            out = out.unsqueeze(1)
        if out.dim() != 2 or out.shape[0] != x.shape[0]:
            raise ValueError(f"model must map (N, ...) to (N, out) or (N,), got {tuple(x.shape)} -> {tuple(out.shape)}")
        if not out.is_floating_point():
            raise TypeError(f"model must return real floating-point numbers, got {out.dtype}")
        return out

    def outputs(self, x: Tensor) -> Tensor:
        """The output of the first sample, which says what the outputs are.

        Raises: ValueError for a model that draws random numbers.
        """
        return checked_call(lambda: self(self.params, x[:1]), x)


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: plain(param) for name, param in model.named_parameters() if param.requires_grad}


def function_of(model: nn.Module, ours: Ours | None) -> Function:
    """The model as a function; of the samples that ``ours.samples`` gives where the narrow model is used as it is."""
    if ours is None or ours.family is None:
        check_alone(model)
        chunked = any(isinstance(part, Narrow) and part.chunks > 1 for part in model.modules())
        return Function(_caller(model), trained(model), not chunked)
    names = {id(param): name for name, param in model.named_parameters()}
    places = [(names[id(param)], plain(param), i) for param, i, _ in ours.places()]
    narrow, chain = ours.model, mlp_chain if ours.family is reference.MLP else conv_chain

    def call(params: dict[str, Tensor], x: Tensor) -> Tensor:
        six: list[list[Tensor]] = [[] for _ in PARAMETER_NAMES]
        for name, value, i in places:
            six[i].append(params.get(name, value))
        stacked = [torch.cat(values) if len(values) > 1 else values[0] for values in six]
        segment = narrow.segment(x[:, 0].numel())
        return chain(x, *stacked, scale=narrow.scale, form=narrow.form, segment=segment)

    return Function(call, trained(model), True)


def check_alone(model: nn.Module) -> None:
    """Raises: ValueError when a module takes statistics over the batch."""
    for path, part in model.named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and (part.training or part.running_mean is None):
            where = f"{path}, a {type(part).__name__}" if path else type(part).__name__
            raise ValueError(
                f"model must map each sample on its own, but {where}, takes statistics over the batch: call "
                "model.eval(), with running statistics"
            )


# --- Samples ----------------------------------------------------------------------------------------------------------


def check_batch(model: nn.Module, name: str, x: Tensor) -> None:
    """x is a tensor of samples, on the model's device."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dim() == 0:
        raise ValueError(f"{name} must have a dimension of samples, got a scalar")
    devices = {param.device for param in model.parameters()}
    if len(devices) == 1 and x.device not in devices:
        raise ValueError(f"{name} and model must be on the same device, got {x.device} and {devices.pop()}")


def check_samples(model: Narrow, name: str, x: Tensor) -> None:
    """Shape, dtype and device of samples of a narrow model."""
    check_tensor(name, x)
    if x.dim() == 0:
        raise ValueError(f"{name} must have a dimension of samples, got a scalar")
    if isinstance(model, DeepNarrowMLP) and (x.dim() != 2 or x.shape[1] != model.in_features):
        raise ValueError(f"{name} must have shape (N, {model.in_features}), got {tuple(x.shape)}")
    if isinstance(model, DeepNarrowCNN) and (x.dim() != 4 or x.shape[1] != model.in_channels or 0 in x.shape[2:]):
        raise ValueError(f"{name} must have shape (N, {model.in_channels}, H, W), got {tuple(x.shape)}")
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be torch.float32 or torch.float64, got {x.dtype}")
    for other in PARAMETER_NAMES:
        for chunk in model.in_chunks(other):
            check_alike(name, x, other, chunk)


def cast_to(model: nn.Module, x: Tensor) -> Tensor:
    """x in the dtype of the model's parameters, where an estimator has asked for that."""
    if not CAST_SAMPLES.get() or not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    dtypes = {param.dtype for param in model.parameters() if param.is_floating_point()}
    return x.to(dtypes.pop()) if len(dtypes) == 1 else x
