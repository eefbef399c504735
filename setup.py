"""Builds the CPU engine: one extension from csrc/, its kernels once for each instruction set."""

from __future__ import annotations

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).resolve().parent
X86_64 = platform.machine().lower() in ("x86_64", "amd64")
ARM64 = platform.machine().lower() in ("aarch64", "arm64")

# Every csrc/*/kernels.cpp is compiled once for each of these with -DND_ISA=<name> and these flags, all other sources
# once for the baseline of the architecture; the engine chooses among them at run time. Hence never -march=native. Never
# fast-math: the offset form's exact sums would be optimised away.
INSTRUCTION_SETS: dict[str, list[str]] = {"scalar": ["-DND_VECTOR_BYTES=0"]}
if X86_64:
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma"]
    INSTRUCTION_SETS["avx512"] = [
        *("-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mfma", "-mprefer-vector-width=512"),
    ]
if ARM64:
    INSTRUCTION_SETS["neon"] = []

# NARROWDEEP_SANITIZE=address,undefined builds the engine for `make sanitize`: gcc's sanitizers in everything but
# AVX-512, whose kernels are the same source with longer vectors: compiled quickly, and not meant to run.
SANITIZE = os.environ.get("NARROWDEEP_SANITIZE", "")
SANITIZERS = [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"] if SANITIZE else []


def optimization(group: str) -> list[str]:
    """Flags for the sources of an instruction set, or of the baseline."""
    if not SANITIZE:
        return ["-O3", "-g0"]
    return ["-O1", "-g1", *SANITIZERS] if group != "avx512" else ["-O0", "-g0"]


class BuildEngine(BuildExtension):
    """torch's BuildExtension (ninja where there is one), with flags per instruction set."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # An editable install would build in a temporary folder and compile everything again each time.
        kind = "sanitize" if SANITIZE else "temp"
        self.build_temp = str(ROOT / "build" / f"{kind}.{platform.system().lower()}-{platform.machine()}")

    def build_extension(self, ext: Extension) -> None:
        compile_all = self.compiler.compile

        def compile_by_instruction_set(sources: list[str], output_dir: str, **options: Any) -> list[str]:
            arguments = options.pop("extra_postargs", None) or {}
            kernels = [s for s in sources if Path(s).name == "kernels.cpp"]
            others = [s for s in sources if s not in kernels]
            groups: list[tuple[str, list[str], list[str]]] = [("baseline", others, [])]
            groups += [(name, kernels, [f"-DND_ISA={name}", *flags]) for name, flags in INSTRUCTION_SETS.items()]

            def compile_group(group: tuple[str, list[str], list[str]]) -> list[str]:
                name, files, flags = group
                extra = {**arguments, "cxx": [*arguments.get("cxx", []), *optimization(name), *flags]}
                # A folder a group: each has its own build.ninja.
                return compile_all(files, output_dir=str(Path(output_dir) / name), extra_postargs=extra, **options)

            # Without ninja, compile_all changes the compiler object while it runs.
            with ThreadPoolExecutor(len(groups) if self.use_ninja else 1) as pool:
                return [obj for objects in pool.map(compile_group, groups) for obj in objects]

        self.compiler.compile = compile_by_instruction_set
        try:
            super().build_extension(ext)
        finally:
            self.compiler.compile = compile_all


def engine() -> list[Extension]:
    """The extension narrowdeep._C."""
    sources = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.cpp"))]
    if not sources:
        return []
    return [
        CppExtension(
            "narrowdeep._C",
            sources,
            include_dirs=[str(ROOT / "csrc")],
            depends=[str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.h"))],
            define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],  # libtorch's stable ABI of torch 2.10
            extra_compile_args={"cxx": ["-std=c++17", "-fvisibility=hidden", "-Wall"]},
            extra_link_args=SANITIZERS,
            py_limited_api=True,
        )
    ]


setup(
    ext_modules=engine(),
    cmdclass={"build_ext": BuildEngine},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
