"""How requests are run: the settings of this layer, and how many CPUs they count with.

What a container may use is in its cgroups: `os.cpu_count()` is the machine's, and the
affinity knows cpusets but no quotas. Nothing here raises: a file that is missing, or
that does not say what it should, limits nothing.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True, slots=True)
class DispatchSettings:
    """How requests are run.

    max_asyncio_workers: threads that plain `def` handlers of all models share; 0 takes
        min(32, CPUs + 4), of the CPUs that affinity and cgroups leave to the process.
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


def default_workers(root: Path = Path("/")) -> int:
    """min(32, CPUs + 4), of the CPUs that this process may use (`cpu_limit`)."""
    return min(32, cpu_limit(root) + 4)


def cpu_limit(root: Path = Path("/")) -> int:
    """CPUs that this process may use, at least 1: the least of affinity and quotas.

    root: where proc/ and sys/ are. A quota of one and a half CPUs counts as two.
    """
    if hasattr(os, "sched_getaffinity"):
        cpus = len(os.sched_getaffinity(0))
    else:  # macOS
        cpus = os.cpu_count() or 1
    return min([cpus, *_quotas(root)])


# Where the file system of each version of cgroups is, if mountinfo(5) does not say:
# type, the part of the hierarchy that is mounted, and the mount point.
_USUAL = (
    ("cgroup2", "/", "/sys/fs/cgroup"),
    ("cgroup", "/", "/sys/fs/cgroup/cpu"),
    ("cgroup", "/", "/sys/fs/cgroup/cpu,cpuacct"),
)


def _quotas(root: Path) -> Iterator[int]:
    """The quotas of the process's cgroups and of all their parents, in CPUs.

    Version 2 and the cpu controller of version 1 may both be there (hybrid).
    """
    groups = _groups(_read(root / "proc/self/cgroup"))
    mounts = list(_mounts(_read(root / "proc/self/mountinfo"))) or _USUAL
    for kind, mounted, point in mounts:
        top = root / point.lstrip("/")
        inside = _inside(groups.get(kind, "/"), mounted)
        for folder in (inside, *inside.parents):
            if kind == "cgroup2":
                words = _read(top / folder / "cpu.max").split()
            else:
                words = _read(top / folder / "cpu.cfs_quota_us").split()
                words += _read(top / folder / "cpu.cfs_period_us").split()
            with contextlib.suppress(ValueError):  # "max", or no numbers at all
                quota, period = map(int, words)
                if quota > 0 and period > 0:  # -1 is no quota
                    yield -(-quota // period)


def _groups(text: str) -> dict[str, str]:
    """The process's place in the hierarchies that count, of /proc/self/cgroup."""
    places = {}
    for line in text.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, place = rest.partition(":")
        if "cpu" in controllers.split(","):
            places["cgroup"] = place
        elif number == "0" and not controllers:
            places["cgroup2"] = place
    return places


def _mounts(text: str) -> Iterator[tuple[str, str, str]]:
    """Mounted cgroup file systems that count, of mountinfo(5), as `_USUAL` has them."""
    for line in text.splitlines():
        mount, _, filesystem = line.partition(" - ")
        words, options = mount.split(), filesystem.split()
        if len(words) < 6 or len(options) < 3:
            continue
        kind, controllers = options[0], options[2].split(",")
        if kind == "cgroup2" or (kind == "cgroup" and "cpu" in controllers):
            yield kind, _unescape(words[3]), _unescape(words[4])


def _unescape(path: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), path)


def _inside(place: str, mounted: str) -> PurePosixPath:
    """A cgroup's place below the mount point; the mount point if it is not there.

    A container sees its own cgroup as the whole hierarchy, while /proc/self/cgroup may
    show its place on the host, or one with ".." above its namespace.
    """
    path = PurePosixPath(place)
    if ".." in path.parts or not path.is_relative_to(mounted):
        return PurePosixPath()
    return path.relative_to(mounted)


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8", "surrogateescape")
    except (OSError, ValueError):
        return ""
