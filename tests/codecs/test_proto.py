"""Our protobuf messages: made of our sources, alike others' and apart from them."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import pytest
from google.protobuf import (
    descriptor_pb2,
    descriptor_pool,
    json_format,
    message_factory,
)

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
def test_we_have_the_fields_of_other_clients(name: str) -> None:
    """Whatever the other side knows of a prediction has our number, type and label."""
    pool: Any = other_end(name)
    ours: Any = proto.POOL
    todo = ["ModelInferRequest", "ModelInferResponse", "ModelMetadataResponse"]
    todo += ["ModelReadyRequest", "ServerMetadataResponse", "ServerLiveResponse"]
    if name == "tritonclient":
        todo += ["ModelStreamInferResponse", "ModelConfigRequest"]
        todo += ["ModelStatisticsRequest", "InferStatistics", "RepositoryIndexResponse"]
        todo += ["RepositoryIndexRequest", "ModelRepositoryParameter"]
    else:
        todo += ["RepositoryModelLoadRequest", "RepositoryModelUnloadRequest"]
        todo += ["RepositoryModelLoadResponse", "RepositoryModelUnloadResponse"]
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
        assert described(theirs).items() <= described(mine).items()
        for field in theirs.fields:
            same = mine.fields_by_number[field.number]
            seen += 1
            if field.message_type is not None:
                pairs.append((field.message_type, same.message_type))
    assert seen > 40


def described(message: Any) -> dict[int, tuple[Any, ...]]:
    """The fields of a message by number: all that matters on the wire and to code.

    By its description, since protobuf 5 and 7 share no other word for the label.
    """
    whole = descriptor_pb2.DescriptorProto()
    message.CopyToProto(whole)
    return {
        field.number: (
            field.name,
            field.type,
            field.label,
            field.type_name,
            whole.oneof_decl[field.oneof_index].name
            if field.HasField("oneof_index")
            else None,
        )
        for field in whole.field
    }


# Where KServe's SDK and Triton differ: KServe's names, and KServe's fields alone.
KSERVES = {
    "inference.RepositoryModelLoadRequest": {"model_name", "triton_model_name"},
    "inference.RepositoryModelUnloadRequest": {"model_name", "triton_model_name"},
    "inference.RepositoryModelLoadResponse": {"model_name", "isLoaded"},
    "inference.RepositoryModelUnloadResponse": {"model_name", "isUnloaded"},
}


def messages_of(holder: Any) -> list[Any]:
    """The messages of a file or message, and those inside of them."""
    found = getattr(holder, "message_types_by_name", None)
    inner = list((holder.nested_types_by_name if found is None else found).values())
    return inner + [deeper for one in inner for deeper in messages_of(one)]


def test_every_field_of_ours_is_tritons() -> None:
    pool: Any = other_end("tritonclient")
    file: Any = proto.POOL.FindFileByName("inference.proto")
    seen = 0
    for mine in messages_of(file):
        theirs = described(pool.FindMessageTypeByName(mine.full_name))
        for number, field in described(mine).items():
            if field[0] not in KSERVES.get(mine.full_name, ()):
                assert field == theirs[number], mine.full_name
                seen += 1
    assert seen > 120
    for enum in file.enum_types_by_name.values():
        theirs = pool.FindEnumTypeByName(enum.full_name)
        assert numbers(enum) == numbers(theirs)


def numbers(enum: Any) -> dict[str, int]:
    return {value.name: value.number for value in enum.values}


@pytest.mark.parametrize("verb", ["Load", "Unload"])
def test_tritons_name_of_a_model_is_the_second_field(verb: str) -> None:
    name = f"inference.RepositoryModel{verb}Request"
    theirs: Any = message_factory.GetMessageClass(
        cast("Any", other_end("tritonclient")).FindMessageTypeByName(name)
    )
    data = theirs(repository_name="r", model_name="m").SerializeToString()
    mine = proto.message_class(name).FromString(data)
    assert (mine.triton_model_name, mine.model_name) == ("m", "r")


@pytest.mark.parametrize("name", OTHER_ENDS)
def test_methods_are_those_of_other_clients(name: str) -> None:
    service = "inference.GRPCInferenceService"
    theirs: Any = cast("Any", other_end(name)).FindServiceByName(service)
    mine = proto.POOL.FindServiceByName(service).methods_by_name
    shared = [method for method in theirs.methods if method.name in mine]
    assert len(shared) == (len(mine) if name == "tritonclient" else 8)
    for method in shared:
        same = mine[method.name]
        assert method.input_type.full_name == same.input_type.full_name
        assert method.output_type.full_name == same.output_type.full_name
        assert method.client_streaming == same.client_streaming
        assert method.server_streaming == same.server_streaming


def test_a_message_is_made_of_its_json() -> None:
    kind = proto.message_class("inference.ModelConfig")
    document: dict[str, Any] = {
        "name": "m",
        "input": [{"name": "x", "data_type": "TYPE_STRING", "dims": [-1, 2**40]}],
    }
    config = proto.message_from(kind, document)
    assert config.name == "m"
    (given,) = config.input
    assert (given.data_type, list(given.dims)) == (13, [-1, 2**40])
    with pytest.raises(json_format.ParseError, match="no field named"):
        proto.message_from(kind, {"unknown": 1})


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
