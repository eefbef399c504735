"""What goes into the JSON beside the times: the machine and what it can do at most."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.peak import measured_limits


@pytest.hookimpl
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["vector"] = torch.backends.cpu.get_cpu_capability()
    machine_info["limits"] = measured_limits()
