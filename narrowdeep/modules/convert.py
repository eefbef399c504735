"""To and from networks of one module a layer: eager ``nn.Sequential``, and state dicts of the thesis's published code.

What has parameters of one network but computes another (hooks, subclasses with a forward of their own, layers that
share weights) is refused by name, not converted to what it seems to be.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_AUTHORS_KEY = re.compile(r"(head|tail|body\.(?:0|[1-9]\d{0,9}))\.(weight|bias)")


def require_exactly(module: Any, kind: type[nn.Module], where: str) -> None:
    """``module`` is a ``kind`` and nothing more. Raises: ValueError naming ``where`` it is."""
    name = f"nn.{kind.__name__}"
    if not isinstance(module, kind):
        raise ValueError(f"{where} must be {name}, got {module}")
    if type(module) is not kind:
        raise ValueError(f"{where} must be {name} itself, got its subclass {type(module).__name__}: {module}")
    if "forward" in vars(module):
        raise ValueError(f"{where} must be {name} with its own forward, got a replaced one: {module}")
    if any(getattr(module, hooks) for hooks in _HOOKS):
        raise ValueError(f"{where} must be {name} without hooks, got {module} with some")


def require_untied(modules: Sequence[nn.Module]) -> None:
    """No two layers share a parameter: they would be trained apart. Raises: ValueError."""
    owners: dict[int, tuple[int, str]] = {}
    for i, module in enumerate(modules):
        for name, param in module.named_parameters():
            first = owners.setdefault(id(param), (i, name))
            if first != (i, name):
                raise ValueError(
                    f"seq must have layers of their own, got one parameter as seq[{2 * first[0]}].{first[1]} and "
                    f"seq[{2 * i}].{name}"
                )


def require_shape(module: nn.Module, shape: tuple[int, ...], where: str) -> tuple[Tensor, Tensor]:
    """Weight and bias of ``module``, of the ``shape`` that its attributes say. Raises: ValueError."""
    weight, bias = module.weight, module.bias
    for name, value, wanted in (("weight", weight, shape), ("bias", bias, shape[:1])):
        if not isinstance(value, Tensor) or tuple(value.shape) != wanted:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else value
            raise ValueError(f"{where} must have a {name} of shape {wanted}, got {got}: {module}")
    return weight, bias  # type: ignore[return-value]


def read_authors(state_dict: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """(W, b) of each layer in a state dict of the published code: head, body.0, body.1, ..., tail.

    Keys may have any prefix in common, and the dict may be what their scripts save, under "model_state_dict".

    Raises: TypeError or ValueError naming what is missing or does not belong.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a dict of tensors, got {type(state_dict).__name__}")
    state_dict = state_dict.get("model_state_dict", state_dict)
    heads = [key for key in state_dict if isinstance(key, str) and re.fullmatch(r"(.*\.)?head\.weight", key)]
    if len(heads) != 1:
        raise ValueError(f"state_dict must have one head.weight, got {heads or 'none'}")
    prefix = heads[0].removesuffix("head.weight")
    tensors: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        if not key.startswith(prefix):
            continue
        name = key.removeprefix(prefix)
        if not _AUTHORS_KEY.fullmatch(name):
            raise ValueError(f"state_dict must have head, body.0, ..., tail, each with weight and bias, got {key}")
        if not isinstance(value, Tensor):
            raise TypeError(f"state_dict must hold tensors, got {type(value).__name__} as {key}")
        tensors[name] = value
    body = max(0, len(tensors) // 2 - 2)
    names = ["head", *(f"body.{i}" for i in range(body)), "tail"]
    layers = []
    for name in names:
        for kind in ("weight", "bias"):
            if f"{name}.{kind}" not in tensors:
                raise ValueError(f"state_dict must have {prefix}{name}.{kind}, got {len(tensors)} keys without it")
        layers.append((tensors.pop(f"{name}.weight"), tensors.pop(f"{name}.bias")))
    if tensors:
        raise ValueError(f"state_dict must have body.0 to body.{body - 1} without a gap, got {prefix}{min(tensors)}")
    return layers


def authors_scale(layers: Sequence[tuple[Tensor, Tensor]], scale: float | None) -> float:
    """C_L of such a network: as given, or what the last bias began at, a whole number in the published code."""
    if scale is not None:
        return scale
    found = round(-float(layers[-1][1].detach().double().mean())) if bool(layers[-1][1].isfinite().all()) else 0
    if found < 1:
        raise ValueError("scale must be given: tail.bias does not say C_L, from which it is -C_L at initialisation")
    return float(found)


def write_authors(layers: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """The way back from ``read_authors``, without a prefix."""
    names = ["head", *(f"body.{i}" for i in range(len(layers) - 2)), "tail"]
    return {
        f"{name}.{kind}": value
        for name, layer in zip(names, layers, strict=True)
        for kind, value in zip(("weight", "bias"), layer, strict=True)
    }


def check_authors_shapes(layers: Sequence[tuple[Tensor, Tensor]], tap: tuple[int, ...], other: str) -> tuple[int, int]:
    """Numbers of inputs and outputs; the width is in + 1 + out. Raises: ValueError naming the key and its shape."""
    head, tail = layers[0][0], layers[-1][0]
    for name, weight in (("head", head), ("tail", tail)):
        if weight.dim() != 2 + len(tap) or tuple(weight.shape[2:]) != tap:
            sizes = ", ".join(("rows", "columns", *map(str, tap)))
            raise ValueError(f"{name}.weight must have shape ({sizes}), got {tuple(weight.shape)}: see {other}")
    inputs, outputs = head.shape[1], tail.shape[0]
    if head.shape[0] != inputs + 1 + outputs:
        raise ValueError(
            f"head.weight must have in + 1 + out = {inputs + 1 + outputs} rows, got {head.shape[0]}: the published "
            "networks have another width for images of more than one channel"
        )
    return inputs, outputs


def check_layer(name: str, given: Any, wanted: Sequence[Tensor]) -> None:
    """A weight and a bias of a floating dtype in the shapes of ``wanted``. Raises: TypeError, ValueError."""
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise TypeError(f"{name} must be a pair of a weight and a bias, got {type(given).__name__}")
    for kind, value, target in zip(("weight", "bias"), given, wanted, strict=True):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} must have a {kind} of a floating dtype, got {got}")
        if value.shape != target.shape:
            raise ValueError(f"{name} must have a {kind} of shape {tuple(target.shape)}, got {tuple(value.shape)}")
