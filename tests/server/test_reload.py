"""`--reload`: the program starts again when one of its files changes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import anyio.lowlevel
import pytest

from kserve_lite import StartupError
from kserve_lite.server.reloading import changes
from tests.server.fleet import APP, PREDICT, Fleet, exists, until
from tests.server.process import finish
from tests.server.test_run import CLI, one_line

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="needs Linux's /proc"
)

ANSWERS = APP.replace('{"pid": os.getpid()}', '{"pid": os.getpid(), "is": VALUE}')


def program(value: str) -> str:
    return f"VALUE = {value}\n{ANSWERS}"


@pytest.mark.parametrize(
    ("start", "workers"), [(("app.py",), 0), ((*CLI, "app:model"), 2)], ids=str
)
def test_a_change_is_served(
    tmp_path: Path, start: tuple[str, ...], workers: int
) -> None:
    file = tmp_path / "app.py"
    file.write_text(program("1"))
    with Fleet(tmp_path, "--reload", program=start, workers=workers) as fleet:

        def value() -> object:
            status, answer = fleet.ask(PREDICT, {"instances": ["pid"]})
            assert status == 200
            return answer["is"]

        assert value() == 1
        before = fleet.workers
        assert len(before) == (workers or 1)
        file.write_text(program("2"))
        until(lambda: value() == 2)
        assert not before & fleet.workers
        file.write_text(program("("))
        seen = fleet.log("waiting for a file to change")
        assert "app.py changed: reloading" in seen
        file.write_text(program("3"))
        # It waits until the program is right again.
        until(lambda: value() == 3)
        pids = fleet.workers
        result = fleet.stop()
        assert not any(exists(pid) for pid in pids)
    assert result.status == 0


def test_it_waits_where_the_first_start_fails(tmp_path: Path) -> None:
    file = tmp_path / "app.py"
    file.write_text("import nothing_of_that_name\n")
    with Fleet(
        tmp_path, "--reload", program=(*CLI, "app:model"), workers=0, serves=False
    ) as fleet:
        assert "nothing_of_that_name" in fleet.log("waiting for a file to change")
        file.write_text(program("1"))
        fleet._read_banner()
        assert fleet.pid() in fleet.workers


def test_other_files_are_not_looked_at(tmp_path: Path) -> None:
    file = tmp_path / "app.py"
    file.write_text(program("1"))
    with Fleet(tmp_path, "--reload", workers=0) as fleet:
        before = fleet.pid()
        (tmp_path / "notes.txt").write_text("x")
        (tmp_path / "__pycache__").mkdir(exist_ok=True)
        (tmp_path / "__pycache__" / "app.py").write_text("x")
        assert fleet.pid() == before
        file.write_text(program("2"))
        assert "notes" not in fleet.log("changed: reloading")


def test_without_watchfiles_one_line_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(APP)
    (tmp_path / "watchfiles.py").write_text("raise ImportError\n")
    line = one_line(finish("app.py", "--reload", cwd=tmp_path, PORT="0"))
    assert "pip install 'kserve-lite[reload]'" in line


@pytest.mark.anyio
async def test_a_stop_ends_it(tmp_path: Path) -> None:
    stop = asyncio.Event()
    seen: list[list[Path]] = []

    async def watch() -> None:
        seen.extend([files async for files in changes(tmp_path, stop=stop)])

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watch)
        await anyio.lowlevel.checkpoint()
        stop.set()
    assert seen == []


@pytest.mark.anyio
async def test_what_cannot_be_watched_is_told(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"--reload cannot watch .*/nothing: "):
        await anext(changes(tmp_path / "nothing", stop=asyncio.Event()))
