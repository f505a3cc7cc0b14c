"""The Dockerfile's rules; what it starts is what the Procfile starts, tested there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

from kserve_lite.server.settings import ServerSettings

ROOT = Path(__file__).parents[2]


class Instruction(NamedTuple):
    name: str
    rest: str


def stages() -> list[list[Instruction]]:
    """The instructions of each stage; a stage begins with its FROM."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M)
    found: list[list[Instruction]] = []
    for line in text.replace("\\\n", " ").splitlines():
        if line:
            instruction = Instruction(*line.split(" ", 1))
            if instruction.name == "FROM":
                found.append([])
            found[-1].append(instruction)
    return found


def of(stage: list[Instruction], name: str) -> list[str]:
    return [each.rest for each in stage if each.name == name]


def test_the_base_is_pinned_to_the_python_of_buildpacks() -> None:
    version = (ROOT / ".python-version").read_text().strip()
    for stage in stages():
        (base,) = of(stage, "FROM")
        assert re.fullmatch(rf"python:{version}-slim-[a-z]+( AS \w+)?", base)


def test_it_is_no_root_and_has_no_compiler_or_cache() -> None:
    *_, last = stages()
    (user,) = of(last, "USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)  # Kubernetes cannot read names
    assert of(last, "RUN") == []
    for stage in stages():
        assert all("--no-cache-dir" in run for run in of(stage, "RUN") if "pip" in run)


def test_one_process_gets_the_signals_and_reads_the_port() -> None:
    *_, last = stages()
    (entry,) = of(last, "ENTRYPOINT")
    (command,) = of(last, "CMD")
    # As JSON there is no shell in between, and so nothing that would expand $PORT; the
    # server reads it.
    procfile = (ROOT / "Procfile").read_text().removeprefix("web: ").split()
    assert [*json.loads(entry), *json.loads(command)] == procfile[:3]
    assert of(last, "EXPOSE") == [str(ServerSettings().http_port)]
    order = [each.name for each in last]
    assert order.index("USER") < order.index("ENTRYPOINT")


def test_what_it_copies_is_there_and_nothing_else_is_sent() -> None:
    ignored, *kept = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if not line.startswith("#")
    ]
    assert ignored == "*"
    assert kept[-1] == "**/__pycache__"
    sources = {
        source
        for stage in stages()
        for copied in of(stage, "COPY")
        if not copied.startswith("--from=")
        for source in copied.split()[:-1]
    }
    assert all((ROOT / source).exists() for source in sources)
    assert sorted(f"!{source}" for source in sources) == sorted(kept[:-1])
