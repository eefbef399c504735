"""What runs the ops on this machine."""

from __future__ import annotations

import os
from typing import Any

from narrowdeep.ops import engine, triton_dispatch


def backends() -> dict[str, Any]:
    """The implementations of the ops and what each can use here; starts no device.

    Returns: ``"cpu"`` has ``instruction_sets`` (builds of the engine that this processor runs, fastest first) and
        ``used`` (the one that runs: the fastest, or what NARROWDEEP_ISA names); ``"triton"`` is
        ``triton_dispatch.triton_status()``.

    Raises: ValueError when NARROWDEEP_ISA names no instruction set of this machine, as every op then does.
    """
    names = engine.instruction_sets()
    used = os.environ.get("NARROWDEEP_ISA") or names[0]
    if used not in names:
        raise ValueError(f"NARROWDEEP_ISA must be one of {', '.join(names)} on this machine, got {used}")
    return {"cpu": {"instruction_sets": names, "used": used}, "triton": triton_dispatch.triton_status()}
