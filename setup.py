"""Builds the CPU engine: one extension from csrc/, each source with the flags of its instruction set."""

from __future__ import annotations

import os
import platform
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).resolve().parent
X86_64 = platform.machine().lower() in ("x86_64", "amd64")
ARM64 = platform.machine().lower() in ("aarch64", "arm64")

# A source named *_avx2.cpp and so on is compiled with these flags, all others for the baseline of the architecture;
# the engine chooses among them at run time. Hence never -march=native. Never fast-math: the offset form's exact sums
# would be optimised away. None: the source is left out on this machine.
INSTRUCTION_SETS: dict[str, list[str] | None] = {
    "scalar": [],
    "avx2": ["-mavx2", "-mfma"] if X86_64 else None,
    "avx512": ["-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mfma", "-mprefer-vector-width=512"]
    if X86_64
    else None,
    "neon": [] if ARM64 else None,
}

# NARROWDEEP_SANITIZE=address,undefined builds the engine for `make sanitize`: gcc's sanitizers in the instruction set
# that this names. The others are compiled quickly and are not meant to run.
SANITIZE = os.environ.get("NARROWDEEP_SANITIZE", "")
SANITIZED = "neon" if ARM64 else "avx2"
SANITIZERS = [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"] if SANITIZE else []


def optimization(instruction_set: str) -> list[str]:
    """Flags for a source of ``instruction_set``, "" for one that belongs to none."""
    if not SANITIZE:
        return ["-O3", "-g0"]
    return ["-O1", "-g1", *SANITIZERS] if instruction_set in ("", SANITIZED) else ["-O0", "-g0"]


def instruction_set(source: str) -> str:
    """ "avx2" for csrc/mlp/mlp_avx2.cpp, "" for a source that belongs to no instruction set."""
    suffix = Path(source).stem.rpartition("_")[2]
    return suffix if suffix in INSTRUCTION_SETS else ""


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
            groups: dict[str, list[str]] = defaultdict(list)
            for source in sources:
                groups[instruction_set(source)].append(source)
            arguments = options.pop("extra_postargs", None) or {}

            def compile_group(name: str) -> list[str]:
                flags = INSTRUCTION_SETS.get(name) or []
                extra = {**arguments, "cxx": [*arguments.get("cxx", []), *optimization(name), *flags]}
                # A folder a group: each has its own build.ninja.
                folder = str(Path(output_dir) / (name or "baseline"))
                return compile_all(groups[name], output_dir=folder, extra_postargs=extra, **options)

            # Without ninja, compile_all changes the compiler object while it runs.
            with ThreadPoolExecutor(len(groups) if self.use_ninja else 1) as pool:
                return [obj for objects in pool.map(compile_group, sorted(groups)) for obj in objects]

        self.compiler.compile = compile_by_instruction_set
        try:
            super().build_extension(ext)
        finally:
            self.compiler.compile = compile_all


def engine() -> list[Extension]:
    """The extension narrowdeep._C."""
    sources = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.cpp"))]
    sources = [s for s in sources if INSTRUCTION_SETS.get(instruction_set(s), []) is not None]
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
