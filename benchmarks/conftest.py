"""What goes into the JSON beside the times: the machine and its measured peak."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.workloads import measured_peak


@pytest.hookimpl
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["vector"] = torch.backends.cpu.get_cpu_capability()
    machine_info["peak_flops"] = measured_peak()
