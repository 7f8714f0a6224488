"""Use of CPU, memory, disk, network and GPU, as MLflow's own collectors measure it."""

from __future__ import annotations

import contextlib
import logging
from typing import Any


class SystemMetrics:
    """The collectors that work on this machine."""

    def __init__(self) -> None:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        # A slice of a GPU (MIG) has no utilisation counter, and the collector would warn of that at every sample.
        logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)
        self._collectors: list[Any] = []
        for kind in (CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor):
            with contextlib.suppress(Exception):  # no GPU, no network
                self._collectors.append(kind())

        for collector in self._collectors[:1]:
            collector.collect_metrics()  # a process's first reading of the CPU is always 0
            collector.clear_metrics()

    def read(self) -> dict[str, float]:
        """Return one sample under MLflow's own names, `system/...`; raises whatever a collector raises."""
        values: dict[str, float] = {}
        for collector in self._collectors:
            collector.collect_metrics()
            values |= {f"system/{key}": value for key, value in collector.aggregate_metrics().items()}
            collector.clear_metrics()
        return values

    def stop(self) -> None:
        """Collect nothing from now on."""
        self._collectors = []
