"""How many CPUs a process may use: made-up trees of files, and this machine's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kserve_lite.dispatch.settings import cpu_limit, default_workers

V2_MOUNT = (
    "30 24 0:26 {root} {point} rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"
)
V1_MOUNT = "33 25 0:29 {root} {point} rw,relatime master:11 - cgroup cgroup rw,{what}"
OTHER_MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
31 25 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
34 25 0:30 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset
"""
POINT = "/sys/fs/cgroup"
V1_POINT = "/sys/fs/cgroup/cpu,cpuacct"


@pytest.fixture(autouse=True)
def _sixteen_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """An affinity that no tree here goes beyond, whatever this machine has."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))


def tree(root: Path, groups: str, mounts: str, **files: str) -> Path:
    """proc/self/cgroup, proc/self/mountinfo, and files by their path below /."""
    write(root, "/proc/self/cgroup", groups)
    write(root, "/proc/self/mountinfo", OTHER_MOUNTS + mounts + "\n")
    for path, text in files.items():
        write(root, path, text)
    return root


def write(root: Path, path: str, text: str) -> None:
    file = root / path.lstrip("/")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def v1_quota(folder: str, quota: str, period: str = "100000") -> dict[str, str]:
    return {
        f"{folder}/cpu.cfs_quota_us": f"{quota}\n",
        f"{folder}/cpu.cfs_period_us": f"{period}\n",
    }


@pytest.mark.parametrize(
    ("text", "cpus"),
    [
        ("200000 100000\n", 2),
        ("150000 100000\n", 2),
        ("100001 100000\n", 2),
        ("100000 100000\n", 1),
        ("10000 100000\n", 1),
        ("50000 25000\n", 2),
        ("9900000 100000\n", 16),
        ("max 100000\n", 16),
    ],
)
def test_version_2(text: str, cpus: int, tmp_path: Path) -> None:
    """In a container: its cgroup is the whole hierarchy."""
    mount = V2_MOUNT.format(root="/", point=POINT)
    root = tree(tmp_path, "0::/\n", mount, **{f"{POINT}/cpu.max": text})
    assert cpu_limit(root) == cpus
    assert default_workers(root) == min(32, cpus + 4)


@pytest.mark.parametrize(
    ("own", "parent", "cpus"),
    [
        ("max 100000", "300000 100000", 3),
        ("500000 100000", "300000 100000", 3),
        ("200000 100000", "300000 100000", 2),
        ("200000 100000", "max 100000", 2),
    ],
)
def test_version_2_below_parents(
    own: str, parent: str, cpus: int, tmp_path: Path
) -> None:
    """On a host, where the least of a slice's and a service's own quota counts."""
    place = "/kubepods.slice/pod1.slice/cri:1.scope"
    root = tree(
        tmp_path,
        f"0::{place}\n",
        V2_MOUNT.format(root="/", point=POINT),
        **{
            f"{POINT}{place}/cpu.max": own,
            f"{POINT}/kubepods.slice/cpu.max": parent,
            # A neighbour's counts for nothing.
            f"{POINT}/kubepods.slice/pod2.slice/cpu.max": "100000 100000",
        },
    )
    assert cpu_limit(root) == cpus


def test_version_2_with_a_group_that_is_gone(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        "0::/a/b (deleted)\n",
        V2_MOUNT.format(root="/", point=POINT),
        **{f"{POINT}/a/cpu.max": "400000 100000"},
    )
    assert cpu_limit(root) == 4


@pytest.mark.parametrize(
    ("quota", "period", "cpus"),
    [
        ("400000", "100000", 4),
        ("250000", "100000", 3),
        ("5000", "100000", 1),
        ("-1", "100000", 16),
        ("100000", "0", 16),
        ("0", "100000", 16),
    ],
)
def test_version_1(quota: str, period: str, cpus: int, tmp_path: Path) -> None:
    """Docker's: the mount shows a part of the hierarchy, the very one that counts."""
    place = "/docker/3f"
    root = tree(
        tmp_path,
        f"11:memory:{place}\n4:cpu,cpuacct:{place}\n1:name=systemd:{place}\n",
        V1_MOUNT.format(root=place, point=V1_POINT, what="cpu,cpuacct"),
        **v1_quota(V1_POINT, quota, period),
    )
    assert cpu_limit(root) == cpus


def test_version_1_below_parents(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        "4:cpuacct,cpu:/pods/one\n3:cpuset:/elsewhere\n",
        V1_MOUNT.format(root="/", point="/cgroups/cpu", what="cpu"),
        **v1_quota("/cgroups/cpu/pods/one", "700000"),
        **v1_quota("/cgroups/cpu/pods", "500000"),
        **v1_quota("/cgroups/cpu", "-1"),
        **v1_quota("/cgroups/cpu/elsewhere", "100000"),
    )
    assert cpu_limit(root) == 5


@pytest.mark.parametrize(("first", "second", "cpus"), [(3, 5, 3), (5, 3, 3)])
def test_hybrid(first: int, second: int, cpus: int, tmp_path: Path) -> None:
    mounts = [
        V1_MOUNT.format(root="/", point="/sys/fs/cgroup/cpu", what="cpu"),
        V2_MOUNT.format(root="/", point="/sys/fs/cgroup/unified"),
    ]
    root = tree(
        tmp_path,
        "2:cpuacct:/\n1:cpu:/x\n0::/y\n",
        "\n".join(mounts),
        **v1_quota("/sys/fs/cgroup/cpu/x", f"{first}00000"),
        **{"/sys/fs/cgroup/unified/y/cpu.max": f"{second}00000 100000"},
    )
    assert cpu_limit(root) == cpus


@pytest.mark.parametrize(
    ("place", "mounted"),
    [
        ("/../../host/pod", "/"),
        ("/on/the/host", "/mounted/part"),
        ("/mounted", "/mounted/part"),
        ("/pod", "/../.."),
        ("relative", "/"),
    ],
)
def test_a_place_that_is_not_below_the_mount_is_the_mount(
    place: str, mounted: str, tmp_path: Path
) -> None:
    root = tree(
        tmp_path,
        f"0::{place}\n",
        V2_MOUNT.format(root=mounted, point=POINT),
        **{f"{POINT}/cpu.max": "600000 100000"},
    )
    write(root, "/sys/host/pod/cpu.max", "100000 100000")
    assert cpu_limit(root) == 6


def test_a_mount_point_with_a_space(tmp_path: Path) -> None:
    mount = V2_MOUNT.format(root="/", point=r"/my\040groups")
    root = tree(tmp_path, "0::/", mount, **{"/my groups/cpu.max": "700000 100000"})
    assert cpu_limit(root) == 7


@pytest.mark.parametrize("point", ["/sys/fs/cgroup/cpu", V1_POINT])
def test_the_usual_places_without_proc(point: str, tmp_path: Path) -> None:
    for path, text in v1_quota(point, "800000").items():
        write(tmp_path, path, text)
    assert cpu_limit(tmp_path) == 8
    write(tmp_path, f"{POINT}/cpu.max", "300000 100000")
    assert cpu_limit(tmp_path) == 3


@pytest.mark.parametrize(
    "text",
    [
        "",
        "max",
        "many 100000",
        "200000",
        "200000 0",
        "-1 100000",
        "200000 100000 7",
        "1e5 100000",
        "9" * 5000 + " 1",
        "\0\0",
    ],
)
def test_garbage_limits_nothing(text: str, tmp_path: Path) -> None:
    mount = V2_MOUNT.format(root="/", point=POINT)
    root = tree(tmp_path, "0::/\n", mount, **{f"{POINT}/cpu.max": text})
    assert cpu_limit(root) == 16


@pytest.mark.parametrize("text", ["", "\n\n", "garbage", "0:", "::::", "a b - cgroup2"])
def test_garbage_of_proc_limits_nothing(text: str, tmp_path: Path) -> None:
    assert cpu_limit(tree(tmp_path, text, text)) == 16


def test_files_that_cannot_be_read_limit_nothing(tmp_path: Path) -> None:
    assert cpu_limit(tmp_path) == 16
    root = tree(tmp_path, "0::/\n", V2_MOUNT.format(root="/", point=POINT))
    (root / POINT.lstrip("/") / "cpu.max").mkdir(parents=True)
    assert cpu_limit(root) == 16
    (root / "proc/self/mountinfo").write_bytes(b"\xff\xfe - cgroup2 \xff")
    assert cpu_limit(root) == 16


def test_affinity_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mount = V2_MOUNT.format(root="/", point=POINT)
    root = tree(tmp_path, "0::/", mount, **{f"{POINT}/cpu.max": "900000 100000"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5})
    assert cpu_limit(root) == 2
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    assert cpu_limit(root) == 9
    assert (cpu_limit(tmp_path / "no"), default_workers(tmp_path / "no")) == (64, 32)


def test_without_affinity_the_machines_cpus_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on macOS."""
    monkeypatch.delattr(os, "sched_getaffinity")
    assert cpu_limit(tmp_path) == os.cpu_count()


@pytest.mark.skipif(sys.platform != "linux", reason="taskset is Linux's")
def test_this_machine() -> None:
    """One CPU of those that this process has is one CPU, whatever its cgroups say."""
    code = """
import os
from kserve_lite.dispatch.settings import cpu_limit, default_workers
print(cpu_limit(), len(os.sched_getaffinity(0)))
os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])
print(cpu_limit(), default_workers())
"""
    ran = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    before, after = ([int(n) for n in line.split()] for line in ran.stdout.splitlines())
    assert 1 <= before[0] <= before[1]
    assert after == [1, 5]
