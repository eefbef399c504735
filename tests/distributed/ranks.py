"""Processes on this machine that find each other through a file, and what they return."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = timedelta(seconds=120)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
TORCHRUN += ["--nproc-per-node"]
PRELOADED = ["torch.distributed.pipelining", "torch.distributed.fsdp", "narrowdeep.commands.train", "narrowdeep.optim"]
PRELOADED += ["narrowdeep.ntk.spectrum", "sklearn.datasets", "typer.testing", "pytest"]


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
    return _run(_begin, processes, function, args)


def _run(begin: Callable[..., None], processes: int, *args: Any) -> list[Any]:
    # One process imports torch, and the others are copies of it: seconds less than an import in each.
    multiprocessing.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (processes, folder, *args)
        torch.multiprocessing.start_processes(begin, arguments, nprocs=processes, start_method="forkserver")
        return [torch.load(f"{folder}/{rank}") for rank in range(processes)]


def _command(rank: int, processes: int, folder: str, arguments: list[list[str]], port: int) -> None:
    from typer.testing import CliRunner

    from narrowdeep.cli import app

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    result = CliRunner().invoke(app, arguments[rank])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    torch.save((result.exit_code, result.stdout, result.stderr), f"{folder}/{rank}")


def commands(*arguments: list[str]) -> list[tuple[int, str, str]]:
    """Status, standard output and error of ``narrowdeep ARGUMENTS`` in as many processes, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return _run(_command, len(arguments), list(arguments), port)
