"""Registers, memory and instruction mix of every Triton kernel, without a GPU: compiled and disassembled.

``python -m benchmarks.gpu.static_figures`` writes the installed Triton's part of docs/gpu_static.json, {version:
{kernel: figures}}: all of it with --fresh (minutes), else what has changed since. Every row has the key of what was
compiled, so that a test can tell without compiling that none is out of date. Instruction counts are those of the
innermost loop, over layers, samples, positions or entries, as issued by one warp.

Rows of sm_90 have modelled cycles too (``modelled.py``), of every block that may be chosen. A row that would need over
5% more of them than before is not written unless --slower.
"""

from __future__ import annotations

import argparse
import ast
import collections
import hashlib
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITCallable

from benchmarks.gpu import modelled
from narrowdeep.ops import triton_backward, triton_chain, triton_common, triton_second, triton_shooting, triton_whole
from narrowdeep.ops.cnn import triton as cnn
from narrowdeep.ops.gram import triton as gram
from narrowdeep.ops.mlp import triton as mlp
from narrowdeep.ops.triton_common import Block
from narrowdeep.ops.triton_sums import add_sums

TABLE = Path(__file__).parents[2] / "docs" / "gpu_static.json"
TARGETS = (75, 80, 90, 100)
CONSUMER_TARGETS = (86, 89, 120)
"""In float32 alone: these devices have one float64 unit for 64 of float32."""
WIDTHS = (4, 8, 16, 32, 80)
CHANNELS = (3, 12)
"""Of a convolution chain on 7 x 7 images with 3 x 3 filters, the thesis's two networks."""
DTYPES = (torch.float32, torch.float64)
_POINTEE = {torch.float32: "fp32", torch.float64: "fp64"}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_CHAIN: dict[str, tuple[Any, dict[str, Any]]] = {
    "forward": (triton_chain.chain_forward, {"SAVE": 2}),
    "recompute": (triton_chain.chain_recompute, {}),
    "backward": (triton_chain.chain_backward, {"STORE": True}),
    "whole": (triton_whole.chain_whole, {"RECOMPUTE": True, "SUM": True}),
    "jvp": (triton_chain.chain_jvp, {"HAS_WEIGHT_T": True, "HAS_BIAS_T": True}),
    "tangents": (triton_second.chain_tangents, {"HAS_WEIGHT_T": True, "HAS_BIAS_T": True, "STORE": True}),
    "backward_jvp": (triton_second.chain_backward_jvp, {"HAS_WEIGHT_T": True, "STORE": True}),
}
_SHOOTING: dict[str, tuple[Any, str, dict[str, Any]]] = {
    # (the function, the kernel whose blocks it has, constants of its own); plain form has the backward's alone
    "segments": (triton_shooting.chain_segments, "forward", {"SAVE": 2}),
    "sequential": (triton_shooting.chain_sequential, "forward", {"SAVE": 2}),
    "join_states": (triton_shooting.join_states, "forward", {}),
    "jacobian": (triton_shooting.backward_segments, "backward", {"JACOBIAN": True, "STORE": False}),
    "backward_segments": (triton_shooting.backward_segments, "backward", {"JACOBIAN": False, "STORE": True}),
    "join_gradients": (triton_shooting.join_gradients, "backward", {}),
}


@dataclass(frozen=True)
class Entry:
    """One compiled kernel; ``offset`` None and ``width`` 0 where form and width make no difference."""

    family: str
    kernel: str
    dtype: torch.dtype
    offset: bool | None
    width: int
    target: int

    def __str__(self) -> str:
        form = {True: "offset ", False: "plain ", None: ""}[self.offset]
        kind = str(self.dtype).removeprefix("torch.")
        width = f"n={self.width} " if self.width else ""
        return f"{self.family} {self.kernel} {kind} {form}{width}sm_{self.target}"


@dataclass(frozen=True)
class Figures:
    """``spills`` are stack and local bytes a thread, of sm_90 in any block; ``fma`` the loop's share of multiply-adds.

    ``modelled``: by block, samples/warps; empty for other targets and for plain form.
    """

    key: str
    samples: int
    warps: int
    registers: int
    spills: int
    shared: int
    loop: int
    fma: float
    mix: dict[str, int]
    modelled: dict[str, Any]


def _tensors(entry: Entry) -> tuple[torch.Tensor, torch.Tensor]:
    """An x and hidden weights of the entry's shape, without memory."""
    n = entry.width
    if entry.family == "cnn":
        x, weight = torch.empty(128, 1, 7, 7, device="meta"), torch.empty(8, n, n, 3, 3, device="meta")
    else:
        x, weight = torch.empty(1 << 20, 1, device="meta"), torch.empty(8, n, n, device="meta")
    return x.to(entry.dtype), weight.to(entry.dtype)


def entries() -> Iterator[Entry]:
    """Every supported combination: offset form for all targets, for the MLP on sm_90 plain form as well."""
    for target in (*TARGETS, *CONSUMER_TARGETS):
        dtypes = DTYPES if target in TARGETS else (torch.float32,)
        for family, widths in ((mlp.FAMILY, WIDTHS), (cnn.FAMILY, CHANNELS)):
            name = "mlp" if family is mlp.FAMILY else "cnn"
            for width in widths:
                for dtype in dtypes:
                    for kernel in _CHAIN:
                        x, weight = _tensors(Entry(name, kernel, dtype, True, width, target))
                        with mock.patch.object(triton_common, "capability", return_value=target):
                            supported = family.supported(kernel, x, weight)
                        if supported:
                            yield Entry(name, kernel, dtype, True, width, target)
                            if target == 90 and name == "mlp":
                                yield Entry(name, kernel, dtype, False, width, target)
                    for kernel, (_, blocks_of, _) in _SHOOTING.items():
                        if name == "mlp" and width <= triton_shooting.widest(blocks_of, dtype, target):
                            yield Entry(name, kernel, dtype, True, width, target)
                            if target == 90 and blocks_of == "backward":
                                yield Entry(name, kernel, dtype, False, width, target)
                    if family.supported("whole", *_tensors(Entry(name, "whole", dtype, True, width, target))):
                        yield Entry(name, "add_sums", dtype, None, width, target)
                    if width <= 16:
                        yield Entry(name, "weight_gradient", dtype, None, width, target)
                        gram_kernel = "gram_sums" if name == "mlp" else "filter_jacobians"
                        yield Entry(name, gram_kernel, dtype, None, width, target)
        for dtype in dtypes:
            yield Entry("cnn", "pair_sums", dtype, None, 0, target)


def _kernel(entry: Entry) -> tuple[Any, list[tuple[Block, dict[str, Any]]]]:
    """(the function, its blocks with the constants of each)."""
    n = entry.width
    image = {"TAP": 3, "HEIGHT": 7, "LENGTH": 7}
    if entry.kernel in _CHAIN:
        x, weight = _tensors(entry)
        family = mlp.FAMILY if entry.family == "mlp" else cnn.FAMILY
        function, more = _CHAIN[entry.kernel]
        middle = 1 if entry.offset else -1
        with mock.patch.object(triton_common, "capability", return_value=entry.target):
            blocks = family.blocks(entry.kernel, x, weight, bool(entry.offset))
            constants = [triton_chain.constants(family, entry.kernel, x, weight, middle, block) for block in blocks]
        for block, values in zip(blocks, constants, strict=True):
            values |= more | ({} if family is cnn.FAMILY and not block.shuffled else {"scratch_ptr": None})
        return function, list(zip(blocks, constants, strict=True))
    if entry.kernel in _SHOOTING:
        x, weight = _tensors(entry)
        function, blocks_of, more = _SHOOTING[entry.kernel]
        middle = 1 if entry.offset else -1
        with mock.patch.object(triton_common, "capability", return_value=entry.target):
            block = mlp.blocks(blocks_of, x, weight, bool(entry.offset))[-1]
            options = triton_chain.constants(mlp.FAMILY, blocks_of, x, weight, middle, block) | more
        join = triton_shooting.joining(blocks_of, block, n, entry.dtype, triton_shooting.MOST_SEGMENTS)
        if blocks_of == "forward":
            options["PARTS"] = block.samples // join["BLOCK"]
        options["scratch_ptr"] = None
        if entry.kernel.startswith("join"):
            block = Block(join["BLOCK"], join.pop("num_warps"), join.pop("registers", None))
            options = join | {"MIDDLE": middle, "WIDTH": n}
        return function, [(block, options)]
    if entry.kernel == "gram_sums":
        options = {"WEIGHT": True, "BIAS": True, "DIAGONAL": False, "WIDTH": n, "LAYERS": 64, "PAIRS": gram.PAIRS}
        return gram.gram_sums, [(Block(gram.PAIRS, 4), options)]
    if entry.kernel == "add_sums":
        return add_sums, [(Block(triton_backward.ADDED, 4), {"WIDTH": n, "BLOCK": triton_backward.ADDED})]
    if entry.kernel == "pair_sums":
        options = {"DIAGONAL": False, "PAIRS": gram.TILE_PAIRS, "ENTRIES": gram.TILE_ENTRIES}
        return gram.pair_sums, [(Block(gram.TILE_PAIRS, 4), options)]
    if entry.family == "mlp":
        rows, samples = mlp.weight_gradient_block(n, entry.dtype)
        options = {"WIDTH": n, "ROWS": rows, "SPLIT": mlp._SPLIT, "BLOCK": samples, "ALIGNED": True}
        return mlp.weight_gradient, [(Block(samples, 4), options)]
    options = image | {"ROWS": cnn.weight_gradient_rows(n, 3), "BLOCK": 128}
    if entry.kernel == "filter_jacobians":
        options |= {"WEIGHT": True, "BIAS": True, "UNITS": n, "CHANNELS": n}
        return gram.filter_jacobians, [(Block(128, 4), options)]
    return cnn.weight_gradient, [(Block(128, 4), options | {"WIDTH": n, "SPLIT": cnn._SPLIT})]


def _is_modelled(entry: Entry) -> bool:
    return entry.target == modelled.TARGET and entry.offset is not False


def _sources(function: Any, found: dict[str, str]) -> dict[str, str]:
    """The syntax trees of a kernel and of all it calls, without comments and docstrings, and the constants it reads."""
    tree = ast.parse(function.src)
    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef)
    if ast.get_docstring(definition) is not None:
        del definition.body[0]
    found[function.fn.__qualname__] = ast.dump(tree)
    for name in {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}:
        value = function.fn.__globals__.get(name)
        if isinstance(value, JITCallable):
            if name not in found:
                _sources(value, found)
        elif isinstance(value, triton.language.constexpr):
            found[name] = repr(value.value)
    return found


def key(entry: Entry) -> str:
    """Of what is compiled: the kernel's source, its constants and its blocks. Triton's version the table has itself."""
    function, blocks = _kernel(entry)
    compiled = [(sorted(options.items()), block) for block, options in blocks[: None if _is_modelled(entry) else 1]]
    parts = (sorted(_sources(function, {}).items()), compiled)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / name, *arguments], check=True, capture_output=True, text=True).stdout


def _loops(listing: str) -> list[collections.Counter[str]]:
    """Opcodes of every innermost loop, or of the whole program where there is none."""
    code: list[tuple[str, str]] = []
    labels = {}
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)\s*([^;]*);", line):
            code.append((found[1], found[2]))
    spans = []
    for end, (opcode, operands) in enumerate(code):
        target = re.search(r"(\.L_\w+)", operands) if opcode.startswith("BRA") else None
        if target and labels.get(target[1], end) < end:
            spans.append((labels[target[1]], end))
    inner = [(a, b) for a, b in spans if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in spans)]
    inner = inner or [(0, len(code) - 1)]
    return [collections.Counter(opcode.split(".")[0] for opcode, _ in code[a : b + 1]) for a, b in inner]


def _compile(entry: Entry, function: Any, options: dict[str, Any], block: Block) -> tuple[Any, str, int, int]:
    """(the compiled kernel, its disassembly, registers, spilled bytes)."""
    signature, constants, hints = {}, {}, {}
    for i, name in enumerate(function.arg_names):
        if name in options:
            signature[name], constants[(i,)] = "constexpr", options[name]
        elif name.endswith("_ptr"):
            pointee = "fp64" if name == "sums_ptr" else _POINTEE[entry.dtype]
            signature[name], hints[(i,)] = "*" + pointee, [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
    compiled = triton.compile(
        ASTSource(fn=function, signature=signature, constexprs=constants, attrs=hints),
        target=GPUTarget("cuda", entry.target, 32),
        options={"num_warps": block.warps, "maxnreg": block.registers, "enable_fp_fusion": True},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", _tool("cuobjdump", "-res-usage", file.name))
        listing = _tool("nvdisasm", "-c", file.name)
    assert usage is not None
    return compiled, listing, int(usage[1]), int(usage[2]) + int(usage[3])


def _products(entry: Entry, options: dict[str, Any], block: Block) -> float:
    """Multiply-add instructions of a layer and warp in the hot loop of an MLP's chain, 0 for tiles and for all else."""
    chain = entry.kernel in _CHAIN or (entry.kernel in _SHOOTING and not entry.kernel.startswith("join"))
    if entry.family != "mlp" or not chain or options["ROWS"] == mlp.TILE:
        return 0
    if block.fragments:
        return 3 * ((entry.width + 7) // 8) ** 2
    a_lane = block.samples / (32 * block.warps)
    if entry.kernel == "whole":  # the first product of a sum is a multiplication
        return entry.width**2 * (2 * a_lane - 1)
    return (3 if entry.kernel == "jvp" else 1) * entry.width**2 * a_lane


def measure(entry: Entry) -> Figures:
    """Compile for the target and read the binary."""
    function, blocks = _kernel(entry)
    rows, most = {}, 0
    for i, (block, options) in enumerate(blocks if _is_modelled(entry) else blocks[:1]):
        compiled, listing, registers, spills = _compile(entry, function, options, block)
        if i == 0:
            first = (listing, registers, compiled.metadata.shared)
        most = max(most, spills)
        if _is_modelled(entry):
            limits = (block.warps, registers, compiled.metadata.shared)
            again = entry.width**2 * block.samples / 32 if entry.kernel == "whole" else 0
            found = modelled.model(compiled.asm["cubin"], *limits, _products(entry, options, block), again)
            if found is not None:
                rows[f"{block.samples}/{block.warps}"] = asdict(found)
    listing, registers, shared = first

    def products(mix: collections.Counter[str]) -> int:
        return sum(mix[name] for name in ("FFMA", "FFMA2", "DFMA", "HMMA", "DMMA"))

    mix = max(_loops(listing), key=products)
    return Figures(
        key=key(entry),
        samples=blocks[0][0].samples,
        warps=blocks[0][0].warps,
        registers=registers,
        spills=most,
        shared=shared,
        loop=mix.total(),
        fma=round(products(mix) / mix.total(), 3),
        mix=dict(sorted(mix.items(), key=lambda pair: (-pair[1], pair[0]))[:8]),
        modelled=rows,
    )


def spilling_blocks(entry: Entry) -> list[str]:
    """Blocks, samples/warps, of which a binary spills; of the first one ``measure`` tells."""
    function, blocks = _kernel(entry)
    found = []
    for block, options in blocks[1:]:
        if _compile(entry, function, options, block)[3]:
            found.append(f"{block.samples}/{block.warps}")
    return found


def measure_all(wanted: Iterable[Entry]) -> Iterator[tuple[Entry, Figures]]:
    """In two processes, each figure as soon as it and those before it are there."""
    wanted = list(wanted)
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from zip(wanted, pool.map(measure, wanted), strict=True)


def _write(tables: dict[str, dict[str, Any]]) -> None:
    TABLE.write_text(json.dumps(tables, indent=1, sort_keys=True) + "\n")


def main() -> None:
    """Write this Triton's table; figures already there for these sources are kept unless --fresh."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    parser.add_argument("--slower", action="store_true", help="write rows that take over 5%% more modelled cycles")
    arguments = parser.parse_args()
    tables: dict[str, dict[str, Any]] = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    wanted = {str(entry): entry for entry in entries()}
    before = tables.get(triton.__version__, {})
    table = tables[triton.__version__] = {name: row for name, row in before.items() if name in wanted}
    missing = [e for name, e in wanted.items() if arguments.fresh or table.get(name, {}).get("key") != key(e)]
    slower = []
    for entry, figures in measure_all(missing):
        old = table.get(str(entry), {}).get("modelled", {})
        if found := modelled.worse(old, figures.modelled):
            slower += [f"{entry}: {what}" for what in found]
            if not arguments.slower:
                continue
        table[str(entry)] = asdict(figures)
        print(f"{entry}: {figures}", flush=True)
        _write(tables)
    _write(tables)  # without rows that are no more
    if slower:
        print("slower by over 5%", "" if arguments.slower else " and not written (--slower writes them)", ":", sep="")
        sys.exit("\n".join(slower))


if __name__ == "__main__":
    main()
