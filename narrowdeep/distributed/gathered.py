"""What all ranks have of a model, in one place."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from narrowdeep.distributed.stage import Stage


def full(tensor: Any) -> Tensor:
    """A plain tensor; what FSDP2 shards is gathered on every rank, which all have to ask for it."""
    value = tensor.detach() if isinstance(tensor, Tensor) else tensor
    return value.full_tensor() if hasattr(value, "full_tensor") else value


@torch.no_grad()
def gather(*modules: nn.Module, dst: int = 0, group: Any = None) -> dict[str, Tensor] | None:
    """The state dict of the whole model, from the stages that all ranks have.

    A model of any number of chunks loads it: ``model.load_state_dict(gather(stage))``. To be called on every rank of
    the group; a tensor that several have comes from the lowest one.

    Arguments:
        modules: stages of this rank, or modules that hold them, sharded by ``fully_shard`` or not.
        dst: rank of the group that receives.

    Returns: name -> tensor, on the CPU, on rank ``dst``; None on the others.

    Raises: TypeError where a module holds no stage.

    Examples:
        >>> from narrowdeep import DeepNarrowMLP
        >>> from narrowdeep.distributed import gather, stages
        >>> model = DeepNarrowMLP(2, 1, depth=100, chunks=4)
        >>> sorted(gather(*stages(model, 2)).keys() - model.state_dict().keys())  # in one process: all of it
        []
    """
    own: dict[str, Tensor] = {}
    for module in modules:
        found = [part for part in module.modules() if isinstance(part, Stage)] if isinstance(module, nn.Module) else []
        if not found:
            raise TypeError(f"modules must be stages, or hold some, got {type(module).__name__}")
        for stage in found:
            own |= {name: full(tensor) for name, tensor in stage.state_dict().items()}
    if not (dist.is_available() and dist.is_initialized()):
        return {name: tensor.cpu() for name, tensor in own.items()}
    rank = dist.get_rank(group)
    told: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(told, {name: (tensor.shape, tensor.dtype) for name, tensor in own.items()}, group=group)
    owners = {name: owner for owner in reversed(range(len(told))) for name in told[owner]}
    result: dict[str, Tensor] = {}
    for name, owner in owners.items():
        if rank == dst == owner:
            result[name] = own[name].cpu()
        elif rank == owner:
            dist.send(own[name].contiguous(), group_dst=dst, group=group)
        elif rank == dst:
            shape, dtype = told[owner][name]
            received = torch.empty(shape, dtype=dtype, device=_device(own, name))
            dist.recv(received, group_src=owner, group=group)
            result[name] = received.cpu()
    return result if rank == dst else None


def _device(own: dict[str, Tensor], name: str) -> torch.device:
    """Where a tensor is received: where those of its kind are; form and scale are on the CPU everywhere."""
    if name.endswith("_extra_state"):
        return torch.device("cpu")
    return next(tensor.device for key, tensor in own.items() if not key.endswith("_extra_state"))
