"""What a model keeps in its parameters and in a state dict, and what else may stand in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

_FORMS = ("plain", "offset")
_KINDS = {
    "_WeightNorm": "weight_norm",
    "WeightNorm": "weight_norm",
    "_SpectralNorm": "spectral_norm",
    "SpectralNorm": "spectral_norm",
    "_Orthogonal": "orthogonal",
}


def borders(layers: int, chunks: int) -> list[int]:
    """Where ``layers`` hidden layers are divided: chunk i holds layers [borders[i], borders[i + 1])."""
    return [layers * i // chunks for i in range(chunks + 1)]


# ---- form and scale, in a state dict beside the parameters ----


def pack_identity(form: str, scale: float) -> Tensor:
    """Form and scale as numbers: a tensor is what every format of a state dict can hold (safetensors, DCP)."""
    return torch.tensor([float(_FORMS.index(form)), scale], dtype=torch.float64, device="cpu")


def check_identity(packed: Any, form: str, scale: float) -> None:
    """Raise RuntimeError, as ``load_state_dict`` does, if ``packed`` is of a model of another form or scale."""
    if isinstance(packed, Tensor) and packed.is_meta:
        return  # no values: nothing is loaded from it
    if not isinstance(packed, Tensor) or packed.shape != (2,):
        got = f"shape {tuple(packed.shape)}" if isinstance(packed, Tensor) else type(packed).__name__
        raise RuntimeError(f"_extra_state must hold form and scale as a tensor of shape (2,), got {got}")
    number, found_scale = packed.tolist()
    found = next((name for i, name in enumerate(_FORMS) if abs(number - i) < 0.25), f"of number {number:g}")
    # Averages of states and casts of them to float32 round the scale; a millionth of it changes no digit of a result.
    if found != form or not abs(found_scale - scale) <= 1e-6 * scale:
        raise RuntimeError(
            f"the state dict is of a model with form={found!r} and scale={found_scale:g}, this one has form={form!r} "
            f"and scale={scale:g}: the same parameters would be another network. Load it into a model of that form and "
            "scale, and convert with load_layers(model.layers(dtype=torch.float64))"
        )


# ---- a state dict of any number of chunks ----


@torch.no_grad()
def rechunk(state_dict: MutableMapping[str, Any], whole: str, chunks: int, *, own: bool) -> None:
    """Divide the parameter ``whole`` (its key) of ``state_dict``, in place, as a model of ``chunks`` chunks has it.

    What is not a complete parameter stays as it is, for torch to name what is missing. ``own``: the chunks share no
    memory with what they were (for ``assign=True``).
    """
    found = [key for key in state_dict if key == whole or key.startswith(f"{whole}.")]
    keys = found if found == [whole] else [f"{whole}.{i}" for i in range(len(found))]
    if len(found) in (0, chunks) or set(found) != set(keys):
        return
    pieces = [state_dict[key] for key in keys]
    if not all(isinstance(p, Tensor) and p.dim() and p.shape[1:] == pieces[0].shape[1:] for p in pieces):
        return
    stacked = torch.cat(pieces) if len(pieces) > 1 else pieces[0].detach()
    for key in found:
        del state_dict[key]
    if chunks == 1:
        state_dict[whole] = stacked
        return
    for i, (begin, end) in enumerate(pairwise(borders(stacked.shape[0], chunks))):
        state_dict[f"{whole}.{i}"] = stacked[begin:end].clone() if own else stacked[begin:end]


# ---- parametrizations and pruning ----


def _modules(model: nn.Module, names: tuple[str, ...]) -> Iterator[tuple[str, nn.Module]]:
    yield "", model
    yield from ((f"{name}.", model._modules[name]) for name in names if model._modules.get(name) is not None)  # type: ignore[misc]


def changes(model: nn.Module, names: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(parameter, what computes it from something else): torch's parametrizations, their older likes, pruning."""
    for prefix, module in _modules(model, names):
        parametrized: Any = module._modules.get("parametrizations")
        if parametrized is not None:
            for name, steps in parametrized.items():
                yield from ((prefix + name, _KINDS.get(type(step).__name__, type(step).__name__)) for step in steps)
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, (WeightNorm, SpectralNorm)):
                yield prefix + hook.name, _KINDS[type(hook).__name__]
            elif isinstance(hook, prune.BasePruningMethod):
                yield prefix + hook._tensor_name, "pruning"


def refuse_changes(model: nn.Module, names: tuple[str, ...], form: str, *, images: bool) -> None:
    """Raise NotImplementedError where a weight is normed or pruned, but what is stored is not that weight.

    In offset form the parameters hold W - E, and those of the hidden layers are stacked: a norm of what is stored is no
    norm of a layer's W (at initialisation it divides by 0), and a pruned entry is one of the identity. What acts on a
    difference as on the weight itself, such as adding a product of low rank, is left alone.
    """
    for name, kind in changes(model, names):
        if kind not in (*_KINDS.values(), "pruning"):
            continue
        if form == "offset":
            raise NotImplementedError(
                f"{name} cannot have {kind} in offset form, where it holds W - E and not the weight W: take "
                "form='plain', or the layers of to_sequential()"
            )
        per_layer = kind == "pruning" or (kind == "orthogonal" and not images)
        if name.startswith("hidden") and not per_layer:
            raise NotImplementedError(
                f"{name} cannot have {kind}: the layers are stacked in it, and it would take them for one weight: take "
                "the layers of to_sequential()"
            )


def keeping_layout(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The conversion ``fn`` of a tensor, which sees no more than two dimensions of it.

    ``to(memory_format=torch.channels_last)`` is for images and refuses the five dimensions of stacked filters; this way
    no conversion changes their layout, which is the engine's.
    """

    def convert(tensor: Tensor) -> Tensor:
        if tensor.dim() < 3:
            return fn(tensor)
        flat = tensor.flatten(1)
        converted = fn(flat)
        return tensor if converted is flat and tensor.is_contiguous() else converted.reshape(tensor.shape)

    return convert


def sizes_differ(state_dict: MutableMapping[str, Any], prefix: str, own: dict[str, nn.Parameter]) -> bool:
    """Whether a tensor of a state dict has another shape than the parameter of its name."""
    found = [(state_dict.get(prefix + name), param) for name, param in own.items()]
    return any(isinstance(value, Tensor) and value.shape != param.shape for value, param in found)
