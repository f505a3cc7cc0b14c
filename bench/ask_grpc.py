"""Ask gRPC servers once each: `ask_grpc.py PATH BODY_FILE PORT...`, a JSON line a port.

Runs in bench/.kserve-venv, since a client of neither server's making should judge
them: grpcio sends the body, and KServe's generated classes decode the answer. The line
has the message as it came, in hex, and what it means. An answer other than OK ends
the program with its status.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from kserve.protocol.grpc import (  # type: ignore[import-not-found, unused-ignore]
    grpc_predict_v2_pb2 as messages,
)

PREFIX = 5  # what gRPC puts before a message, and grpcio writes itself


def decoded(message: bytes) -> dict[str, Any]:
    """An answer as a plain dict; FP32 outputs only, raw or typed."""
    answer = messages.ModelInferResponse.FromString(message)
    outputs = []
    for index, output in enumerate(answer.outputs):
        if output.datatype != "FP32":
            raise SystemExit(f"an FP32 output was expected, not {output.datatype}")
        raw = answer.raw_output_contents
        data = (
            np.frombuffer(raw[index], "<f4") if raw else output.contents.fp32_contents
        )
        outputs.append(
            {
                "name": output.name,
                "shape": list(output.shape),
                "form": "raw" if raw else "typed",
                "data": [float(value) for value in data],
            }
        )
    return {"id": answer.id, "model": answer.model_name, "outputs": outputs}


def main() -> None:
    path, body, *ports = sys.argv[1:]
    message = Path(body).read_bytes()[PREFIX:]
    for port in ports:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary(path)
            try:
                answer = call(message, timeout=60, wait_for_ready=True)
            except grpc.RpcError as error:
                raise SystemExit(
                    f"port {port}: {error.code()} {error.details()}"
                ) from None
        print(json.dumps({"message": answer.hex(), "decoded": decoded(answer)}))


if __name__ == "__main__":
    main()
