"""The settings of replicas."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ParallelSettings:
    """Where replicas run.

    ray_address: the Ray cluster to join: auto, HOST:PORT or ray://HOST:PORT. The
        default is one of this machine, which starts and stops with the server.
    """

    ray_address: str = ""
