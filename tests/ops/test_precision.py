"""Products that torch computes run in full precision whatever the process, or autocast, has asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from narrowdeep.ops import layered, triton_dispatch
from narrowdeep.ops.cnn.layered import CONVOLUTION
from narrowdeep.ops.mlp.layered import LINEAR
from narrowdeep.ops.precision import _PARENTS_FIRST, at_full_precision, full_precision
from tests.gpu.cases import Case, draw, draw_inputs

CPU = torch.device("cpu")
BACKENDS: Any = torch.backends  # whose stubs lack the newer settings
ALLOW_TF32: dict[str, Callable[[], None]] = {
    "untouched": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": lambda: setattr(BACKENDS.cuda.matmul, "allow_tf32", True),
    "matmul": lambda: setattr(BACKENDS.cuda.matmul, "fp32_precision", "tf32"),
    "conv": lambda: setattr(BACKENDS.cudnn.conv, "fp32_precision", "tf32"),
    "everything": lambda: setattr(BACKENDS, "fp32_precision", "tf32"),
    "mkldnn": lambda: setattr(BACKENDS.mkldnn.matmul, "fp32_precision", "bf16"),
    "benchmark": lambda: setattr(BACKENDS.cudnn, "benchmark", True),
}


def settings() -> dict[str, Any]:
    """What decides how torch computes a product on a GPU or a CPU."""
    try:
        matmul = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch's, where the older and the newer settings contradict each other
        matmul = "contradictory"
    return {
        "matmul": matmul,
        "deterministic": BACKENDS.cudnn.deterministic,
        "benchmark": BACKENDS.cudnn.benchmark,
        "autocast": torch.is_autocast_enabled("cpu"),
    } | {f"{backend} {op}": torch._C._get_fp32_precision_getter(backend, op) for backend, op in _PARENTS_FIRST}


EXACT = {
    "matmul": "highest",
    "deterministic": True,
    "benchmark": False,
    "autocast": False,
    "cuda matmul": "ieee",
    "cuda conv": "ieee",
    "mkldnn matmul": "ieee",
    "mkldnn conv": "ieee",
}


@pytest.fixture(params=ALLOW_TF32)
def _user(request: pytest.FixtureRequest) -> Iterator[None]:
    """Settings of a user who cares for speed; afterwards those of a fresh process."""
    ALLOW_TF32[request.param]()
    yield
    BACKENDS.cudnn.benchmark = False
    BACKENDS.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    BACKENDS.cudnn.conv.fp32_precision = "tf32"  # torch's default
    for backend in (BACKENDS.cuda, BACKENDS.mkldnn):
        backend.matmul.fp32_precision = "none"


def recorded(layer: layered.Layer, seen: list[dict[str, Any]]) -> layered.Layer:
    """``layer`` with the settings in force at each of its products."""

    def wrap(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Tensor) -> Tensor:
            seen.append({name: value for name, value in settings().items() if name in EXACT})
            return product(*args)

        return call

    return layered.Layer(wrap(layer.apply), wrap(layer.transpose), wrap(layer.weight_grad))


def chain(layer: layered.Layer, image: tuple[int, ...]) -> list[Tensor]:
    """Results of every entry point that multiplies."""
    case = Case(2, 1, 6, 3, True, torch.float32, 2, image=image)
    inputs: Any = draw_inputs(case)
    settings = (10.0, True, 1, 0)
    out, saved = layered.forward(layer, *inputs, *settings, 2)
    grad = draw(*out.shape, dtype=torch.float32, seed=8)
    gradients = layered.backward(layer, grad, *inputs, saved, *settings, 2, True, True)
    tangents: Any = [draw(*t.shape, dtype=torch.float32, seed=20 + i) for i, t in enumerate(inputs)]
    return [out, *gradients, layered.jvp(layer, *inputs, *tangents, *settings)]


@pytest.mark.usefixtures("_user")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("layer", "image"), [(LINEAR, ()), (CONVOLUTION, (3, 2))], ids=["mlp", "cnn"])
def test_products_of_a_layer(layer: layered.Layer, image: tuple[int, ...], autocast: bool) -> None:
    seen: list[dict[str, Any]] = []
    before = settings()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        chain(recorded(layer, seen), image)
    assert len(seen) > 20
    assert all(found == EXACT for found in seen)
    assert settings() == before


@pytest.mark.parametrize(("layer", "image"), [(LINEAR, ()), (CONVOLUTION, (3, 2))], ids=["mlp", "cnn"])
def test_autocast_changes_no_bit(layer: layered.Layer, image: tuple[int, ...]) -> None:
    expected = chain(layer, image)
    with torch.autocast("cpu", torch.bfloat16):
        results = chain(layer, image)
    for a, b in zip(results, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("_user")
def test_whatever_a_cuda_op_runs() -> None:
    """The one place through which CUDA tensors come, with kernels or without."""
    seen: list[dict[str, Any]] = []

    class Library:
        def impl(self, name: str, function: Callable[..., Any], key: str) -> None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(triton_dispatch, "unusable", lambda device: "a test")
                patch.setattr(triton_dispatch, "_warn", lambda reason: None)
                function(torch.zeros(2))

    library: Any = Library()
    triton_dispatch.register(library, "mlp_forward", "no module", lambda x: seen.append(settings()))
    assert [{name: found[name] for name in EXACT} for found in seen] == [EXACT]


@pytest.mark.usefixtures("_user")
def test_a_setting_that_follows_its_parent_still_does() -> None:
    BACKENDS.fp32_precision = "tf32"
    following = [name for name in _PARENTS_FIRST if _follows(name)]
    with full_precision(CPU):
        pass
    assert [name for name in _PARENTS_FIRST if _follows(name)] == following


def _follows(name: tuple[str, str]) -> bool:
    get = torch._C._get_fp32_precision_getter
    found = []
    before = BACKENDS.fp32_precision
    for value in ("ieee", "tf32"):
        BACKENDS.fp32_precision = value
        found.append(get(*name))
    BACKENDS.fp32_precision = before
    return found == ["ieee", "tf32"]


def test_settings_are_put_back_after_an_error() -> None:
    before = settings()

    @at_full_precision
    def fails(x: Tensor) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fails(torch.zeros(1))
    assert settings() == before
