"""What kernels take and in which shares, without a device."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="needs Triton")

from narrowdeep.ops import layered, triton_backward, triton_chain, triton_dispatch, triton_shooting
from narrowdeep.ops.cnn import triton as cnn
from narrowdeep.ops.gram import triton as gram
from narrowdeep.ops.mlp import triton as mlp
from narrowdeep.ops.params import ChainParams, ChainSettings
from narrowdeep.ops.triton_common import Block, choose_block
from tests.gpu.cases import Case, Ops, SecondCase, draw_inputs, draw_second


def test_importing_narrowdeep_imports_no_triton_and_starts_no_device() -> None:
    program = (
        "import sys, torch, narrowdeep\nassert 'triton' not in sys.modules\nassert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_status_reports_the_limits_of_the_code() -> None:
    status = triton_dispatch.triton_status()
    assert status["dtypes"] == ["float32", "float64"]
    for kernel in ("jvp", "backward_jvp"):
        assert f"width <= {mlp.widest(kernel, torch.float64)} in float64" in status["kernels"][f"mlp {kernel}"]
        assert cnn.limits(kernel) in status["kernels"][f"cnn {kernel}"]
    assert (status["reason"] is None) == status["available"]


def test_status_knows_the_limits_of_an_older_device() -> None:
    with mock.patch("narrowdeep.ops.triton_common.capability", return_value=75):
        assert "width <= 32 in float32" in triton_dispatch.triton_status()["kernels"]["mlp forward"]


def test_groups_keep_to_the_limits_of_a_grid() -> None:
    state = torch.empty(2, 1, device="meta")
    assert triton_chain.layers_a_group(state, 2, torch.device("cpu")) == 2 * 65_535


def test_a_group_fits_the_cache_of_its_device() -> None:
    state, device = torch.empty(4, 1024, device="meta"), torch.device("cuda", 0)
    for cache, layers in ((6 << 20, 128), (50 << 20, 1066), (1 << 10, 2)):  # h and G: 32 KiB a layer
        properties = mock.Mock(L2_cache_size=cache)
        with mock.patch("torch.cuda.get_device_properties", return_value=properties):
            assert triton_chain.layers_a_group(state, 2, device) == layers


class Grids:
    """In place of ``launch`` and ``empty``: keeps what would be started, allocates nothing."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []

    def launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **_: Any) -> None:
        self.grids.append(grid)

    def empty(self, like: torch.Tensor, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=like.dtype, device="meta")


@pytest.mark.parametrize("image", [(), (2, 2)])
def test_no_batch_is_beyond_a_grid(image: tuple[int, ...]) -> None:
    """More samples than 65,535 programs of any kernel take (CUDA's limit past a grid's first dimension)."""
    batch, layers, width, taps = 10**9, 3, 3, (3, 3) if image else ()
    state = torch.empty(layers, width, *image, batch, device="meta")
    grads = torch.empty(layers, width, width, *taps, device="meta"), torch.empty(layers, width, device="meta")
    module, add = (cnn, gram.add_filters) if image else (mlp, gram.add_linear)
    grids = Grids()
    with (
        mock.patch.multiple(module, launch=grids.launch, empty=grids.empty),
        mock.patch.multiple(gram, launch=grids.launch, empty=grids.empty),
    ):
        module.sum_weight_gradients(state, state, *grads)
        total = torch.empty(1, batch, 1, dtype=torch.float64, device="meta")
        side = gram.Side(state, state)
        add(total, side, gram.Side(state[..., :1], state[..., :1]), gram.Terms(1, True, True, True, len(taps)))
    assert len(grids.grids) >= 2
    for grid in grids.grids:
        first, second, third = (*grid, 1, 1)[:3]
        assert first < 2**31
        assert max(second, third) <= 65_535


_MLP: Ops = (mlp.mlp_forward, mlp.mlp_backward, mlp.mlp_jvp)
_CNN: Ops = (cnn.cnn_forward, cnn.cnn_backward, cnn.cnn_jvp)


class Work(TorchDispatchMode):
    """In place of ``launch``, too: the kernels that a call starts, ours by name and torch's by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[str] = []
        self.allocated: list[int] = []

    def launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **_: Any) -> None:
        self.kernels.append(kernel.fn.__name__)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"):
            self.allocated.append(result.numel() * result.element_size())
        elif not function.is_view:
            self.kernels.append(name)
        return result


@contextmanager
def counted() -> Iterator[Work]:
    work = Work()
    replaced: dict[str, Any] = {"launch": work.launch}
    with (
        mock.patch.multiple(triton_chain, **replaced),
        mock.patch.multiple(triton_shooting, **replaced),
        mock.patch.multiple(triton_backward, **replaced),
        mock.patch.multiple(mlp, **replaced),
        mock.patch.multiple(cnn, **replaced),
        work,
    ):
        yield work


@pytest.mark.parametrize("offset", [True, False], ids=["offset", "plain"])
@pytest.mark.parametrize("image", [(), (2, 2), (17, 9)], ids=["mlp", "warp", "scratch"])
def test_kernels_of_a_span_between_two_states(image: tuple[int, ...], offset: bool) -> None:
    """A forward is one; a backward recomputes, goes back and sums. Weights are packed before, or a convolution's border
    cleared; nothing else is copied or converted around them."""
    case = Case(1, 1, 22, 4, offset, torch.float32, 5, image=image)
    _, *params = draw_inputs(case)
    hidden: list[Any] = [None, None, *params[2:4], None, None]
    state = torch.rand(3 if offset else 1, 3, *image, 4)
    forward, backward, jvp = _CNN if image else _MLP
    settings = (10.0, offset, 1, 40)
    packed = {(): ["pack"], (2, 2): ["copy_"]}.get(image, [])
    turned = packed if image else []  # a convolution's backward reads filters in another order
    zeros = ["new_zeros"] if image == (17, 9) else []  # a convolution's border
    with counted() as work:
        out, saved = forward(state, *hidden, *settings, 5)
    assert work.kernels == [*packed, *zeros, "chain_forward"]
    with counted() as work:
        backward(out, state, *hidden, saved, *settings, 5, True, True)
    before = [*packed, *zeros, "chain_recompute", *turned, *zeros]
    assert work.kernels == [*before, "chain_backward", "weight_gradient"]
    with counted() as work:
        jvp(state, *hidden, state, None, None, *params[2:4], None, None, *settings)
    assert work.kernels == [*turned, *zeros, "chain_jvp"]


@pytest.mark.parametrize("image", [(), (2, 2)], ids=["mlp", "cnn"])
def test_torch_does_no_more_where_there_are_more_groups(image: tuple[int, ...]) -> None:
    """A forward and a backward from x to the output: three launches a group, and what the first and last layer take."""
    case = Case(2, 1, 22, 4, True, torch.float32, 5, image=image)
    inputs: Any = draw_inputs(case)
    forward, backward, _ = _CNN if image else _MLP
    rest = []
    for room, groups in ((1 << 20, 1), (1, 4)):
        with counted() as work, mock.patch.object(triton_chain, "scratch_bytes", return_value=room):
            out, saved = forward(*inputs, 10.0, True, 1, 0, 5)
            backward(out, *inputs, saved, 10.0, True, 1, 0, 5, False, True)
        ours = [name for name in work.kernels if name.startswith(("chain_", "weight_gradient"))]
        assert len(ours) == 1 + 3 * groups
        rest.append([name for name in work.kernels if name not in ours])
    assert rest[0] == rest[1]
    assert image or len(rest[0]) <= 40


@pytest.mark.parametrize("batch", [128, 8192, 65_536])
def test_launches_of_the_networks_that_kernels_are_for(batch: int) -> None:
    """n = 4, 10,000 layers, segments of 100, forward and backward; shapes alone are needed."""
    n, layers = 4, 9998
    inputs: Any = [
        torch.empty(shape, device="meta") for shape in ((batch, 2), (n, 2), (n,), (layers, n, n), (layers, n))
    ]
    inputs += [torch.empty(1, n, device="meta"), torch.empty(1, device="meta")]
    with counted() as work:
        out, saved = mlp.mlp_forward(*inputs, 1e4, True, 1, 0, 100)
        mlp.mlp_backward(out, *inputs, saved, 1e4, True, 1, 0, 100, True, True)
    prefixes = ("pack", "chain_", "join_", "backward_", "weight_gradient", "add_sums")
    ours = [name for name in work.kernels if name.startswith(prefixes)]
    forward, back = ["chain_forward"], ["chain_recompute", *["chain_whole", "add_sums"] * (4 if batch == 8192 else 13)]
    if batch == 128:  # depth in parallel, six turns at most; two groups
        forward = [*["chain_segments", "join_states"] * 6, "chain_sequential"]
        gradient = ["backward_segments", "join_gradients", "backward_segments"]
        back = ["chain_recompute", *gradient, "weight_gradient"] * 2
    assert ours == ["pack", *forward, "pack", *back]
    assert len(work.kernels) - len(ours) <= 40


def test_a_batch_alone_decides_how_a_backward_runs() -> None:
    """Of a chain; so that spans, checkpoints and depths give the same bits."""
    x, wide = torch.empty(8192, 1, device="meta"), torch.empty(5, 5, 5, device="meta")
    for layers in (1, 2, 1000):
        assert mlp.supported("whole", x, wide[:1, :4, :4].expand(layers, 4, 4))
    assert not mlp.supported("whole", x[1:], wide[:, :4, :4])
    assert not mlp.supported("whole", x, wide)
    assert not cnn.supported("whole", torch.empty(4096, 1, 2, 2, device="meta"), torch.empty(2, 3, 3, 3, 3))


@pytest.mark.parametrize("offset", [True, False], ids=["offset", "plain"])
@pytest.mark.parametrize("image", [(), (2, 2)], ids=["mlp", "cnn"])
def test_kernels_of_a_second_derivative(image: tuple[int, ...], offset: bool) -> None:
    """Forward with tangents; then for a group of segments again, both gradients back, two sums and their sum."""
    case = Case(1, 1, 22, 4, offset, torch.float32, 0, image=image)
    arguments = draw_second(SecondCase(case, first=False, last=False, start=40))
    op = cnn.cnn_backward_jvp if image else mlp.mlp_backward_jvp
    zeros = ["new_zeros"] if image else []
    top = [*zeros, "chain_tangents"]
    group = [*zeros, "chain_tangents", *zeros, "chain_backward_jvp"]
    sums = ["weight_gradient", "weight_gradient", "add_"]
    with counted() as work:
        op(*arguments, True, True)
    assert work.kernels == [*top, *group, *sums]
    with counted() as work:
        op(*arguments, True, False)
    assert work.kernels == [*top, *group]
    with counted() as work, mock.patch.object(triton_chain, "scratch_bytes", return_value=1):
        op(*arguments, True, True)
    assert work.kernels == [*top, *[*group, *sums] * 5]  # segments of 4 layers, one at a time
    hidden = [i for i, a in enumerate(arguments) if isinstance(a, torch.Tensor) and len(a) == 20]
    two: list[Any] = [a[:2] if i in hidden else a for i, a in enumerate(arguments)]
    with counted() as work:
        op(*two, True, True)
    assert work.kernels == [*group, *sums]  # nothing is kept of one segment


_WAITING = {"_local_scalar_dense", "item", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero", "_to_copy"}
"""Operators for which the host waits, or which copy between host and device."""


@pytest.mark.parametrize("segment", [0, 1, 4])
@pytest.mark.parametrize("image", [(), (2, 2)], ids=["mlp", "cnn"])
def test_a_second_call_waits_for_nothing(image: tuple[int, ...], segment: int) -> None:
    """What a CUDA graph can capture: kernels, and torch's allocations, the same in every call of one shape."""
    case = Case(2, 1, 22, 4, True, torch.float32, segment, image=image)
    inputs: list[Any] = list(draw_inputs(case))
    forward, backward, jvp = _CNN if image else _MLP
    second = cnn.cnn_backward_jvp if image else mlp.mlp_backward_jvp
    settings = (10.0, True, 1, 0)
    calls = []
    for _ in range(2):
        with counted() as work, mock.patch("torch.cuda.synchronize") as synchronize:
            out, saved = forward(*inputs, *settings, segment)
            backward(out, *inputs, saved, *settings, segment, True, True)
            jvp(*inputs, *inputs, *settings)
            second(out, None, *inputs, *inputs, *settings, True, True)
        assert not _WAITING & set(work.kernels)
        synchronize.assert_not_called()
        calls.append((work.kernels, work.allocated))
    assert calls[0] == calls[1]


@pytest.mark.parametrize(
    ("width", "dtype", "ahead"),
    [(4, "float32", True), (22, "float32", True), (23, "float32", False), (16, "float64", True), (80, "float32", 0)],
)
def test_weights_are_asked_for_ahead_where_they_fit(width: int, dtype: str, ahead: bool) -> None:
    """32 layers in 64 KiB: n = 80 would ask a cache of 256 KiB for 819 KB."""
    weight = torch.empty(1, width, width, dtype=getattr(torch, dtype), device="meta")
    assert mlp.FAMILY.constants("forward", torch.empty(1, 1), weight)["PREFETCH"] == ahead


@pytest.mark.parametrize("segment", [1, 2, 3])
@pytest.mark.parametrize("image", [(), (3, 2), (17, 9)])
def test_workspace_is_what_a_backward_allocates(image: tuple[int, ...], segment: int) -> None:
    """Where most is needed: h and g of a group of layers, packed weights, a convolution's padded states."""
    case = Case(1, 1, 9, 5, True, torch.float32, segment, image=image)
    inputs: Any = draw_inputs(case)
    x, params = inputs[0], inputs[1:]
    family = cnn.FAMILY if image else mlp.FAMILY
    most = 0
    packed: dict[int, torch.Tensor] = {}

    def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **_: Any) -> None:
        nonlocal most
        tensors = dict(zip(kernel.arg_names, args, strict=False))
        given = [t.untyped_storage().data_ptr() for t in (saved, *params)]
        if kernel.fn.__name__ not in ("chain_recompute", "chain_backward"):
            return
        packed[tensors["weight_ptr"].data_ptr()] = tensors["weight_ptr"]  # kept to the end
        held = [*packed.values(), *(tensors.get(name) for name in ("h_ptr", "g_ptr", "scratch_ptr"))]
        fresh = [t for t in held if t is not None and t.untyped_storage().data_ptr() not in given]
        most = max(most, sum(t.numel() * t.element_size() for t in fresh))

    settings = ChainSettings(10.0, True, 1, 0)
    arguments: Any = (*inputs, *settings, segment)
    saved = layered.forward(family.layer, *arguments)[1]
    with mock.patch.multiple(triton_chain, launch=launch, scratch_bytes=lambda device: 1000):
        step = triton_chain.layers_a_group(saved[0, 0], segment, x.device)
        walk = triton_chain.Descent(family, x, ChainParams.of(params), saved, settings, segment, step)
        list(walk.groups(torch.ones(5, 1, dtype=torch.float32), True))
        assert triton_backward.workspace(family, x, params[2], True, segment) == most


@pytest.mark.parametrize("segment", [1, 2, 30])
def test_workspace_of_a_backward_in_one_launch(segment: int) -> None:
    """Records, a segment's states and the sums of all programs, in several launches."""
    inputs: Any = draw_inputs(Case(1, 1, 9, 70, True, torch.float32, segment))
    given = {t.untyped_storage().data_ptr() for t in inputs}
    seen: dict[int, int] = {}
    most = 0

    def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **_: Any) -> None:
        nonlocal most
        named = dict(zip(kernel.arg_names, args, strict=False))
        for name in ("packed_ptr", "h_ptr"):
            if name in named and named[name].untyped_storage().data_ptr() not in given:
                storage = named[name].untyped_storage()
                seen[storage.data_ptr()] = storage.nbytes()
        sums = named.get("partial_ptr")
        most = max(most, sum(seen.values()) + (0 if sums is None else sums.numel() * sums.element_size()))

    saved = layered.forward(mlp.LINEAR, *inputs, 10.0, True, 1, 0, segment)[1]
    given.add(saved.untyped_storage().data_ptr())
    replaced: dict[str, Any] = {"launch": launch, "scratch_bytes": lambda device: 500}
    with (
        mock.patch.object(triton_chain, "launch", launch),
        mock.patch.multiple(triton_backward, **replaced),
        mock.patch.object(mlp, "_WHOLE_BATCH", 1),
    ):
        mlp.mlp_backward(torch.ones(70, 1), *inputs, saved, 10.0, True, 1, 0, segment, True, True)
        assert triton_backward.workspace(mlp.FAMILY, inputs[0], inputs[3], True, segment) == most


@pytest.mark.parametrize(
    ("samples", "expected"), [(128, 32), (132 * 4 * 128 - 1, 32), (132 * 4 * 128, 512), (10**7, 512)]
)
def test_small_batches_take_small_programs(samples: int, expected: int) -> None:
    chosen: list[Block] = []
    choose_block(("key",), [Block(512, 4), Block(32, 1)], samples, torch.device("cpu"), chosen.append)
    assert [block.samples for block in chosen] == [expected]


@pytest.mark.parametrize("kernel", triton_dispatch.CHAIN_OPS)
def test_what_kernels_take(kernel: str) -> None:
    x, weight = torch.empty(3, 2), torch.empty(1, 5, 5)
    assert mlp.supported(kernel, x, weight)
    assert not mlp.supported(kernel, x[:0], weight)
    assert not mlp.supported(kernel, x, weight[:0])
    widest = mlp.widest(kernel, torch.float32)
    assert mlp.supported(kernel, x, torch.empty(1, widest, widest))
    assert not mlp.supported(kernel, x, torch.empty(1, widest + 1, widest + 1))
    image = torch.empty(2, 1, 7, 7)
    assert cnn.supported(kernel, image, torch.empty(1, 3, 3, 3, 3))
    assert not cnn.supported(kernel, image, torch.empty(1, 3, 3, 7, 7))
    assert not cnn.supported(kernel, image, torch.empty(1, 17, 17, 3, 3))
    assert not cnn.supported(kernel, torch.empty(2, 1, 33, 33), torch.empty(1, 3, 3, 3, 3))
