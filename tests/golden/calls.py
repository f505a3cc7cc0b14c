"""The recorded calls of KServe's gRPC clients: how one is sent, and what must come.

`grpc.jsonl` is a copy of the contract's file. Records are sent in their order, by
grpcio, to one server. Tensors compare by value: we answer raw where the request was
raw, typed where it was typed. Used by test_golden_grpc.py, whose models are written
with the decorators, and by compat/test_golden_compat.py, whose models are KServe's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np
from google.protobuf import json_format

from kserve_lite.codecs.proto import POOL, message_class

COPY = Path(__file__).parent / "grpc.jsonl"
RECORDS = [json.loads(line) for line in COPY.read_text().splitlines()]

# How the contract says that contents and datatypes belong together.
FIELDS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
DTYPES = {
    "BOOL": "?",
    "INT8": "i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "UINT8": "u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "FP16": "<f2",
    "BF16": "<u2",
    "FP32": "<f4",
    "FP64": "<f8",
}


class Outcome(NamedTuple):
    code: str
    details: str
    response: Any


def check(record: dict[str, Any], channel: grpc.Channel) -> None:
    """Send a record to a server; fail unless it answers as `want` says."""
    want = record["want"]
    outcome = sent(channel, record)
    assert outcome.code == want["code"], outcome.details
    assert "secret" not in outcome.details
    if outcome.code == "OK" and record["method"] == "ModelInfer":
        travels_alike(record, outcome.response)
    if want["body"] != "same":
        return
    if outcome.code != "OK":
        assert outcome.details == record["details"]
        return
    expected = json_format.ParseDict(record["response"], reply_class(record)())
    if record["method"] == "ModelInfer":
        assert plain(outcome.response) == plain(expected)
    else:
        assert outcome.response == expected


def check_holds(name: str, holds: Any, channel: grpc.Channel) -> None:
    """Send a record whose body may be any; fail unless it holds what it must."""
    record = next(record for record in RECORDS if record["name"] == name)
    assert record["want"]["body"] == "any"
    if name == "unload":  # it is unloaded already, by the record before
        sent(channel, next(r for r in RECORDS if r["name"] == "load"))
    outcome = sent(channel, record)
    assert holds(outcome), outcome


def request_of(record: dict[str, Any]) -> Any:
    method = POOL.FindMethodByName(f"inference.GRPCInferenceService.{record['method']}")
    kind = message_class(method.input_type.full_name)
    return json_format.ParseDict(record["request"], kind())


def reply_class(record: dict[str, Any]) -> Any:
    method = POOL.FindMethodByName(f"inference.GRPCInferenceService.{record['method']}")
    return message_class(method.output_type.full_name)


def sent(channel: grpc.Channel, record: dict[str, Any]) -> Outcome:
    path = f"/inference.GRPCInferenceService/{record['method']}"
    call = channel.unary_unary(
        path,
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=reply_class(record).FromString,
    )
    try:
        reply = call(request_of(record), metadata=record["metadata"], timeout=20)
    except grpc.RpcError as error:
        failed: Any = error  # it is a grpc.Call too
        return Outcome(failed.code().name, failed.details() or "", None)
    return Outcome("OK", "", reply)


def unpacked(data: bytes) -> list[bytes]:
    """The elements of raw BYTES."""
    elements = []
    while data:
        size = int.from_bytes(data[:4], "little")
        elements.append(data[4 : 4 + size])
        data = data[4 + size :]
    return elements


def values(output: Any, raw: bytes | None) -> list[Any]:
    if raw is None:
        return list(getattr(output.contents, FIELDS[output.datatype]))
    assert not output.HasField("contents")
    if output.datatype == "BYTES":
        return unpacked(raw)
    array: np.ndarray = np.frombuffer(raw, DTYPES[output.datatype])
    return list(array.tolist())


def plain(reply: Any) -> dict[str, Any]:
    """A ModelInferResponse by value, however its tensors travelled."""
    raw = list(reply.raw_output_contents)
    assert len(raw) in (0, len(reply.outputs))
    outputs = [
        {
            "name": output.name,
            "datatype": output.datatype,
            "shape": list(output.shape),
            "parameters": {
                name: str(value)
                for name, value in output.parameters.items()
                if name != "binary_data_size"
            },
            "values": values(output, raw[index] if raw else None),
        }
        for index, output in enumerate(reply.outputs)
    ]
    return {
        "model": (reply.model_name, reply.model_version),
        "id": reply.id,
        "parameters": {name: str(value) for name, value in reply.parameters.items()},
        "outputs": outputs,
    }


def travels_alike(record: dict[str, Any], reply: Any) -> None:
    """Raw for raw and typed for typed; half precision always raw."""
    raw = bool(record["request"].get("raw_input_contents"))
    halves = any(output.datatype in ("FP16", "BF16") for output in reply.outputs)
    assert bool(reply.raw_output_contents) == (raw or halves)
    for output in reply.outputs:
        assert "binary_data_size" not in output.parameters


def first(reply: Any) -> list[Any]:
    found: list[Any] = plain(reply)["outputs"][0]["values"]
    return found


# What the answer must hold where `want` says "any" and gives the reason.
HOLDS: list[tuple[str, Any]] = [
    ("infer_FP16", lambda o: "raw" in o.details and "FP16" in o.details),
    ("infer_BF16", lambda o: "raw" in o.details and "BF16" in o.details),
    ("raw_UINT16", lambda o: first(o.response) == [1, 0]),
    ("raw_UINT64", lambda o: first(o.response) == [1, 0]),
    ("raw_INT16", lambda o: first(o.response) == [1, 0]),
    ("raw_FP16", lambda o: first(o.response) == [1.0, 0.0]),
    ("raw_FP64", lambda o: first(o.response) == [1.0, 0.0]),
    ("raw_BYTES", lambda o: first(o.response) == [b"a", b"\xff"]),
    ("raw_BF16", lambda o: first(o.response) == [0x3F80]),
    (
        "shape_mismatch",
        lambda o: all(w in o.details for w in ("'in0'", "FP32[3]", "3", "got 1")),
    ),
    ("ret_noid", lambda o: o.response.id == "g1"),
    ("ret_noneid", lambda o: o.response.id == "g1"),
    ("req_out_unknown", lambda o: "'zz'" in o.details),
    ("load", lambda o: o.response.isLoaded),
    ("unload", lambda o: o.response.isUnloaded),
]
