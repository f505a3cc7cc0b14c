"""What a server costs before it serves anything: memory and imports."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.server.process import ECHO, App, finish

# gRPC is served without the C core; its packages are imported with the first server.
GRPC = ("grpclib", "google")
HEAVY = ("torch", "ray", "grpc", "fastapi", "pandas", "numpy", "simdjson", "ml_dtypes")


def loaded(code: str, folder: Path) -> set[str]:
    code += "\nimport sys; print(*sys.modules)"
    result = finish("-W", "error", "-c", code, cwd=folder)
    assert result.status == 0, result.err
    return {name.partition(".")[0] for name in result.out.split()}


def test_importing_it_imports_nothing_heavy(tmp_path: Path) -> None:
    for module in ("kserve_lite", "kserve_lite.cli"):
        assert loaded(f"import {module}", tmp_path).isdisjoint((*HEAVY, *GRPC))


def test_defining_and_serving_a_json_model_imports_nothing_heavy(
    tmp_path: Path,
) -> None:
    code = """
import asyncio, urllib.request
from kserve_lite import Model, serve

async def predict(payload):
    return payload

async def main():
    async with serve(
        Model("m", predict=predict), http_port=0, host="127.0.0.1"
    ) as server:
        def ask():
            with urllib.request.urlopen(
                server.url + "/v1/models/m:predict", b'{"instances": [1]}'
            ) as answer:
                assert answer.read() == b'{"instances":[1]}'
        await asyncio.to_thread(ask)

asyncio.run(main())
"""
    assert loaded(code, tmp_path).isdisjoint(HEAVY)


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="needs Linux's /proc"
)
def test_an_idle_server_takes_little_memory(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(ECHO)
    with App("app.py", "--http_port", "0", cwd=tmp_path) as app:
        value = {"instances": [1]}
        assert app.ask("/v1/models/m:predict", value) == (200, value)
        status = Path(f"/proc/{app.process.pid}/status").read_text()
    (kilobytes,) = re.findall(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
    assert int(kilobytes) <= 60 * 1024
