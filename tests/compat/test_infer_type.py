"""Tensors, requests and answers of compat: what KServe's do not do, or do wrong.

And what becomes of them between a server and a model. What is the same as KServe's is
in `beside_kserve.py`.
"""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import numpy as np
import pytest

import kserve_lite.compat.protocol.infer_type as ours
from kserve_lite import messages
from kserve_lite.codecs import v2
from kserve_lite.compat.errors import InferenceError, InvalidInput
from kserve_lite.compat.protocol.grpc.grpc_predict_v2_pb2 import (
    InferParameter,
    ModelInferRequest,
)
from kserve_lite.errors import InferenceFault
from kserve_lite.tensors import DATATYPES, Tensor, numpy_dtype
from tests.compat.tensors import VALUES, binary_request, grpc_request

# --- better than KServe's -------------------------------------------------------------


def test_better_answers_are_not_changed_by_being_written() -> None:
    output = ours.InferOutput("a", [2], "FP32", np.ones(2, np.float32))
    response = ours.InferResponse("7", "m", [output], use_binary_outputs=True)
    first = response.to_rest(), response.to_grpc()
    assert isinstance(output.data, np.ndarray)
    assert output.parameters is None
    assert (response.to_rest(), response.to_grpc()) == first
    request = ours.InferRequest("m", [ours.InferInput("a", [1], "BYTES", ["é"])], "7")
    request.to_grpc()
    assert request.inputs[0].data == ["é"]


def test_better_the_arguments_are_the_callers() -> None:
    parameters = {"p": 1}
    tensor = ours.InferInput("a", [1], "INT8", parameters=parameters)
    tensor.set_data_from_numpy(np.ones(1, np.int8))
    assert parameters == {"p": 1}
    assert tensor.parameters == {"p": 1, "binary_data_size": 1}
    array = np.ones(1, np.int8)
    tensor.set_data_from_numpy(array)
    array[0] = 9
    assert tensor.as_numpy().tolist() == [1]


@pytest.mark.parametrize("datatype", ["INT32", "BYTES"])
def test_better_empty_tensors_travel_every_way(datatype: str) -> None:
    output = ours.InferOutput("a", [0], datatype, [])
    for binary in (True, False):
        answer = ours.InferResponse("7", "m", [output], use_binary_outputs=binary)
        body, size = answer.to_rest()
        if size is None:
            assert isinstance(body, dict)
            back = ours.InferResponse.from_rest(body)
        else:
            assert isinstance(body, bytes)
            back = ours.InferResponse.from_bytes(body, size)
        assert back.outputs[0].as_numpy().shape == (0,)
        again = ours.InferResponse.from_grpc(answer.to_grpc())
        assert again.outputs[0].as_numpy().shape == (0,)
    tensor = ours.InferInput("a", [0], "FP32")
    tensor.set_data_from_numpy(np.zeros(0, np.float32))
    body, size = ours.InferRequest("m", [tensor]).to_rest()
    assert isinstance(body, bytes)
    assert len(body) == size
    assert json.loads(body)["inputs"][0]["parameters"] == {"binary_data_size": 0}


def test_better_all_tensors_of_a_message_go_the_same_way() -> None:
    listed = ours.InferOutput("a", [1], "INT32", [1])
    array = ours.InferOutput("b", [2], "FP32", np.ones(2, np.float32))
    message = ours.InferResponse("7", "m", [listed, array]).to_grpc()
    assert list(map(len, message.raw_output_contents)) == [4, 8]
    inputs = [
        ours.InferInput("a", [1], "INT32", [1]),
        ours.InferInput("b", [1], "FP16", [0.5]),
    ]
    message = ours.InferRequest("m", inputs).to_grpc()
    assert list(map(len, message.raw_input_contents)) == [4, 2]


def test_better_raw_answers_may_be_made_of_arrays() -> None:
    output = ours.InferOutput("a", [2], "FP32", np.ones(2, np.float32))
    message = ours.InferResponse("7", "m", [output], use_binary_outputs=True).to_grpc()
    assert message.raw_output_contents == [b"\x00\x00\x80?" * 2]


def test_better_numbers_of_parameters() -> None:
    request = ours.InferRequest("m", [], parameters={"f": 1.5, "u": 2**63})
    parameters = request.to_grpc().parameters
    assert parameters["f"].double_param == 1.5
    assert parameters["u"].uint64_param == 2**63
    assert ours.to_http_parameters(parameters) == {"f": 1.5, "u": 2**63}
    empty = {"e": InferParameter()}
    assert ours.to_http_parameters(empty) == {}
    with pytest.raises(InvalidInput, match="'p' must be"):
        ours.to_grpc_parameters({"p": []})


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_better_half_floats(datatype: str) -> None:
    tensor = ours.InferInput("a", [2], datatype, [1.5, -2.0])
    assert tensor.as_numpy().dtype == numpy_dtype(datatype)
    body, size = ours.InferRequest("m", [tensor], "7").to_rest()
    assert isinstance(body, dict)
    assert size is None
    assert body["inputs"][0]["data"] == [1.5, -2.0]
    tensor.set_data_from_numpy(np.array([1.5, -2.0], numpy_dtype(datatype)))
    message = ours.InferRequest("m", [tensor]).to_grpc()
    back = ours.InferRequest.from_grpc(message)
    assert back.inputs[0].as_numpy().tolist() == [1.5, -2.0]
    answer = ours.InferResponse("7", "m", [ours.InferOutput("a", [1], datatype, [2.0])])
    body, _ = answer.to_rest()
    assert isinstance(body, dict)
    assert body["outputs"][0]["data"] == [2.0]


def test_better_text_arrays_are_bytes() -> None:
    array = np.array(["a", "é"])
    for binary in (True, False):
        tensor = ours.InferInput("a", [2], "BYTES")
        tensor.set_data_from_numpy(array, binary_data=binary)
        assert tensor.as_string() == ["a", "é"]


def test_better_as_string_takes_what_the_protocols_bring() -> None:
    for data in (["a", "é"], [b"a", "é".encode()], [["a"], ["é"]]):
        assert ours.InferInput("a", [2], "BYTES", data).as_string() == ["a", "é"]
    message = grpc_request(ModelInferRequest, "BYTES", raw=True)
    assert ours.InferRequest.from_grpc(message).inputs[0].as_string() == ["a", "é"]
    with pytest.raises(InvalidInput, match="no text"):
        ours.InferInput("a", [1], "BYTES", [b"\xff"]).as_string()


def test_better_the_version_of_a_model_is_kept() -> None:
    body = b'{"model_name":"m","model_version":"3","id":"7","outputs":[]}'
    assert ours.InferResponse.from_bytes(body, len(body)).model_version == "3"


def test_better_a_dataframe_of_raw_inputs() -> None:
    message = grpc_request(ModelInferRequest, "FP32", raw=True)
    frame = ours.InferRequest.from_grpc(message).as_dataframe()
    assert frame["a"].tolist() == VALUES["FP32"]
    assert ours.InferRequest("m", []).as_dataframe().empty


BINARY = '{"inputs":[{"name":"a","datatype":"%s","shape":[2],"parameters":%s}]}'
MALFORMED = {
    "no-json": b"{",
    "no-object": b"[]",
    "no-inputs": b"{}",
    "inputs": b'{"inputs":1}',
    "tensor": b'{"inputs":[{}]}',
    "no-data": b'{"inputs":[{"name":"a","datatype":"INT8","shape":[1]}]}',
    "name": b'{"inputs":[{"name":1,"datatype":"INT8","shape":[1],"data":[1]}]}',
    "shape": b'{"inputs":[{"name":"a","datatype":"INT8","shape":[1.5],"data":[1]}]}',
    "parameters": (BINARY % ("INT8", "5")).encode(),
    "short": (BINARY % ("INT8", '{"binary_data_size":2}')).encode() + b"|x",
    "long": (BINARY % ("INT16", '{"binary_data_size":3}')).encode() + b"|xyz",
    "odd": (BINARY % ("INT8", '{"binary_data_size":"2"}')).encode() + b"|xy",
    "text": (BINARY % ("BYTES", '{"binary_data_size":5}')).encode() + b"|\2\0\0\0x",
}


@pytest.mark.parametrize("name", MALFORMED)
def test_better_malformed_bodies_are_the_senders_fault(name: str) -> None:
    head, _, rest = MALFORMED[name].partition(b"|")
    with pytest.raises(InvalidInput):
        ours.InferRequest.from_bytes(head + rest, len(head), "m")


@pytest.mark.parametrize("size", [-1, 3])
def test_better_a_json_length_beyond_the_body(size: int) -> None:
    with pytest.raises(InvalidInput, match="the body has 2"):
        ours.InferRequest.from_bytes(b"{}", size, "m")


def test_better_sizes_that_are_strings() -> None:
    body = b'{"inputs":[{"name":"a","datatype":"INT8","shape":["2"],"data":[1,2]}]}'
    request = ours.InferRequest.from_bytes(body, len(body), "m")
    assert request.inputs[0].shape == [2]
    assert request.inputs[0].as_numpy().tolist() == [1, 2]


def test_better_misfits_name_what_is_wrong() -> None:
    with pytest.raises(InvalidInput, match=r"'a' has 2 elements.*\[3\]"):
        ours.InferInput("a", [3], "INT8", [1, 2]).as_numpy()
    for data in (None, [[1], [2, 3]], [300], ["x"]):
        with pytest.raises(InvalidInput, match="'a'"):
            ours.InferInput("a", [2], "INT8", data).as_numpy()
    # Of an output it is the model's fault, so no InvalidInput, which is a 400.
    with pytest.raises(ValueError, match="'a' has no data") as caught:
        ours.InferResponse("7", "m", [ours.InferOutput("a", [1], "INT8")]).to_native()
    assert not isinstance(caught.value, InferenceFault)
    with pytest.raises(InferenceError, match="cannot hold"):
        ours.InferOutput("a", [1], "INT8", np.ones(1)).to_native()


def test_better_malformed_raw_text() -> None:
    for raw in (b"\x01", b"\x05\0\0\0x"):
        with pytest.raises(InvalidInput, match="amid its element 0"):
            ours.deserialize_bytes_tensor(raw)


@pytest.mark.parametrize(
    ("datatype", "raw", "words"),
    [
        ("FP32", b"123", "3 raw bytes"),
        ("FP32", b"12345678" * 2, "4 elements"),
        ("BYTES", b"\1\0\0", "amid its element"),
    ],
)
def test_better_raw_bytes_that_do_not_fit_are_the_fault_of_who_wrote_them(
    datatype: str, raw: bytes, words: str
) -> None:
    """A client's input is refused; the output of a model is its own failure."""
    infer_input = ours.InferInput("x", [2], datatype)
    infer_input.set_raw(raw)
    with pytest.raises(InvalidInput, match=f"'x'.*{words}"):
        infer_input.as_numpy()
    response = ours.InferResponse(
        "7", "m", [ours.InferOutput("x", [2], datatype)], raw_outputs=[raw]
    )
    with pytest.raises(ValueError, match=f"'x'.*{words}") as failed:
        response.to_native()
    assert not isinstance(failed.value, InvalidInput)


def test_better_data_take_the_place_of_raw_bytes() -> None:
    tensor = ours.InferInput("a", [1], "INT8", [])
    tensor._raw_data = b"\x05"
    tensor.data = [7]
    assert tensor.as_numpy().tolist() == [7]


# --- what servers have ----------------------------------------------------------------


def native_request(datatype: str) -> messages.InferRequest:
    values = [*VALUES[datatype], *VALUES[datatype]] if datatype in VALUES else [1.5] * 4
    array = np.array(values, numpy_dtype(datatype)).reshape(2, 2)
    return messages.InferRequest(
        "m",
        (Tensor("a", array, datatype, {"p": 1}),),
        "7",
        parameters={"x": 1.5},
        outputs=(messages.RequestedOutput("o", {"binary_data": True}),),
    )


def told(request: messages.InferRequest | messages.InferResponse) -> Any:
    tensors = request.inputs if hasattr(request, "inputs") else request.outputs
    return [
        request.id,
        request.model_name,
        request.model_version,
        dict(request.parameters),
        [(t.name, t.datatype, t.array.tolist(), dict(t.parameters)) for t in tensors],
    ]


@pytest.mark.parametrize("datatype", DATATYPES)
@pytest.mark.parametrize("way", ["rest", "grpc", "raw"])
def test_a_request_comes_and_goes_as_it_is(datatype: str, way: str) -> None:
    native = native_request(datatype)

    def made() -> ours.InferRequest:
        return ours.InferRequest.from_native(
            native, from_grpc=way != "rest", raw=way == "raw"
        )

    request = made()
    back = request.to_native()
    assert told(back) == told(native)
    assert back.outputs == native.outputs
    assert np.shares_memory(back.inputs[0].array, native.inputs[0].array)
    values = native.inputs[0].array.tolist()
    if (way, datatype) == ("rest", "BYTES"):
        values = [["a", "é"], ["a", "é"]]
    assert request.inputs[0].as_numpy().tolist() == values
    assert (request.use_binary_outputs, vars(request)["from_grpc"]) == (
        way == "raw",
        way != "rest",
    )
    # What was looked at is the same still.
    assert request == made()
    assert told(request.to_native()) == told(native)


def test_a_rest_request_looks_as_in_kserve() -> None:
    request = ours.InferRequest.from_native(native_request("BYTES"))
    assert request.inputs[0].data == [["a", "é"], ["a", "é"]]
    assert request.inputs[0]._raw_data is None
    assert request.parameters == {"x": 1.5}
    assert request.request_outputs == [ours.RequestedOutput("o", {"binary_data": True})]
    bare = ours.InferRequest.from_native(messages.InferRequest("m", ()))
    assert (bare.id, bare.model_version, bare.parameters) == (None, None, None)
    assert bare.request_outputs is None


@pytest.mark.parametrize(
    ("sent", "seen"),
    [("[1, 2]", [1, 2]), ("[[1.0], [2]]", [[1.0], [2]])],
)
def test_data_of_json_are_as_they_were_sent(sent: str, seen: list[Any]) -> None:
    body = BINARY % ("FP32", "{}")
    body = body.replace('"parameters"', f'"data":{sent},"parameters"')
    native = v2.decode(body.encode(), model_name="m")
    tensor = ours.InferRequest.from_native(native).inputs[0]
    assert repr(tensor.data) == repr(seen)
    assert tensor.as_numpy().tolist() == [1.0, 2.0]
    assert tensor.as_numpy().dtype == np.float32


def test_requests_can_be_copied_and_sent_to_processes() -> None:
    body, size = binary_request("FP32")
    native = v2.decode(body, model_name="m", json_size=size)
    request = ours.InferRequest.from_native(native)
    for other in (copy.deepcopy(request), pickle.loads(pickle.dumps(request))):
        assert other.inputs[0].data == VALUES["FP32"]
        assert other == request


def test_data_of_binary_tensors_are_flat() -> None:
    body, size = binary_request("BYTES")
    native = v2.decode(body, model_name="m", json_size=size)
    assert ours.InferRequest.from_native(native).inputs[0].data == ["a", "é"]


def test_a_grpc_request_looks_as_in_kserve() -> None:
    request = ours.InferRequest.from_native(native_request("BYTES"), from_grpc=True)
    assert request.inputs[0].data == [b"a", "é".encode()] * 2
    assert request.parameters["x"].double_param == 1.5
    assert request.parameters.get("y") is None
    assert request.parameters["y"].string_param == ""
    assert request.inputs[0].parameters == {"p": 1}
    raw = ours.InferRequest.from_native(
        native_request("INT16"), from_grpc=True, raw=True
    )
    assert raw.inputs[0].data == []
    assert raw.inputs[0]._raw_data == np.array([1, -2, 1, -2], "<i2").tobytes()
    bare = ours.InferRequest.from_native(messages.InferRequest("m", ()), from_grpc=True)
    assert (bare.id, bare.model_version) == ("", "")


def test_what_a_model_does_to_an_input_stays_with_it() -> None:
    native = native_request("FP32")
    request = ours.InferRequest.from_native(native)
    array = request.inputs[0].as_numpy()
    array *= 0
    request.inputs[0].data[0][0] = 9.0
    assert request.inputs[0].as_numpy()[0, 0] == 9.0
    assert native.inputs[0].array.tolist() == [[0.5, -2.25], [0.5, -2.25]]


def test_no_list_is_made_of_a_tensor_that_only_passes() -> None:
    class Watched(np.ndarray):
        def tolist(self) -> Any:
            raise AssertionError("a list was made")

    array = np.ones(4, np.float32).view(Watched)
    native = messages.InferRequest("m", (Tensor("a", array, "FP32"),))
    request = ours.InferRequest.from_native(native)
    assert request.inputs[0].as_numpy().sum() == 4
    output = ours.InferOutput("a", [4], "FP32")
    output.set_data_from_numpy(array, binary_data=False)
    ours.InferResponse("7", "m", [output]).to_native()
    request.to_native()
    with pytest.raises(AssertionError):
        _ = request.inputs[0].data


def test_an_answer_comes_and_goes_as_it_is() -> None:
    array = np.arange(4, dtype=np.int32).reshape(2, 2)
    native = messages.InferResponse(
        (Tensor("a", array, "INT32", {"p": 1}),), "7", "m", "2", {"x": 1}
    )
    response = ours.InferResponse.from_native(native)
    assert told(response.to_native()) == told(native)
    assert response.outputs[0].as_numpy().tolist() == array.tolist()
    unsure = ours.InferResponse(None, None, []).to_native()
    assert (unsure.id, unsure.model_name, unsure.model_version) == (None, None, None)


def test_an_answer_has_the_outputs_that_the_handler_passed_on() -> None:
    outputs = [ours.InferOutput(name, [1], "INT8", [1]) for name in "ab"]
    asked = [ours.RequestedOutput("b")]
    response = ours.InferResponse("7", "m", outputs, requested_outputs=asked)
    assert [tensor.name for tensor in response.to_native().outputs] == ["b"]
    response._requested_outputs = [ours.RequestedOutput("zz")]
    with pytest.raises(InvalidInput, match="zz"):
        response.to_native()
