"""The client of KServe's documentation that asks the gRPC program."""

from pathlib import Path
from typing import Any

from kserve_lite.compat import InferenceGRPCClient, InferInput, InferRequest


async def main(address: str, picture: Path) -> list[Any]:
    client = InferenceGRPCClient(address, channel_args=[("grpc.enable_retries", 0)])
    infer_input = InferInput(
        name="input-0", shape=[1], datatype="BYTES", data=[picture.read_bytes()]
    )
    request = InferRequest(infer_inputs=[infer_input], model_name="alexnet")
    answer = await client.infer(infer_request=request)
    output = answer.outputs[0]
    await client.close()
    return [answer.id, output.name, output.shape, output.data]
