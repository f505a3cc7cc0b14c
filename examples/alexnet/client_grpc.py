"""Ask the served AlexNet over gRPC: `python client_grpc.py [PICTURE] [HOST:PORT]`.

Sends a picture's bytes as they are, with no base64 as JSON needs it, and prints the
five likeliest classes. It needs nothing but kserve-lite; any other client of the Open
Inference Protocol, tritonclient or KServe's, asks the same way.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

from grpclib.client import Channel, UnaryUnaryMethod

from kserve_lite.codecs.proto import message_class

Request = message_class("inference.ModelInferRequest")
Response = message_class("inference.ModelInferResponse")


async def classify(picture: bytes, host: str, port: int) -> list[tuple[str, float]]:
    """The five likeliest classes and their probabilities, the likeliest first."""
    request = Request(model_name="alexnet")
    image = request.inputs.add(name="image", datatype="BYTES", shape=[1])
    image.contents.bytes_contents.append(picture)
    async with Channel(host, port) as channel:
        infer: UnaryUnaryMethod[Any, Any] = UnaryUnaryMethod(
            channel, "/inference.GRPCInferenceService/ModelInfer", Request, Response
        )
        answer = await infer(request)
    outputs = {output.name: output.contents for output in answer.outputs}
    names = [name.decode() for name in outputs["classes"].bytes_contents]
    return list(zip(names, outputs["probabilities"].fp32_contents, strict=True))


def main() -> None:
    arguments = dict(enumerate(sys.argv))
    picture = Path(arguments.get(1, Path(__file__).parent / "sample.jpg"))
    host, _, port = arguments.get(2, "127.0.0.1:8080").rpartition(":")
    found = asyncio.run(classify(picture.read_bytes(), host, int(port)))
    for name, probability in found:
        print(f"{probability:8.4%}  {name}")


if __name__ == "__main__":
    main()
