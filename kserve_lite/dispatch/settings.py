"""How requests are run: the settings of this layer."""

from __future__ import annotations

import os
from dataclasses import dataclass


def default_workers() -> int:
    """min(32, CPUs + 4), of the CPUs that this process may use."""
    return min(32, len(os.sched_getaffinity(0)) + 4) if _has_affinity() else 8


def _has_affinity() -> bool:
    return hasattr(os, "sched_getaffinity")


@dataclass(frozen=True, slots=True)
class DispatchSettings:
    """How requests are run.

    max_asyncio_workers: threads that plain `def` handlers of all models share; 0 takes
        min(32, CPUs + 4).
    enable_latency_logging: log one line a request with the milliseconds of each stage.
    enable_model_control: let clients on other machines load and unload models.
    expose_errors: send the text of a handler's exception to the client (development).
    max_in_flight: requests of one model that run or wait; beyond it 503.
    max_queue_size: requests that wait: for a thread, of all models together, or for
        their turn with one model (max_concurrency, batching); beyond it 503.
    request_timeout: seconds that a request may take unless its client gives it less or
        more; 0: any number.
    grace_period: seconds that a stop, or unloading a model, gives to what is in flight.
    """

    max_asyncio_workers: int = 0
    enable_latency_logging: bool = False
    enable_model_control: bool = False
    expose_errors: bool = False
    max_in_flight: int = 4096
    max_queue_size: int = 1024
    request_timeout: float = 600.0
    grace_period: float = 30.0
