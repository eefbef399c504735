"""Commands under ``torchrun``: the processes that it starts, and an error in one of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
import typer

from narrowdeep.checks import check_number
from narrowdeep.commands.options import fail, one_line_errors
from narrowdeep.distributed.ranks import ALONE, LostRankError, Ranks


@contextmanager
def launched(device: str, timeout: float) -> Iterator[Ranks]:
    """The ranks that ``torchrun`` (or whoever sets RANK and WORLD_SIZE) has started; else this process alone.

    ``timeout``: seconds that one waits for another, in the beginning and in every exchange.

    Raises: ValueError where torch has no backend for the device; OSError where the others are not found.
    """
    with one_line_errors():
        timeout = check_number("timeout", timeout, positive=True)
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
        yield ALONE
        return
    backend = "nccl" if device.startswith("cuda") else "gloo"
    with one_line_errors():
        if not dist.is_available() or not getattr(dist, f"is_{backend}_available")():
            raise ValueError(
                f"several processes need the backend {backend} of torch.distributed for --device {device}, which this "
                "build of torch does not have"
            )
        try:
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise OSError(f"the other processes of torchrun cannot be reached: {reason}") from None
    try:
        yield Ranks.of()
    finally:
        with contextlib.suppress(RuntimeError):  # of ranks that have ended
            dist.destroy_process_group()


def local_device(device: str) -> str:
    """``cuda`` is the GPU of this process's own number on its machine."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" and "WORLD_SIZE" in os.environ else device


@contextmanager
def together(ranks: Ranks) -> Iterator[None]:
    """As ``one_line_errors``, on all ranks: where one fails all end, and what several say is said once."""
    failed: Exception | None = None
    try:
        yield
    except LostRankError as error:
        fail(str(error), status=1)
    except (ValueError, TypeError, OSError, OverflowError, MemoryError, RuntimeError) as error:
        failed = error
    message = None if failed is None else str(failed)
    try:
        told = ranks.all(message)
    except LostRankError as error:
        fail(str(error), status=1)
    if failed is not None and told.index(message) == ranks.rank:
        with one_line_errors():
            raise failed
    for rank, other in enumerate(told):
        if other is not None:
            if ranks.is_first:
                fail(f"rank {rank} has failed: {other}")
            raise typer.Exit(2)
