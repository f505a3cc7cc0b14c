"""Answers over gRPC in frames that no honest server would write."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import anyio
import numpy as np
import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import StreamEnded

from kserve_lite import Context, InferRequest, InferResponse, Tensor
from kserve_lite.codecs.proto import message_class, message_from
from kserve_lite.errors import InferenceFault, Kind
from kserve_lite.forwarding import ForwardingSettings, Upstream

OUTPUT = {"name": "y", "datatype": "UINT8", "shape": [3]}
DATA, PADDED = 0, 8


def message() -> bytes:
    """A ModelInferResponse as gRPC frames it."""
    made = message_from(
        message_class("inference.ModelInferResponse"),
        {"model_name": "m", "outputs": [OUTPUT]},
    )
    made.raw_output_contents.append(b"\1\2\3")
    written: bytes = made.SerializeToString()
    return struct.pack(">?I", False, len(written)) + written


def data(payload: bytes, flags: int = 0) -> bytes:
    """A DATA frame of the first stream (RFC 9113 6.1)."""
    return (
        struct.pack(">I", len(payload))[1:]
        + struct.pack(">BBI", 0, flags, 1)
        + (payload)
    )


@contextmanager
def answering(frames: Iterable[bytes], *, ends: bool) -> Iterator[str]:
    """A server that answers one call so. ends: whether trailers follow."""

    def serve() -> None:
        with listening.accept()[0] as there:
            connection = H2Connection(H2Configuration(client_side=False))
            connection.initiate_connection()
            while came := there.recv(1 << 16):
                for event in connection.receive_data(came):
                    if isinstance(event, StreamEnded):
                        head = [
                            (":status", "200"),
                            ("content-type", "application/grpc"),
                        ]
                        connection.send_headers(1, head)
                        there.sendall(connection.data_to_send() + b"".join(frames))
                        if ends:
                            status = [("grpc-status", "0")]
                            connection.send_headers(1, status, end_stream=True)
                there.sendall(connection.data_to_send())

    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(10)
        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"
        thread.join()


def infer(host: str) -> InferResponse:
    async def ask() -> InferResponse:
        settings = ForwardingSettings(
            predictor_host=host,
            predictor_protocol="grpc-v2",
            predictor_request_timeout_seconds=10,
        )
        upstream = Upstream(settings, host)
        request = InferRequest("m", (Tensor("x", np.ones(1), "FP64"),))
        try:
            answer = await upstream.infer(request, Context("m", protocol="grpc"))
        finally:
            await upstream.close()
        assert isinstance(answer, InferResponse)
        return answer

    return anyio.run(ask)


def test_an_answer_in_single_bytes_between_empty_frames() -> None:
    nothing = (data(b""), data(b"\0", PADDED))
    frames = [f for byte in message() for f in (*nothing, data(bytes((byte,))))]
    with answering([*frames, *nothing], ends=True) as host:
        assert infer(host).outputs[0].array.tolist() == [1, 2, 3]


def test_what_comes_behind_the_message_is_not_kept() -> None:
    frames = [data(message()), data(b"x")]
    with answering(frames, ends=False) as host, pytest.raises(InferenceFault) as caught:
        infer(host)
    assert caught.value.kind is Kind.MODEL_FAILED
