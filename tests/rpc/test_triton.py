"""Triton's extensions over gRPC: what models are and did, and the ends of streams.

Its model repository is in `test_repository.py`.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import numpy as np
import pytest
from google.protobuf import json_format

from kserve_lite import InferRequest, InferResponse, Model, Tensor, TensorSpec
from kserve_lite.dispatch import descriptions
from kserve_lite.tensors import DATATYPES
from tests.rpc.stream import Answer, App, asking, doubling, proto

pytestmark = pytest.mark.anyio

ENABLE, FINAL = "triton_enable_empty_final_response", "triton_final_response"


def plain(value: Any) -> Any:
    """A document or message with its numbers as text, as JSON has 64-bit integers."""
    if hasattr(value, "DESCRIPTOR"):
        value = json_format.MessageToDict(
            value,
            preserving_proto_field_name=True,
            always_print_fields_with_no_presence=True,
        )
    if isinstance(value, dict):
        return {name: plain(member) for name, member in value.items()}
    if isinstance(value, list):
        return [plain(member) for member in value]
    return str(value)


# --- what models are ----------------------------------------------------------------


def typed() -> Model:
    """A model with an input of every datatype, the last one optional."""
    inputs = [
        TensorSpec(datatype, [-1, 3], f"in{number}", optional=datatype == "BYTES")
        for number, datatype in enumerate(DATATYPES)
    ]
    outputs = [TensorSpec("BYTES", [-1, 1], "out")]
    model = Model("m", version="1", inputs=inputs, outputs=outputs)

    @model.predict
    async def predict(request: InferRequest) -> object:
        raise NotImplementedError

    return model


async def test_the_server_names_its_extensions() -> None:
    async with App() as app:
        answer = await app.call("ServerMetadata", proto("ServerMetadataRequest"))
        reply = answer.read("ServerMetadataResponse")
        assert plain(reply) == plain(descriptions.server_metadata())
        assert {"model_configuration", "statistics"} < set(reply.extensions)


async def test_a_configuration_says_over_grpc_what_it_says_over_rest() -> None:
    model = typed()
    async with App(model, counting()) as app:
        for served in app.models:
            request = proto("ModelConfigRequest", name=served.name)
            answer = await app.call("ModelConfig", request)
            config = answer.read("ModelConfigResponse").config
            assert plain(config) == plain(descriptions.model_config(served))
        unknown = proto("ModelConfigRequest", name="m", version="9")
        assert (await app.call("ModelConfig", unknown)).code == 5


async def test_a_configuration_has_every_datatype() -> None:
    async with App(typed()) as app:
        request = proto("ModelConfigRequest", name="m", version="1")
        answer = await app.call("ModelConfig", request)
        config = answer.read("ModelConfigResponse").config
        words = config.DESCRIPTOR.file.enum_types_by_name["DataType"].values_by_number
        found = [words[given.data_type].name for given in config.input]
        assert found == [
            f"TYPE_{'STRING' if name == 'BYTES' else name}" for name in DATATYPES
        ]
        assert [given.optional for given in config.input][-2:] == [False, True]
        assert list(config.input[0].dims) == [3]
        assert config.max_batch_size > 0
        assert config.output[0].name == "out"
        assert not config.model_transaction_policy.decoupled


async def test_a_generator_is_decoupled() -> None:
    async with App(counting("sync")) as app:
        answer = await app.call(
            "ModelConfig", proto("ModelConfigRequest", name="count")
        )
        config = answer.read("ModelConfigResponse").config
        assert config.model_transaction_policy.decoupled


# --- what models did ----------------------------------------------------------------


async def statistics(app: App, **asked: str) -> list[Any]:
    request = proto("ModelStatisticsRequest", **asked)
    answer = await app.call("ModelStatistics", request)
    return list(answer.read("ModelStatisticsResponse").model_stats)


async def test_statistics() -> None:
    async with App(doubling(version="1"), doubling(version="2"), counting()) as app:
        before = time.time_ns() // 1_000_000
        assert (await app.call("ModelInfer", asking(model_version="2"))).code == 0
        bad = asking(model_version="2")
        bad.inputs.add(name="y", datatype="FP32", shape=[0])
        assert (await app.call("ModelInfer", bad)).code == 3
        one, two = await statistics(app, name="m")
        assert (one.version, two.version) == ("1", "2")
        assert (one.inference_count, one.last_inference) == (0, 0)
        assert (two.inference_count, two.execution_count) == (1, 1)
        assert before <= two.last_inference <= time.time_ns() // 1_000_000
        stats = two.inference_stats
        assert (stats.success.count, stats.fail.count) == (1, 1)
        spent = (stats.queue, stats.compute_input, stats.compute_infer)
        assert sum(part.ns for part in (*spent, stats.compute_output)) == (
            stats.success.ns
        )
        assert await statistics(app, name="m", version="2") == [two]
        assert [one, two] == (await statistics(app))[:2]
        assert len(await statistics(app)) == 3
        document = descriptions.statistics(app.dataplane, "m")
        assert [plain(entry) for entry in (one, two)] == plain(document["model_stats"])
        for wrong in ({"name": "zz"}, {"name": "m", "version": "9"}):
            request = proto("ModelStatisticsRequest", **wrong)
            assert (await app.call("ModelStatistics", request)).code == 5


# --- text ---------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [False, True])
async def test_text_of_a_stream_is_a_tensor(*, raw: bool) -> None:
    model = Model("m")
    items = ["é", b"\xff\0", ""]

    @model.predict
    def predict(request: InferRequest) -> Iterator[object]:
        yield from items

    request = asking()
    if raw:
        request.inputs[0].ClearField("contents")
        request.raw_input_contents.append(bytes(8))
    async with App(model) as app:
        answers = answers_of(await app.call("ModelStreamInfer", request))
    texts = ["é".encode(), b"\xff\0", b""]
    for answer, text in zip(answers, texts, strict=True):
        (output,) = answer.infer_response.outputs
        assert (output.name, output.datatype) == ("text_output", "BYTES")
        assert list(output.shape) == [1]
        if raw:
            (data,) = answer.infer_response.raw_output_contents
            assert data == len(text).to_bytes(4, "little") + text
        else:
            assert list(output.contents.bytes_contents) == [text]


# --- the end of a request in a stream -----------------------------------------------


def counting(kind: str = "async") -> Model:
    """A model that answers x with x items, and fails at 13."""

    def item(number: int) -> object:
        if number == 13:
            raise ValueError("unlucky")
        return np.array([number])

    def plain_items(x: np.ndarray) -> Iterator[object]:
        for number in range(int(x[0])):
            yield item(number)

    async def async_items(x: np.ndarray) -> AsyncIterator[object]:
        for number in range(int(x[0])):
            yield item(number)

    async def returned(x: np.ndarray) -> object:
        return async_items(x)

    handlers: dict[str, Callable[..., Any]] = {
        "sync": plain_items,
        "async": async_items,
        "returned": returned,
    }
    return Model("count", predict=handlers[kind])


def told(limit: int, request_id: str = "1", **fields: Any) -> Any:
    """A request that asks which of its answers is the last."""
    request = asking((limit,), **fields)
    request.id = request_id
    request.parameters[ENABLE].bool_param = True
    return request


def answers_of(answer: Answer) -> list[Any]:
    assert answer.code == 0
    kind = type(proto("ModelStreamInferResponse"))
    return [kind.FromString(message) for message in answer.messages]


def ends_of(answer: Answer) -> list[Any]:
    """Of each answer its error or its id, its numbers, and whether it is final."""
    found: list[Any] = []
    for one in answers_of(answer):
        reply = one.infer_response
        numbers = [n for out in reply.outputs for n in out.contents.int64_contents]
        final = None
        if FINAL in reply.parameters:
            assert reply.parameters[FINAL].HasField("bool_param")
            final = reply.parameters[FINAL].bool_param
        found.append((one.error_message or reply.id, numbers, final))
    return found


@pytest.mark.parametrize("kind", ["sync", "async", "returned"])
async def test_the_last_answer_of_each_request_is_final_and_empty(kind: str) -> None:
    name = "count"
    async with App(counting(kind)) as app:
        answer = await app.call(
            "ModelStreamInfer",
            told(2, "a", model_name=name),
            told(0, "b", model_name=name),
            told(1, "c", model_name=name),
        )
        assert ends_of(answer) == [
            ("a", [0], False),
            ("a", [1], False),
            ("a", [], True),
            ("b", [], True),
            ("c", [0], False),
            ("c", [], True),
        ]
        last = answers_of(answer)[-1].infer_response
        assert last.model_name == name
        assert not last.outputs
        assert not last.raw_output_contents


async def test_an_end_has_the_version_of_its_model() -> None:
    model = Model("m", version="7")

    @model.predict
    def predict(x: np.ndarray) -> Iterator[np.ndarray]:
        yield from ()

    async with App(model) as app:
        (answer,) = answers_of(await app.call("ModelStreamInfer", told(0, "")))
        assert answer.infer_response.model_version == "7"
        assert len(answer.infer_response.id) == 32


@pytest.mark.parametrize("enable", [None, False])
async def test_who_does_not_ask_is_told_no_end(*, enable: bool | None) -> None:
    request = asking((1,), model_name="count")
    if enable is not None:
        request.parameters[ENABLE].bool_param = enable
    async with App(counting()) as app:
        answer = await app.call("ModelStreamInfer", request)
        assert ends_of(answer) == [("1", [0], None)]


async def test_an_error_is_an_end() -> None:
    async with App(counting()) as app:
        requests = told(14, "a", model_name="count"), told(1, "b", model_name="z")
        *numbers, failed, unknown = ends_of(
            await app.call("ModelStreamInfer", *requests)
        )
        assert numbers == [("a", [number], False) for number in range(13)]
        assert failed[0].startswith("The model failed")
        assert failed[1:] == ([], None)
        assert unknown == ("Model with name z does not exist.", [], None)
        *_, failed, unknown = answers_of(await app.call("ModelStreamInfer", *requests))
        assert failed.infer_response == proto("ModelInferResponse", id="a")
        assert unknown.infer_response == proto("ModelInferResponse", id="b")


async def test_the_only_answer_is_final() -> None:
    model = Model("m")
    kept = InferResponse(
        (Tensor("n", np.array([1]), "INT64"),), parameters={"own": "kept"}
    )

    @model.predict
    async def predict(request: InferRequest) -> object:
        return kept

    async with App(model) as app:
        for message in (told(1), asking()):
            answer = await app.call("ModelStreamInfer", message)
            final = True if message.parameters else None
            assert ends_of(answer) == [("1", [1], final)]
            (one,) = answers_of(answer)
            assert one.infer_response.parameters["own"].string_param == "kept"
        assert kept.parameters == {"own": "kept"}
        # One answer is all that this method gives.
        only = (await app.call("ModelInfer", told(1))).read("ModelInferResponse")
        assert FINAL not in only.parameters


async def test_the_question_is_a_bool() -> None:
    request = asking((1,), model_name="count")
    request.parameters[ENABLE].string_param = "s3cr3t"
    async with App(counting()) as app:
        ((error, *_),) = ends_of(await app.call("ModelStreamInfer", request))
        assert error == f"The parameter {ENABLE} must be a bool_param."
