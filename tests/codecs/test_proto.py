"""Our protobuf messages: made of our sources, alike others' and apart from them."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from kserve_lite.codecs import proto, v2_protobuf
from kserve_lite.messages import InferResponse


def test_descriptors_are_what_protoc_makes_of_the_sources(tmp_path: Path) -> None:
    folder = Path(str(files(proto)))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{folder}"]
    sources = sorted(str(path) for path in folder.glob("*.proto"))
    subprocess.run([*command, f"--descriptor_set_out={out}", *sources], check=True)
    compiled, committed = (
        descriptor_pb2.FileDescriptorSet.FromString(path.read_bytes())
        for path in (out, folder / "descriptors.binpb")
    )
    assert compiled == committed


# Each end in a process of its own: in one they would clash with one another.
OTHER_ENDS = {
    "tritonclient": "from tritonclient.grpc import service_pb2, model_config_pb2\n"
    "files = [model_config_pb2, service_pb2]",
    "kserve": "from kserve.protocol.grpc import grpc_predict_v2_pb2\n"
    "files = [grpc_predict_v2_pb2]",
}
DUMP = """
import json
print(json.dumps([file.DESCRIPTOR.serialized_pb.hex() for file in files]))
"""


@cache
def other_end(name: str) -> descriptor_pool.DescriptorPool:
    """The messages of another project's client."""
    done = subprocess.run(
        [sys.executable, "-c", OTHER_ENDS[name] + DUMP],
        check=True,
        capture_output=True,
        text=True,
    )
    pool = descriptor_pool.DescriptorPool()
    for file in json.loads(done.stdout.splitlines()[-1]):
        pool.AddSerializedFile(bytes.fromhex(file))
    return pool


@pytest.mark.parametrize("name", OTHER_ENDS)
def test_fields_are_those_of_other_clients(name: str) -> None:
    """Whatever the other side knows has our number, type and label."""
    pool: Any = other_end(name)
    ours: Any = proto.POOL
    todo = ["ModelInferRequest", "ModelInferResponse", "ModelMetadataResponse"]
    todo += ["ModelReadyRequest", "ServerMetadataResponse", "ServerLiveResponse"]
    if name == "tritonclient":
        todo += ["ModelStreamInferResponse"]
    else:
        todo += ["RepositoryModelLoadRequest", "RepositoryModelUnloadResponse"]
    pairs = [
        (
            pool.FindMessageTypeByName(f"inference.{kind}"),
            ours.FindMessageTypeByName(f"inference.{kind}"),
        )
        for kind in todo
    ]
    seen = 0
    while pairs:
        theirs, mine = pairs.pop()
        for field in theirs.fields:
            same = mine.fields_by_number[field.number]
            assert (same.name, same.type) == (field.name, field.type)
            seen += 1
            if field.message_type is not None:
                pairs.append((field.message_type, same.message_type))
    assert seen > 40


@pytest.mark.parametrize("name", OTHER_ENDS)
def test_what_we_write_others_read_and_back(name: str) -> None:
    pool: Any = other_end(name)
    kinds = [
        message_factory.GetMessageClass(pool.FindMessageTypeByName(f"inference.{kind}"))
        for kind in ("ModelInferRequest", "ModelInferResponse")
    ]
    theirs = kinds[0](model_name="m", id="7")
    theirs.parameters["n"].int64_param = 3
    tensor = theirs.inputs.add(name="x", datatype="FP32", shape=[2])
    tensor.contents.fp32_contents.extend([1.5, -2])
    parsed = v2_protobuf.parse(theirs.SerializeToString())
    request, _ = v2_protobuf.decode(parsed)
    assert request["x"].tolist() == [1.5, -2]
    assert request.parameters == {"n": 3}
    response = InferResponse(request.inputs, id="1", model_name="m")
    answer = b"".join(map(bytes, v2_protobuf.encode(response, raw=False)))
    read = kinds[1].FromString(answer)
    assert list(read.outputs[0].contents.fp32_contents) == [1.5, -2]


@pytest.mark.parametrize("name", OTHER_ENDS)
@pytest.mark.parametrize("ours_first", [True, False])
def test_others_live_in_one_process_with_us(name: str, *, ours_first: bool) -> None:
    ours = "import kserve_lite.rpc.app"
    lines = [ours, OTHER_ENDS[name], "import google.protobuf"]
    if not ours_first:
        lines.reverse()
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)
