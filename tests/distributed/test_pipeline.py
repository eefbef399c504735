"""Stages of a network: the model bit for bit, in one process and in pipelines over several."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import pipelining

from narrowdeep import DeepNarrowCNN, DeepNarrowMLP
from narrowdeep.distributed import gather, stages
from tests.distributed.ranks import run

MICRO_BATCHES = 4


def mlp(**settings: Any) -> DeepNarrowMLP:
    return DeepNarrowMLP(3, 2, 131, scale=20.0, **settings)


def cnn(**settings: Any) -> DeepNarrowCNN:
    return DeepNarrowCNN(1, 2, 75, scale=20.0, **settings)


SAMPLE = {mlp: (3,), cnn: (1, 4, 3)}


def seeded(make: Any, **settings: Any) -> Any:
    model = make(**settings)
    if not model.first_weight.is_meta:
        model.reset_parameters(torch.Generator().manual_seed(5))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", ["offset", "plain"])
@pytest.mark.parametrize("make", [mlp, cnn])
@pytest.mark.parametrize("checkpoint", ["auto", "none", 7, (3, 2)])
def test_stages_are_the_model(make: Any, form: str, dtype: torch.dtype, checkpoint: Any) -> None:
    model = seeded(make, chunks=7, form=form, dtype=dtype, checkpoint=checkpoint)
    x = torch.rand(5, *SAMPLE[make], dtype=dtype)
    whole = nn.Sequential(*stages(model, 3))
    y = model(x)
    y.square().sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    again = whole(x)
    again.square().sum().backward()
    assert torch.equal(y, again)
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), grads, strict=True))
    with torch.no_grad():
        assert torch.equal(whole(x), y)


@pytest.mark.parametrize("settings", [{"form": "offset"}, {"form": "plain"}, {"form": "plain", "init": "kaiming"}])
@pytest.mark.parametrize("make", [mlp, cnn])
def test_a_stage_without_the_others_draws_what_the_model_would(make: Any, settings: Any) -> None:
    expected = seeded(make, chunks=5, dtype=torch.float64, **settings).state_dict()
    found: dict[str, Tensor] = {}
    for stage in stages(make(chunks=5, dtype=torch.float64, device="meta", **settings), 2):
        stage.to_empty(device="cpu").reset_parameters(torch.Generator().manual_seed(5))
        found |= stage.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("chunks", [1, 5, 6])
def test_a_stage_loads_its_share_of_a_model_of_any_chunks(chunks: int) -> None:
    source = seeded(mlp, chunks=chunks)
    target = mlp(chunks=5)
    cut = stages(target, 2)
    for stage in cut:
        assert str(stage.load_state_dict(source.state_dict())) == "<All keys matched successfully>"
        assert str(stage.load_state_dict(stage.state_dict())) == "<All keys matched successfully>"
    x = torch.rand(4, 3)
    assert torch.equal(target(x), source(x))
    with pytest.raises(RuntimeError, match="scale=7, this one has form='offset' and scale=20"):
        cut[0].load_state_dict(DeepNarrowMLP(3, 2, 131, scale=7.0).state_dict())
    with pytest.raises(RuntimeError, match="hidden_weight.3"):
        cut[1].load_state_dict(cut[0].state_dict())


def test_what_cannot_be_cut() -> None:
    model = mlp(chunks=2)
    with pytest.raises(ValueError, match="n must be at most the model's chunks, 2 .make it with chunks=3., got 3"):
        stages(model, 3)
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        stages(model, 0)
    with pytest.raises(TypeError, match="n must be an int"):
        stages(model, 2.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model must be a DeepNarrowMLP or DeepNarrowCNN, got Linear"):
        stages(nn.Linear(2, 1), 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model must have no budget"):
        stages(mlp(budget="1GiB"), 1)
    tied = mlp(chunks=2, form="plain")
    nn.utils.parametrize.register_parametrization(tied, "first_weight", nn.Identity())
    with pytest.raises(ValueError, match="values of their own, got first_weight"):
        stages(tied, 2)


def test_what_a_stage_refuses() -> None:
    first, last = stages(mlp(chunks=2), 2)
    with pytest.raises(ValueError, match=r"x must have shape \(B, 3\), got \(4, 2\)"):
        first(torch.rand(4, 2))
    with pytest.raises(ValueError, match=r"x must have shape \(B, 3, 6\), got \(3, 6, 4\)"):
        last(torch.rand(3, 6, 4))
    with pytest.raises(ValueError, match=r"x must have shape \(B, 1, H, W\), got \(4, 1, 0, 3\)"):
        stages(cnn(), 1)[0](torch.rand(4, 1, 0, 3))
    with pytest.raises(TypeError, match="same dtype"):
        last(torch.rand(4, 3, 6, dtype=torch.float64))
    with pytest.raises(TypeError, match="leave param_dtype out of MixedPrecisionPolicy"):
        first.bfloat16()(torch.rand(4, 3))


# ---- pipelines ----


def loss(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction - target).square().sum()


def batch(make: Any) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(8, *SAMPLE[make], dtype=torch.float64, generator=generator)
    return x, torch.rand(8, 2, dtype=torch.float64, generator=generator)


def trained(make: Any, chunks: int, steps: int, **settings: Any) -> Any:
    """The model after so many steps on micro-batches, in one process."""
    model = seeded(make, chunks=chunks, dtype=torch.float64, **settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1 * model.ntk_lr, momentum=0.9)
    x, y = batch(make)
    for _ in range(steps):
        for part, target in zip(x.chunk(MICRO_BATCHES), y.chunk(MICRO_BATCHES), strict=True):
            loss(model(part), target).backward()
        for p in model.parameters():
            p.grad.div_(MICRO_BATCHES)  # as torch's schedules do
        optimizer.step()
        optimizer.zero_grad()
    return model


class _Sent:
    """Numbers that this process sends, counted where torch's pipelines send them."""

    def __init__(self) -> None:
        self.numbers = 0

    def __enter__(self) -> _Sent:
        self._isend = dist.isend

        def isend(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.numbers += tensor.numel()
            return self._isend(tensor, *args, **kwargs)

        dist.distributed_c10d.isend = isend
        dist.isend = isend
        return self

    def __exit__(self, *_: object) -> None:
        dist.distributed_c10d.isend = dist.isend = self._isend


def _pipeline(rank: int, name: str, make: Any, count: int, settings: dict[str, Any], steps: int) -> Any:
    """Train with a schedule of torch's; the whole state dict on rank 0, and the numbers sent in the last step."""
    warnings.simplefilter("ignore")
    ranks = dist.get_world_size()
    model = seeded(make, chunks=count, dtype=torch.float64, device="meta", **settings)
    mine = []
    for i in range(rank, count, ranks):
        stage = stages(model, count)[i].to_empty(device="cpu")
        stage.reset_parameters(torch.Generator().manual_seed(5))
        mine.append((i, stage))
    device = torch.device("cpu")
    piped = [pipelining.PipelineStage(stage, i, count, device) for i, stage in mine]
    kind = getattr(pipelining, f"Schedule{name}")
    single = issubclass(kind, pipelining.schedules.PipelineScheduleSingle)
    schedule = kind(piped[0] if single else piped, n_microbatches=MICRO_BATCHES, loss_fn=loss)
    params = [p for _, stage in mine for p in stage.parameters()]
    optimizer = torch.optim.SGD(params, lr=0.1 * model.ntk_lr, momentum=0.9)
    x, y = batch(make)
    for _ in range(steps):
        with _Sent() as sent:
            schedule.step(*((x,) if rank == 0 else ()), target=y if mine[-1][1].is_last else None)
        optimizer.step()
        optimizer.zero_grad()
    total = torch.tensor(sent.numbers)
    dist.all_reduce(total)
    return gather(*(stage for _, stage in mine)), int(total)


CASES = [
    ("GPipe", mlp, 2, 2, {}),
    ("1F1B", mlp, 2, 2, {"form": "plain"}),
    ("Interleaved1F1B", mlp, 4, 2, {}),
    ("GPipe", cnn, 4, 4, {"form": "plain"}),
    ("1F1B", cnn, 4, 4, {}),
    ("Interleaved1F1B", cnn, 4, 2, {"checkpoint": (5, 2)}),
]


@pytest.mark.parametrize(("name", "make", "count", "ranks", "settings"), CASES)
def test_a_pipeline_is_one_process_bit_for_bit(
    name: str, make: Any, count: int, ranks: int, settings: dict[str, Any]
) -> None:
    (state, sent), *others = run(_pipeline, ranks, name, make, count, settings, 20)
    assert all(other == (None, sent) for other in others)
    expected = trained(make, count, 20, **settings)
    assert state.keys() == expected.state_dict().keys()
    assert not torch.equal(state["last_bias"], seeded(make, dtype=torch.float64, **settings).last_bias)
    assert all(torch.equal(value, state[key]) for key, value in expected.state_dict().items())
    whole = seeded(make, dtype=torch.float64, **settings)  # in one chunk
    whole.load_state_dict(state)
    x, _ = batch(make)
    assert torch.equal(whole(x), expected(x))
    # Between two stages go a state and its gradient.
    positions = x[0].numel() // SAMPLE[make][0]
    words = 1 if settings.get("form") == "plain" else 3
    assert sent == (count - 1) * 2 * len(x) * words * expected.width * positions
