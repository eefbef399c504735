"""``python -m benchmarks.start``: processor time until a command has answered, over that of ``import torch``.

The least over rounds in which all take turns, on one thread. Status 1 where one takes longer than it may. What is
loaded, which decides it, tests/test_imports.py has.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

TORCH = ("-c", "import torch")
OPTIMIZER = ("-c", "import torch; torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)")
"""A program's first optimizer makes torch load its compiler."""

_COMMAND = ("-m", "narrowdeep")
_TRAIN = (*_COMMAND, "train", "--task", "toy", "--depth", "5", "--epochs", "1", "--no-plot", "--out")
_KERNEL = (*_COMMAND, "ntk", "--depth", "5", "--draws", "1", "--points", "3", "--no-plot", "--out", "{new}.npz")

CASES: dict[str, tuple[tuple[str, ...], tuple[str, ...] | None, float]] = {
    "import narrowdeep": (("-c", "import torch, narrowdeep; narrowdeep.DeepNarrowMLP"), TORCH, 0.3),
    "narrowdeep --help": ((*_COMMAND, "--help"), None, 1.0),
    "narrowdeep train": ((*_TRAIN, "{new}"), OPTIMIZER, 0.5),
    "narrowdeep ntk": (_KERNEL, TORCH, 0.5),
    "narrowdeep plan": ((*_COMMAND, "plan"), TORCH, 0.5),
    "narrowdeep profile": ((*_COMMAND, "profile", "--depth", "5", "--no-eager"), TORCH, 0.5),
    "narrowdeep reproduce": ((*_COMMAND, "reproduce", "--help"), TORCH, 0.5),
    "narrowdeep record": ((*_COMMAND, "record"), TORCH, 0.5),
    "narrowdeep info": ((*_COMMAND, "info"), TORCH, 0.5),
}
"""Name -> arguments of Python, those of the program that it is compared with, and the seconds that it may add."""


def seconds(arguments: tuple[str, ...], folder: Path) -> float:
    """Of the processor, of user and system, in a process that runs in ``folder``."""
    new = tempfile.mktemp(dir=folder)
    command = [sys.executable, *(a.format(new=new) for a in arguments)]
    path = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    child = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        raise RuntimeError(f"status {child.returncode} from {' '.join(command)}")
    return usage.ru_utime + usage.ru_stime


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.start", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CASES)}; all without")
    options = parser.parse_args(arguments)
    chosen = {name: CASES[name] for name in options.names or CASES}
    programs = {program for ours, base, _ in chosen.values() for program in (ours, base) if program is not None}
    least = dict.fromkeys(sorted(programs), float("inf"))
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            for program in least:
                least[program] = min(least[program], seconds(program, Path(folder)))
    late = 0
    print("| what | seconds | over torch alone | may be |\n| --- | ---: | ---: | ---: |")
    for name, (ours, base, most) in chosen.items():
        added = least[ours] - (0 if base is None else least[base])
        late += added > most
        print(f"| {name} | {least[ours]:.2f} | {'' if base is None else f'{added:.2f}'} | {most:g} |")
    return 1 if late else 0


if __name__ == "__main__":
    sys.exit(main())
