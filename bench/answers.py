"""One real request to each server before any load, and whether the answers agree.

The request is the one that will be sent under load, over the same protocol: REST with
http.client, or with nghttp where it goes over HTTP/2, and gRPC with grpcio, which the
environment of KServe has. Standard library only.
"""

from __future__ import annotations

import http.client
import json
import math
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import loaders
from cases import Case, Load

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer: its bytes, how many of them its body has on the wire, its meaning."""

    content: bytes
    size: int
    value: Any


def ask_rest(name: str, port: int, case: Case, load: Load, body: Path) -> Answer:
    if load.protocol == "HTTP/2":
        content = _over_http2(port, case, load, body)
    else:
        content = _over_http1(name, port, case, load, body)
    try:
        return Answer(content, len(content), json.loads(content))
    except ValueError:
        raise SystemExit(f"{name} answered no JSON: {content[:300]!r}") from None


def _over_http1(name: str, port: int, case: Case, load: Load, body: Path) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"content-type": loaders.content_type(load)}
    connection.request("POST", case.path, body.read_bytes(), headers)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    if response.status != 200:
        shown = content[:300].decode(errors="replace")
        raise SystemExit(f"{name}: {response.status} {shown}")
    return content


def _over_http2(port: int, case: Case, load: Load, body: Path) -> bytes:
    # It does not tell the status, but an error has another body, and h2load counts
    # statuses later.
    argv = ["nghttp", "--timeout=60", "-d", str(body)]
    argv += ["-H", f"content-type: {loaders.content_type(load)}"]
    url = f"http://127.0.0.1:{port}{case.path}"
    return subprocess.check_output([*argv, url])


def ask_grpc(
    ports: Sequence[int], case: Case, body: Path, python: Path
) -> list[Answer]:
    """All servers from one process, since importing KServe takes seconds."""
    argv = [str(python), str(HERE / "ask_grpc.py"), case.path, str(body)]
    done = subprocess.run(
        [*argv, *map(str, ports)], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise SystemExit("a gRPC server did not answer OK: see above")
    answers = []
    for line in done.stdout.splitlines():
        seen = json.loads(line)
        message = bytes.fromhex(seen["message"])
        answers.append(Answer(message, 5 + len(message), seen["decoded"]))
    return answers


def same(left: Any, right: Any) -> bool:
    """Equal but for absent against null members, and float32 written two ways."""
    if isinstance(left, dict) and isinstance(right, dict):
        keys = left.keys() | right.keys()
        return all(same(left.get(key), right.get(key)) for key in keys)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, float) and isinstance(right, float):
        return math.isclose(left, right, rel_tol=1e-5, abs_tol=1e-7)
    return bool(left == right)
