"""One request of the model `m` over each protocol, and what became of it."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest

from kserve_lite import Server
from tests.rpc.stream import framed, proto
from tests.transports.h2client import GRPC, SERVICE, H2Client, connected

PROTOCOLS = ("v1", "v1-h2", "v2", "v2-h2", "grpc")
every_protocol = pytest.mark.parametrize("protocol", PROTOCOLS)

# The REST status and the gRPC code of the same outcome.
OK, BAD, LATE, BUSY, FAILED = (200, 0), (400, 3), (504, 4), (503, 14), (500, 13)


class Outcome(NamedTuple):
    """status: the HTTP status, or the gRPC code; rows: None of an error."""

    status: int
    rows: Any
    headers: dict[str, str]
    error: str


class Asker:
    """A connection that asks over one protocol. Rows are numbers or lists of them."""

    def __init__(self, protocol: str, client: Any) -> None:
        self.protocol = protocol
        self.client = client

    async def ask(
        self, rows: Sequence[Any], timeout_ms: int | None = None, request_id: str = ""
    ) -> Outcome:
        fields: tuple[tuple[str, str], ...] = ()
        if timeout_ms is not None:
            fields = (("x-request-timeout-ms", str(timeout_ms)),)
        if self.protocol == "grpc":
            return await self._call(rows, timeout_ms, request_id)
        if self.protocol.startswith("v1"):
            path, body = "/v1/models/m:predict", json.dumps({"instances": list(rows)})
        else:
            path = "/v2/models/m/infer"
            array = np.asarray(rows, np.float32)
            tensor = {
                "name": "x",
                "datatype": "FP32",
                "shape": array.shape,
                "data": array.tolist(),
            }
            body = json.dumps({"id": request_id, "inputs": [tensor]})
        answer = await self.client.fetch("POST", path, *fields, body=body.encode())
        value = answer.json
        if answer.status != 200:
            return Outcome(answer.status, None, answer.headers, value["error"])
        if self.protocol.startswith("v1"):
            return Outcome(200, value["predictions"], answer.headers, "")
        (output,) = value["outputs"]
        assert not request_id or value["id"] == request_id
        rows = np.reshape(output["data"], output["shape"]).tolist()
        return Outcome(200, rows, answer.headers, "")

    async def _call(
        self, rows: Sequence[Any], timeout_ms: int | None, request_id: str
    ) -> Outcome:
        array = np.asarray(rows, np.float32)
        message = {
            "model_name": "m",
            "id": request_id,
            "inputs": [{"name": "x", "datatype": "FP32", "shape": array.shape}],
            "raw_input_contents": [array.tobytes()],
        }
        fields: tuple[tuple[str, str], ...] = GRPC
        if timeout_ms is not None:
            fields = (*GRPC, ("grpc-timeout", f"{timeout_ms}m"))
        client: H2Client = self.client
        stream_id = await client.post(
            framed(proto("ModelInferRequest", **message)),
            *fields,
            path=f"{SERVICE}/ModelInfer",
        )
        await client.answer(stream_id)
        stream = client.streams[stream_id]
        told = stream.trailers or stream.headers
        code = int(told["grpc-status"])
        if code:
            return Outcome(code, None, stream.headers, told.get("grpc-message", ""))
        reply = type(proto("ModelInferResponse")).FromString(bytes(stream.body[5:]))
        assert not request_id or reply.id == request_id
        values = np.frombuffer(reply.raw_output_contents[0], np.float32)
        return Outcome(0, values.reshape(reply.outputs[0].shape).tolist(), {}, "")

    def is_(self, outcome: Outcome, kind: tuple[int, int]) -> bool:
        return outcome.status == kind[self.protocol == "grpc"]


@asynccontextmanager
async def asking(protocol: str, server: Server) -> AsyncGenerator[Asker]:
    if protocol == "grpc":
        async with H2Client(server.port) as client:
            yield Asker(protocol, client)
    else:
        version = "http2" if protocol.endswith("h2") else "http1"
        async with connected(version, server.port) as other:
            yield Asker(protocol, other)
