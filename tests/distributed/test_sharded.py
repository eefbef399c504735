"""DistributedDataParallel, FSDP2 and checkpoints of torch.distributed, as a user takes them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from narrowdeep import DeepNarrowCNN, DeepNarrowMLP
from narrowdeep.distributed import gather, stages
from narrowdeep.distributed.gathered import full
from narrowdeep.optim import FusedSGD
from narrowdeep.training import load_model, save_model
from tests.distributed.ranks import run


def network(kind: str = "mlp", **settings: Any) -> Any:
    sizes = {"mlp": (2, 1, 19), "cnn": (1, 2, 12), "two layers": (2, 1, 2)}[kind]
    make: Any = DeepNarrowCNN if kind == "cnn" else DeepNarrowMLP
    model = make(*sizes, scale=20.0, dtype=torch.float64, **settings)
    model.reset_parameters(torch.Generator().manual_seed(7))
    return model


def batches(kind: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(8)
    shape = (1, 5, 4) if kind == "cnn" else (2,)
    return [torch.rand(8, *shape, dtype=torch.float64, generator=generator) for _ in range(20)]


def train(module: nn.Module, optimizer: torch.optim.Optimizer, kind: str, rows: slice) -> None:
    for x in batches(kind):
        (module(x[rows]) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def sgd(module: nn.Module, model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), 0.1 * model.ntk_lr, 0.9)


def _trained(rank: int, way: str, kind: str, form: str) -> Any:
    """The whole state dict after 20 steps, each on this rank's half of a batch."""
    warnings.simplefilter("ignore")
    model = module = network(kind, form=form, chunks=CHUNKS.get(way, 4))
    if way == "ddp":
        module = nn.parallel.DistributedDataParallel(model)
    elif way.startswith("stages"):
        module = nn.Sequential(*stages(model, 3))
        for stage in module:
            fully_shard(stage)
        fully_shard(module)
    else:
        fully_shard(module)
    rate = 0.1 * model.ntk_lr
    optimizer = FusedSGD(list(module.parameters()), rate, 0.9) if "fused" in way else sgd(module, model)
    train(module, optimizer, kind, slice(4 * rank, 4 * rank + 4))
    if way.startswith("stages"):
        assert all(hasattr(p, "full_tensor") for p in module.parameters())
        return gather(module)
    return {name: full(value) for name, value in model.state_dict().items()}


CHUNKS = {"ddp": 1, "whole": 1}
WAYS = [
    ("ddp", "mlp", "offset"),
    ("ddp", "two layers", "plain"),
    ("whole", "cnn", "offset"),
    ("chunks", "mlp", "plain"),
    ("stages", "mlp", "offset"),
    ("stages, fused", "cnn", "plain"),
    ("chunks, fused", "mlp", "offset"),
]


@pytest.mark.parametrize(("way", "kind", "form"), WAYS)
def test_two_ranks_take_the_steps_of_one_process(way: str, kind: str, form: str) -> None:
    expected = network(kind, form=form, chunks=CHUNKS.get(way, 4))
    start = expected.last_bias.detach().clone()
    train(expected, sgd(expected, expected), kind, slice(None))
    found, other = run(_trained, 2, way, kind, form)
    assert not torch.equal(expected.last_bias, start)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)
        assert other is None or torch.equal(other[name], found[name])


# ---- checkpoints ----


def _saved(rank: int, folder: str) -> None:
    model = fully_shard(network(chunks=4))
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=f"{folder}/sharded")
    stage = stages(network(chunks=4), 2)[rank]
    dcp.save({"model": stage.state_dict()}, checkpoint_id=f"{folder}/stages")
    save_model(fully_shard(network("cnn")), f"{folder}/cnn")
    save_model(model, f"{folder}/mlp")
    dist.barrier()


def _loaded(rank: int, folder: str) -> Any:
    """Both checkpoints, each into a network that is sharded and into one in as many stages as there are ranks."""
    ranks = dist.get_world_size()
    found: list[Any] = []
    for name in ("sharded", "stages"):
        model = DeepNarrowMLP(2, 1, 19, scale=20.0, dtype=torch.float64, chunks=4)
        fully_shard(model)
        state = {"model": get_model_state_dict(model)}
        dcp.load(state, checkpoint_id=f"{folder}/{name}")
        set_model_state_dict(model, state["model"])
        found.append({key: full(value) for key, value in model.state_dict().items()})
        blank = DeepNarrowMLP(2, 1, 19, scale=20.0, dtype=torch.float64, chunks=4, device="meta")
        stage = stages(blank, ranks)[rank].to_empty(device="cpu")
        state = {"model": stage.state_dict()}
        dcp.load(state, checkpoint_id=f"{folder}/{name}")
        stage.load_state_dict(state["model"])
        found.append(gather(stage))
    return found


def test_a_checkpoint_of_two_ranks_loads_at_one_and_at_four(tmp_path: Path) -> None:
    run(_saved, 2, str(tmp_path))
    expected = network(chunks=4).state_dict()
    for ranks in (1, 4):
        for state in run(_loaded, ranks, str(tmp_path))[0]:
            assert state.keys() == expected.keys()
            assert all(torch.equal(state[name], value) for name, value in expected.items())
    for name, model in (("cnn", network("cnn")), ("mlp", network(chunks=4))):
        again = load_model(tmp_path / name)
        assert again.chunks == model.chunks
        assert all(torch.equal(p, q) for p, q in zip(again.parameters(), model.parameters(), strict=True))


def _mixed(rank: int) -> Any:
    found = []
    for policy in (MixedPrecisionPolicy(torch.bfloat16), MixedPrecisionPolicy(reduce_dtype=torch.bfloat16)):
        whole = fully_shard(network(chunks=2), mp_policy=policy)
        staged = nn.Sequential(*stages(network(chunks=2), 2))
        for stage in staged:
            fully_shard(stage, mp_policy=policy)
        for module in (whole, staged):
            try:
                module(torch.rand(4, 2, dtype=torch.float64)).sum().backward()
                grad: Any = next(module.parameters()).grad
                found.append(grad.to_local().dtype)
            except TypeError as error:  # noqa: PERF203 (four modules)
                found.append(str(error))
    return found


def test_mixed_precision_says_what_it_may_be() -> None:
    for whole, staged, *reduced in run(_mixed, 2):
        for message in (whole, staged):
            assert "must be of torch.float32 or torch.float64, got torch.bfloat16" in message
            assert "leave param_dtype out of MixedPrecisionPolicy; reduce_dtype may be lower" in message
        assert reduced == [torch.float64, torch.float64]
