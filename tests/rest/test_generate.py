"""The generate extension over both HTTP versions, and streams that end early."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Annotated, Any

import anyio
import numpy as np
import pytest

from kserve_lite import InferRequest, InvalidInput, Model, TensorSpec
from tests.transports.client import Answer, Client, model_of, post, serving, until
from tests.transports.h2client import NEVER, H2Client, connected

pytestmark = pytest.mark.anyio

GENERATE = "/v2/models/m/generate"
STREAM = "/v2/models/m/generate_stream"
both_versions = pytest.mark.parametrize("version", ["http1", "http2"])
BASE = {"model_name": "m"}


async def words(payload: dict[str, Any]) -> AsyncIterator[str]:
    for word in payload["text_input"].split():
        yield word + " "


def plain_words(payload: dict[str, Any]) -> Iterator[str]:
    for word in payload["text_input"].split():
        yield word + " "


async def words_of_tensors(request: InferRequest) -> AsyncIterator[str]:
    for word in request["text_input"][0].decode().split():
        yield word + " "


async def ask(client: Any, path: str, **members: Any) -> Answer:
    answer: Answer = await client.fetch("POST", path, body=json.dumps(members).encode())
    return answer


def events(answer: Answer) -> list[Any]:
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    *found, rest = answer.body.split(b"\n\n")
    assert rest == b""
    assert all(event.startswith(b"data: ") for event in found)
    return [json.loads(event.removeprefix(b"data: ")) for event in found]


@both_versions
@pytest.mark.parametrize("handler", [words, plain_words, words_of_tensors])
async def test_text(version: str, handler: Callable[..., Any]) -> None:
    async with serving(handler) as server, connected(version, server.port) as client:
        answer = await ask(client, GENERATE, text_input="one two é")
        assert answer.status == 200
        assert answer.headers["content-type"] == "application/json"
        assert answer.json == BASE | {"text_output": "one two é "}
        answer = await ask(client, STREAM, text_input="one two", id="7")
        assert events(answer) == [
            BASE | {"id": "7", "text_output": "one "},
            BASE | {"id": "7", "text_output": "two "},
        ]


async def test_a_version_and_an_own_name_for_text() -> None:
    model = Model("m", version="3", outputs=[TensorSpec("BYTES", [1], "answer")])
    model.predict(words)
    async with serving(model) as server, connected("http1", server.port) as client:
        for path in (GENERATE, "/v2/models/m/versions/3/generate"):
            answer = await ask(client, path, text_input="hi")
            assert answer.json == {
                "model_name": "m",
                "model_version": "3",
                "answer": "hi ",
            }
        path = "/v2/models/m/versions/3/generate_stream"
        assert len(events(await ask(client, path, text_input="a b"))) == 2
        assert (await ask(client, path.replace("3", "4"), text_input="")).status == 404


async def test_every_kind_of_item() -> None:
    items = [
        {"text_output": "a", "tokens": 3},
        np.array([[1, 2]], np.int64),
        {"score": np.array([0.5], np.float32), "label": np.array([b"x"], object)},
        [1, 2],
        b"bytes",
        None,
    ]

    async def handler(request: InferRequest) -> AsyncIterator[Any]:
        for item in items:
            yield item

    async with (
        serving(handler) as server,
        connected("http1", server.port) as client,
    ):
        found = events(await ask(client, STREAM))
    assert [{k: v for k, v in e.items() if k != "model_name"} for e in found] == [
        {"text_output": "a", "tokens": 3},
        {"output-0": [[1, 2]]},
        {"score": 0.5, "label": "x"},
        {"text_output": [1, 2]},
        {"text_output": "bytes"},
        {"text_output": None},
    ]


async def test_a_single_answer() -> None:
    def shout(payload: dict[str, Any]) -> Any:
        return {"text_output": payload["text_input"].upper()}

    async with serving(shout) as server, connected("http1", server.port) as client:
        expected = BASE | {"text_output": "HI"}
        assert (await ask(client, GENERATE, text_input="hi")).json == expected
        assert events(await ask(client, STREAM, text_input="hi")) == [expected]


async def test_members_become_the_declared_tensors() -> None:
    seen: list[Any] = []

    async def handler(
        text: Annotated[np.ndarray, TensorSpec("BYTES", [-1, 1])],
        most: Annotated[np.ndarray, TensorSpec("INT32", [1])],
        heat: Annotated[np.ndarray, TensorSpec("FP32", [])],
        rows: Annotated[np.ndarray, TensorSpec("FP32", [-1, 2])],
    ) -> str:
        seen.extend((text, most, heat, rows))
        return "ok"

    model = model_of(handler)
    async with serving(model) as server, connected("http1", server.port) as client:
        answer = await ask(
            client,
            GENERATE,
            text="hi",
            most=5,
            heat=0.5,
            rows=[1, 2],
            parameters={"seed": 1},
        )
        assert answer.json == BASE | {"text_output": "ok"}
        text, most, heat, rows = seen
        assert text.tolist() == [[b"hi"]]
        assert (most.tolist(), most.dtype) == ([5], np.int32)
        assert (heat.shape, heat.dtype, float(heat)) == ((), np.float32, 0.5)
        assert rows.tolist() == [[1, 2]]
        assert rows.dtype == np.float32
        for wrong in ({"most": "x"}, {"most": [1, 2]}, {"rows": [1, 2, 3]}):
            given = {"text": "hi", "most": 5, "heat": 0.5, "rows": [1, 2], **wrong}
            assert (await ask(client, GENERATE, **given)).status == 400
        assert len(seen) == 4


async def test_members_that_are_no_inputs_are_parameters() -> None:
    seen: list[InferRequest] = []

    async def handler(request: InferRequest) -> str:
        seen.append(request)
        return ""

    declared = Model("m", inputs=[TensorSpec("BYTES", [1], "text_input")])
    declared.predict(handler)
    for model, names in ((declared, ["text_input"]), (model_of(handler), None)):
        async with serving(model) as server, connected("http1", server.port) as client:
            answer = await ask(
                client,
                GENERATE,
                id="9",
                text_input="hi",
                heat=0.5,
                parameters={"seed": 1},
                absent=None,
            )
            assert answer.json == BASE | {"id": "9", "text_output": ""}
            request = seen.pop()
            assert request.id == "9"
            if names:
                assert list(request.names) == names
                assert request.parameters == {"seed": 1, "heat": 0.5}
                bad = await ask(client, GENERATE, text_input="hi", other=[1])
                assert bad.status == 400
                assert "text_input" in bad.json["error"]
            else:
                assert list(request.names) == ["text_input", "heat"]
                assert request["heat"].tolist() == [0.5]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b'{"id": 7}',
        b'{"parameters": []}',
        b'{"x": {}}',
        b'{"x": [[1], [2, 3]]}',
        b'{"x": [1, "a"]}',
        json.dumps({f"x{n}": 1 for n in range(5000)}).encode(),
    ],
)
@pytest.mark.parametrize("path", [GENERATE, STREAM])
async def test_bad_requests(body: bytes, path: str) -> None:
    async def never(request: InferRequest) -> None:
        raise AssertionError

    async with serving(never) as server, connected("http1", server.port) as client:
        answer = await client.fetch("POST", path, body=body)
        assert answer.status == 400
        assert set(answer.json) == {"error"}


async def test_several_items_are_no_single_answer() -> None:
    closed: list[bool] = []

    async def handler(payload: dict[str, Any]) -> AsyncIterator[Any]:
        try:
            for number in range(payload["n"]):
                yield {"n": number}
        finally:
            closed.append(True)

    async with serving(handler) as server, connected("http1", server.port) as client:
        assert (await ask(client, GENERATE, n=1)).json == BASE | {"n": 0}
        answer = await ask(client, GENERATE, n=1000)
        assert answer.status == 400
        assert "generate_stream" in answer.json["error"]
        assert (await ask(client, GENERATE, n=0)).json == BASE | {"text_output": ""}
    assert closed == [True] * 3


async def failing_later(payload: dict[str, Any]) -> AsyncIterator[str]:
    if payload["at"] == 1:
        yield "one"
    raise InvalidInput("too hot") if payload["kind"] == "told" else ValueError("secret")


@both_versions
@pytest.mark.parametrize(("kind", "status"), [("told", 400), ("raised", 500)])
async def test_failures(version: str, kind: str, status: int) -> None:
    async with (
        serving(failing_later) as server,
        connected(version, server.port) as client,
    ):
        for path in (GENERATE, STREAM):
            answer = await ask(client, path, at=0, kind=kind)
            assert answer.status == status
            assert "secret" not in answer.json["error"]
        assert (await ask(client, GENERATE, at=1, kind=kind)).status == status
        # Once it has begun, the client hears of it in an event of its own.
        first, last = events(await ask(client, STREAM, at=1, kind=kind))
        assert first == BASE | {"text_output": "one"}
        assert set(last) == {"error"}
        assert "secret" not in last["error"]
        assert (await client.fetch("GET", "/v2/health/live")).status == 200


async def test_text_that_no_json_can_say_is_the_models_failure() -> None:
    async def handler(payload: dict[str, Any]) -> AsyncIterator[bytes]:
        yield b"\xff"

    async with serving(handler) as server, connected("http1", server.port) as client:
        assert (await ask(client, GENERATE)).status == 500
        assert (await ask(client, STREAM)).status == 500


async def test_text_cut_inside_a_character_is_whole_again() -> None:
    async def handler(payload: dict[str, Any]) -> AsyncIterator[bytes]:
        for octet in "é".encode():
            yield bytes([octet])

    async with serving(handler) as server, connected("http1", server.port) as client:
        assert (await ask(client, GENERATE)).json == BASE | {"text_output": "é"}


async def test_headers_of_the_handler() -> None:
    async def handler(
        payload: dict[str, Any], response_headers: dict[str, str]
    ) -> AsyncIterator[str]:
        response_headers |= {"x-mine": "1", "content-type": "text/plain"}
        yield "a"

    async with serving(handler) as server, connected("http1", server.port) as client:
        for path in (GENERATE, STREAM):
            answer = await ask(client, path)
            assert answer.headers["x-mine"] == "1"
            assert answer.headers["content-type"] != "text/plain"


async def test_the_first_item_leaves_at_once() -> None:
    go_on = anyio.Event()

    async def handler(payload: dict[str, Any]) -> AsyncIterator[str]:
        yield "first"
        await go_on.wait()
        yield "second"

    async with serving(handler) as server, Client(server.port) as client:
        await client.send(post(b"{}", path=STREAM))
        await client.head()
        assert b'"first"' in await client.chunk()
        go_on.set()
        assert b'"second"' in await client.chunk()
        assert await client.chunk() == b""


class Endless:
    """A generator of either kind that is told when it is closed."""

    def __init__(self) -> None:
        self.made = 0
        self.closed = threading.Event()

    async def asynchronous(self, payload: dict[str, Any]) -> AsyncIterator[str]:
        try:
            while True:
                self.made += 1
                yield "x"
                await asyncio.sleep(0)
        finally:
            self.closed.set()

    def plain(self, payload: dict[str, Any]) -> Iterator[str]:
        try:
            while True:
                self.made += 1
                yield "x"
        finally:
            self.closed.set()


@both_versions
@pytest.mark.parametrize("kind", ["asynchronous", "plain"])
async def test_a_client_that_goes_away_stops_the_generator(
    version: str, kind: str
) -> None:
    endless = Endless()
    handler = getattr(endless, kind)
    async with serving(handler) as server:
        if version == "http1":
            async with Client(server.port) as client:
                await client.send(post(b"{}", path=STREAM))
                await client.head()
            await until(endless.closed.is_set)
        else:
            async with H2Client(server.port) as other:
                stream = await other.post(b"{}", path=STREAM)
                await other.until(lambda: other.streams[stream].body)
                await other.cancel(stream)
                await until(endless.closed.is_set)
        running = server.dataplane.running
        await until(lambda: not any(r.in_flight for r in running.values()))


async def test_the_handler_knows_the_protocol_and_the_deadline() -> None:
    async def handler(payload: dict[str, Any], context: Any) -> str:
        assert 0 < context.remaining() <= NEVER
        return str(context.protocol)

    async with serving(handler) as server, connected("http1", server.port) as client:
        answer = await client.fetch(
            "POST", GENERATE, ("x-request-timeout-ms", "10000"), body=b"{}"
        )
        assert answer.json["text_output"] == "generate"
