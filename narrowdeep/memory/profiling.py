"""The memory one training step really takes, beside its plan and beside eager layers."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from narrowdeep import files
from narrowdeep.functional import check_tensor
from narrowdeep.memory.planning import MemoryPlan, format_bytes, plan

if TYPE_CHECKING:
    from narrowdeep.modules import DeepNarrowCNN, DeepNarrowMLP


@dataclass(frozen=True)
class MemoryProfile:
    """Peaks of one forward and backward, in bytes, parameters and input included. ``str()`` is a table.

    Examples:
        >>> from narrowdeep import DeepNarrowMLP
        >>> from narrowdeep.memory import MemoryProfile, plan
        >>> planned = plan(DeepNarrowMLP(2, 1, depth=200), batch_size=16)
        >>> MemoryProfile(depth=200, plan=planned, measured=300_000, eager=None).to_dict()["measured_bytes"]
        300000
    """

    depth: int
    plan: MemoryPlan
    measured: int
    """Of the model: the process's on the CPU, the allocator's on CUDA, less what was there before the model."""
    eager: int | None
    """Of the same layers as eager modules; None when not measured because it might not fit."""

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, lists and text, for JSON."""
        return {
            "depth": self.depth,
            "measured_bytes": self.measured,
            "eager_bytes": self.eager,
            "plan": self.plan.to_dict(),
        }

    def __str__(self) -> str:
        return table([self])


def profile(model: DeepNarrowMLP | DeepNarrowCNN, x: Tensor, *, eager: bool = True) -> MemoryProfile:
    """Measure the peak memory of ``model(x).sum().backward()``; no optimizer steps.

    Nothing is left behind: it runs on parameters and an input of its own that share the memory of these, so that no
    gradient is stored, no hook of theirs runs and an optimizer that steps inside backward does not.

    Arguments:
        model: a DeepNarrowMLP or DeepNarrowCNN, on the CPU or on CUDA.
        x: a batch, (B, in) or (B, C, H, W).
        eager: also measure ``model.to_sequential()`` if it should fit in half of the free memory.

    Returns: a MemoryProfile. The CPU's peak is the process's, so other threads must be idle; it is exact to about a
        megabyte. Eager layers always count as a fresh copy of the parameters, as if the model were not there.

    Raises: TypeError and ValueError as ``plan`` does; NotImplementedError where the system keeps no peak (it needs
        Linux on the CPU).

    Examples:
        >>> import torch
        >>> from narrowdeep import DeepNarrowMLP
        >>> from narrowdeep.memory import profile
        >>> found = profile(DeepNarrowMLP(2, 1, depth=1000), torch.rand(128, 2), eager=False)
        >>> found.measured < 10 * found.plan.total
        True
    """
    if not hasattr(model, "identity_part"):
        raise TypeError(f"model must be a DeepNarrowMLP or a DeepNarrowCNN, got {type(model).__name__}")
    if isinstance(x, Tensor):
        check_tensor("x", x)
    if not isinstance(x, Tensor) or x.dim() < 2:
        raise ValueError(f"x must be a tensor with its batch in dimension 0, got {_describe(x)}")
    sample = f"{model.first_weight.shape[1]}{', H, W' if model.first_weight.dim() == 4 else ''}"
    if x.dim() != model.first_weight.dim() or x.shape[1] != model.first_weight.shape[1] or x.numel() == 0:
        raise ValueError(f"x must have shape (B, {sample}), B at least 1, got {tuple(x.shape)}")
    planned = plan(model, batch_size=x.shape[0], input_shape=tuple(x.shape[1:]))
    measured = _step_peak(model, x)
    eager_peak = None
    if eager and _eager_estimate(model, x) < _free_bytes(x.device) // 2:
        eager_peak = _step_peak(model.to_sequential(), x)
    return MemoryProfile(model.depth, planned, measured, eager_peak)


def _describe(x: Any) -> str:
    return f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def _bytes_of(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _step_peak(module: nn.Module, x: Tensor) -> int:
    """Peak bytes of a forward and a backward, with the parameters and x."""
    params = {name: p.detach().requires_grad_(p.requires_grad) for name, p in module.named_parameters()}
    x = x.detach().requires_grad_(x.requires_grad)

    def step(x: Tensor) -> None:
        with torch.enable_grad():
            out = functional_call(module, params, (x,))
            if out.requires_grad:
                out.sum().backward()
        for p in (x, *params.values()):
            p.grad = None

    step(x[:1].detach())  # thread pools, library handles and code that is loaded on first use
    growth = _peak_growth(lambda: step(x), x.device)
    return growth + _bytes_of([*params.values(), x])


def _peak_growth(run: Callable[[], None], device: torch.device) -> int:
    """Bytes by which memory in use grows at the most while ``run`` runs."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if sys.platform != "linux":
        raise NotImplementedError(f"the peak memory of a process can be reset on Linux only, this is {sys.platform}")
    with _no_reuse_of_freed_memory():
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak resident set size
        before = _status("VmRSS")
        run()
        return _status("VmHWM") - before


@contextlib.contextmanager
def _no_reuse_of_freed_memory() -> Iterator[None]:
    """Freed memory that glibc holds on to would be used again without counting as growth (other C libraries: no-op).

    Inside, free memory is given back, holes in the heap are taken up, and blocks of 128 KiB and more come from the
    system each time; a touch of what was given back brings a page and not a huge one, 2 MiB at once. Afterwards blocks
    are kept up to 32 MiB, the most that glibc's own sliding threshold comes to.
    """
    c = ctypes.CDLL(None)
    if not hasattr(c, "malloc_trim") or not hasattr(c, "mallopt"):
        yield
        return
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    set_huge_pages_off, huge_pages_off = 41, 42  # PR_SET_THP_DISABLE, PR_GET_THP_DISABLE of prctl.h
    c.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    were_off, holes = c.prctl(huge_pages_off, 0, 0, 0, 0), []
    try:
        c.prctl(set_huge_pages_off, 1, 0, 0, 0)
        c.malloc_trim(0)
        c.mallopt(mmap_threshold, 128 << 10)
        holes = _take_up_holes(c, least=128 << 10)
        yield
    finally:
        for hole in holes:
            c.free(hole)
        c.mallopt(mmap_threshold, 32 << 20)
        c.mallopt(trim_threshold, 64 << 20)
        c.prctl(set_huge_pages_off, max(were_off, 0), 0, 0, 0)


def _take_up_holes(c: Any, least: int) -> list[ctypes.c_void_p]:
    """Untouched blocks of glibc's heap for every hole of ``least`` bytes and more.

    A block that fits into a hole is put there whatever the threshold, and stays resident when it is freed.
    """
    c.malloc.restype = ctypes.c_void_p
    c.malloc.argtypes = [ctypes.c_size_t]
    holes = []
    size = 1 << 30
    while size >= least:
        block = c.malloc(size)
        if block is None:
            size //= 2
            continue
        header = ctypes.c_size_t.from_address(block - ctypes.sizeof(ctypes.c_size_t)).value
        if header & 2:  # IS_MMAPPED of glibc's malloc.c: it fits into no hole
            c.free(ctypes.c_void_p(block))
            size //= 2
        else:
            holes.append(ctypes.c_void_p(block))
    return holes


def _status(name: str) -> int:
    """A field of /proc/self/status, in bytes."""
    match = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if match is None:
        raise NotImplementedError(f"this system does not say {name} in /proc/self/status")
    return 1024 * int(match[1])


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    match = re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return 1024 * int(match[1]) if match else 0


def _eager_estimate(model: DeepNarrowMLP | DeepNarrowCNN, x: Tensor) -> int:
    """Parameters, gradients and one state a layer, which autograd keeps."""
    positions = x.numel() // model.first_weight.shape[1]
    state = model.width * positions * x.element_size()
    return 2 * _bytes_of(list(model.parameters())) + (model.depth + 2) * state


def table(profiles: Sequence[MemoryProfile]) -> str:
    """One row a profile: depth, segment, planned and measured peak, their ratio, eager's peak."""
    rows = [("depth", "segment", "planned", "measured", "measured / planned", "eager")]
    for p in profiles:
        eager = "-" if p.eager is None else format_bytes(p.eager)
        ratio = f"{p.measured / p.plan.total:.2f}"
        rows.append(
            (str(p.depth), str(p.plan.segment), format_bytes(p.plan.total), format_bytes(p.measured), ratio, eager)
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True)) for row in rows)


def plot(profiles: Sequence[MemoryProfile], path: str | Path) -> None:
    """Draw peak memory against depth into ``path`` (the ending says the format); needs matplotlib."""
    from matplotlib.figure import Figure

    ordered = sorted(profiles, key=lambda p: p.depth)
    with_eager = [p for p in ordered if p.eager is not None]
    curves: list[tuple[str, str, Sequence[int], Sequence[float]]] = [
        ("eager layers, measured", "s-", [p.depth for p in with_eager], [float(p.eager or 0) for p in with_eager]),
        ("narrowdeep, measured", "o-", [p.depth for p in ordered], [float(p.measured) for p in ordered]),
        ("narrowdeep, planned", "x--", [p.depth for p in ordered], [float(p.plan.total) for p in ordered]),
    ]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for label, style, depths, peaks in curves:
        if depths:
            axes.loglog(depths, [peak / 2**20 for peak in peaks], style, label=label)
    axes.set_xlabel("depth (affine layers)")
    axes.set_ylabel("peak memory of a training step (MiB)")
    axes.grid(which="both", alpha=0.2)
    axes.legend()
    with files.replacing(path) as file:
        figure.savefig(file, format=Path(path).suffix[1:] or "png")
