"""``python -m tests.fuzz --seconds 60 --seed 1``: random calls of the public API, good ones and bad ones.

The calls run in a process of their own. When that ends by a signal, or hangs, its last case is reported and the next
process goes on behind it. ``--case N`` runs one case again. Ends with status 1 where anything was found.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

MOST_DEATHS = 5
HANGS = 120
"""Seconds after which a case is taken to hang."""


def work(seed: int, first: int, end: float, log: Path | None) -> int:
    """Cases from ``first`` on until the time ``end``; the number of those that found something."""
    from tests.fuzz import case

    faulthandler.enable()
    found, number, counts = 0, first, Counter[str]()
    while time.time() < end:
        if log is not None:
            log.write_text(str(number))
        faulthandler.dump_traceback_later(HANGS, exit=True)
        problem = case.run(seed, number, counts)
        if problem:
            found += 1
            print(f"\n== case {number}: python -m tests.fuzz --seed {seed} --case {number}\n{problem}", flush=True)
        number += 1
    faulthandler.cancel_dump_traceback_later()
    summary = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    print(f"cases {first} to {number - 1} of seed {seed} on {case.OURS}: {summary}", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Random calls of the public API.")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="run this one alone, in this process")
    parser.add_argument("--work", nargs=3, metavar=("FIRST", "END", "LOG"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        first, end, log = options.work
        return min(1, work(options.seed, int(first), float(end), Path(log)))
    if options.case is not None:
        from tests.fuzz import case

        faulthandler.enable()
        problem = case.run(options.seed, options.case, Counter(), verbose=True)
        print(problem or "nothing found")
        return int(problem is not None)

    end, first, deaths, failed = time.time() + options.seconds, 0, 0, False
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "case"
        while time.time() < end and deaths < MOST_DEATHS:
            command = [sys.executable, "-m", "tests.fuzz", "--seed", str(options.seed)]
            code = subprocess.run([*command, "--work", str(first), str(end), str(log)], env=os.environ).returncode
            failed |= code != 0
            if code in (0, 1) and time.time() >= end:
                break
            if not log.exists():
                print(f"the worker ended with {code} before its first case")
                break
            number, deaths = int(log.read_text()), deaths + 1
            what = f"ended by signal {-code}" if code < 0 else f"ended or hung (status {code})"
            print(f"\n== case {number} {what}: {' '.join(command[1:])} --case {number}", flush=True)
            first = number + 1
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
