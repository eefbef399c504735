"""Processes on this machine that find each other through a file, and what they return."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = timedelta(seconds=45)


def _begin(rank: int, processes: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=processes, timeout=TIMEOUT)
    try:
        torch.save(function(rank, *args), f"{folder}/{rank}")
    finally:
        dist.destroy_process_group()


def run(function: Callable[..., Any], processes: int, *args: Any) -> list[Any]:
    """``function(rank, *args)`` in so many processes of a group of gloo's; what each has returned."""
    # One process imports torch, and the others are copies of it: seconds less than an import in each.
    multiprocessing.set_forkserver_preload(["torch", "torch.distributed.pipelining", "narrowdeep.modules"])
    with tempfile.TemporaryDirectory() as folder:
        arguments = (processes, folder, function, args)
        torch.multiprocessing.start_processes(_begin, arguments, nprocs=processes, start_method="forkserver")
        return [torch.load(f"{folder}/{rank}") for rank in range(processes)]
