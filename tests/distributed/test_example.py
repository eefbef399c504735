"""``examples/ddp.py`` under torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from narrowdeep.training import load_model
from tests.distributed.ranks import TORCHRUN

ROOT = Path(__file__).parents[2]


def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    """With FusedSGD, which the test of all examples runs without, and DistributedDataParallel alone."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    models: list[Any] = []
    for launcher, way in (([sys.executable], []), ([*TORCHRUN, "2"], ["--fused"])):
        out = str(tmp_path / f"{len(models)}.png")
        script = [str(ROOT / "examples" / "ddp.py"), "--depth", "50", "--steps", "40", *way, "--out", out]
        done = subprocess.run([*launcher, *script], capture_output=True, text=True, env=environment, timeout=180)
        assert done.returncode == 0, done.stderr
        words = done.stdout.split()
        assert done.stdout.count("loss") == 1
        assert float(words[3]) < float(words[1])
        models.append(load_model(f"{out}.safetensors"))
    one, two = models
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
