"""Runs kernels by executing the PTX that Triton emits for a target, on the CPU, with every memory access checked.

The tool is found through the environment variable NARROWDEEP_PTXSIM (its folder); without it the tests that need it are
skipped.
"""

from __future__ import annotations

import functools
import os
import re
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor


def load() -> Any:
    """The tool's module that launches a kernel; skips the test when it is not there."""
    variable = os.environ.get("NARROWDEEP_PTXSIM")
    folder = Path(variable or "")
    if not variable or not (folder / "triton_run.py").is_file():
        pytest.skip("needs the PTX executor ptxsim: set NARROWDEEP_PTXSIM to its folder")
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    import triton_run  # type: ignore[import-not-found]

    def translate(compiled: Any, **options: Any) -> Any:
        # The executor does not know an immediate predicate, which Triton writes for "always".
        text = re.sub(r"mov\.pred(\s+%p\d+), -1;", r"setp.eq.u32\1, 0, 0;", compiled.asm["ptx"])
        metadata = compiled.metadata
        sizes = {"shared": metadata.shared, "num_warps": metadata.num_warps}
        return triton_run.ptxsim.PTXKernel(text, entry=metadata.name, **sizes, **options)

    triton_run.ptxsim.from_triton = translate
    _mask_addresses(triton_run.ptxsim)
    return triton_run


@functools.cache
def _mask_addresses(ptxsim: Any) -> None:
    """Threads that take no part in a load of a matrix have no address whose alignment is to be checked."""
    machine = next(c for c in vars(ptxsim).values() if isinstance(c, type) and hasattr(c, "LDMAT"))
    load_matrix = machine.LDMAT

    def masked(self: Any, address: Any, offset: Any, count: int, transposed: bool, mask: Any, index: int) -> Any:
        address = address if mask is None else numpy.where(mask, address, 0)
        return load_matrix(self, address, offset, count, transposed, mask, index)

    machine.LDMAT = masked


@dataclass
class Simulator:
    """Stands in for ``triton_common.launch`` and ``empty``.

    Fails on an access out of bounds, a read of what nothing wrote, a race, and an output with elements left unwritten.
    ``mode`` "warp" runs the warps in a random order drawn from ``seed``, so that a race shows as another result too.
    """

    target: int
    mode: str = "lockstep"
    seed: int = 0
    launches: list[str] = field(default_factory=list)
    _unwritten: dict[int, Tensor] = field(default_factory=dict)

    def empty(self, like: Tensor, *shape: int) -> Tensor:
        tensor = torch.full(shape, torch.nan, dtype=like.dtype)
        self._unwritten[tensor.data_ptr()] = tensor
        return tensor

    def launch(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        *args: Any,
        num_warps: int,
        registers: int | None = None,
        **constants: Any,
    ) -> None:
        tensors = {a.data_ptr(): a for a in args if isinstance(a, Tensor)}
        fresh = tuple(t for pointer, t in tensors.items() if pointer in self._unwritten)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the executor's, about numpy
            report = load().run(
                kernel,
                grid,
                *args,
                cc=self.target,
                num_warps=num_warps,
                uninit=fresh,
                mode=self.mode,
                seed=self.seed,
                specialise=False,
                **constants,
            )
        name = kernel.fn.__name__
        assert not report.issues, f"{name}: {report.summary()}"
        assert not report.unwritten, f"{name} left elements unwritten: {report.unwritten}"
        self.launches.append(name)
        for tensor in fresh:
            del self._unwritten[tensor.data_ptr()]
