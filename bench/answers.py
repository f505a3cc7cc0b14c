"""One real request to each server before any load, and whether the answers agree.

The request is the one that will be sent under load, over the same protocol: REST with
http.client, or with nghttp where it goes over HTTP/2, and gRPC with grpcio, which the
environment of KServe has. An answer with binary tensors is taken apart into its JSON
and the bytes of each tensor, which must be the same to the bit. Standard library only.
"""

from __future__ import annotations

import http.client
import json
import math
import subprocess
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cases import JSON_SIZE, Case
from loaders import Request

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer: its bytes, how many of them its body has on the wire, its meaning."""

    content: bytes
    size: int
    value: Any


def ask_rest(name: str, request: Request, *, http2: bool) -> Answer:
    if http2:
        # It does not tell the status, but an error has another body, and h2load counts
        # statuses later.
        argv = ["nghttp", "--timeout=60", *request.options()]
        content, json_size = subprocess.check_output(argv), None
    else:
        content, json_size = _over_http1(name, request)
    try:
        if json_size is None:
            return Answer(content, len(content), json.loads(content))
        return Answer(content, len(content), binary(content, int(json_size)))
    except (ValueError, KeyError) as error:
        shown = f"{error!r}: {content[:300]!r}"
        raise SystemExit(f"{name} answered no V1 or V2: {shown}") from None


def _over_http1(name: str, request: Request) -> tuple[bytes, str | None]:
    """The body of the answer, and where its JSON ends if tensors follow."""
    url = urllib.parse.urlsplit(request.url)
    connection = http.client.HTTPConnection(url.netloc, timeout=60)
    headers = dict(request.headers)
    connection.request("POST", url.path, request.body.read_bytes(), headers)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    if response.status != 200:
        shown = content[:300].decode(errors="replace")
        raise SystemExit(f"{name}: {response.status} {shown}")
    json_size = response.headers.get(JSON_SIZE)
    if JSON_SIZE in headers and json_size is None:
        raise SystemExit(f"{name} answered in JSON, and was asked for binary tensors")
    return content, json_size


def binary(content: bytes, json_size: int) -> dict[str, Any]:
    """The JSON of a V2 answer with binary tensors, and their bytes by output's name."""
    head = json.loads(content[:json_size])
    tensors = {}
    start = json_size
    for output in head["outputs"]:
        end = start + output["parameters"]["binary_data_size"]
        tensors[output["name"]] = content[start:end]
        start = end
    if start != len(content):
        raise ValueError(
            f"{len(content)} bytes came, and its JSON accounts for {start}"
        )
    return {"json": head, "tensors": tensors}


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
