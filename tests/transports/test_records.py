"""What is known of each request when it is over: ids, outcome, bytes."""

from __future__ import annotations

import json
import random
import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any

import anyio
import numpy as np
import pytest

from kserve_lite import Context, Model, Server
from kserve_lite.records import MAX_ID, Record
from tests.load.asking import PROTOCOLS, asking
from tests.rpc.stream import framed, proto
from tests.transports.client import (
    LIVE,
    Client,
    echo,
    get,
    post,
    predict,
    serving,
    until,
)
from tests.transports.h2client import GRPC, H2Client, connected

pytestmark = pytest.mark.anyio

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
GIVEN = f"00-{TRACE}-{PARENT}-01"
both_versions = pytest.mark.parametrize("version", ["http1", "http2"])


@asynccontextmanager
async def recorded(
    handler: Any, **settings: Any
) -> AsyncGenerator[tuple[Server, list[Record]]]:
    """A server, and the records of the requests that have ended."""
    records: list[Record] = []
    async with serving(handler, **settings) as server:
        ended = server._listener.ended

        def end(record: Record) -> None:
            ended(record)
            records.append(record)

        server._listener.ended = end
        yield server, records


async def double(x: np.ndarray) -> np.ndarray:
    return 2 * x


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_what_is_known_of_an_answer(protocol: str) -> None:
    async with (
        recorded(double) as (server, records),
        asking(protocol, server) as asker,
    ):
        await asker.ask([[1.0, 2.0]])
        await until(lambda: records)
        (record,) = records
    assert record.http == ("2" if "h2" in protocol or protocol == "grpc" else "1.1")
    assert record.protocol == protocol.removesuffix("-h2")
    assert record.model == "m"
    assert record.peer == "127.0.0.1"
    assert record.sent > 8
    if protocol == "grpc":
        assert (record.action, record.code) == ("ModelInfer", "OK")
    else:
        assert record.code == 200
        assert record.action == ("v1_predict" if "v1" in protocol else "v2_infer")


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_what_is_known_of_a_failure(protocol: str) -> None:
    async def fails(x: np.ndarray) -> np.ndarray:
        raise ValueError("no")

    async with (
        recorded(fails) as (server, records),
        asking(protocol, server) as asker,
    ):
        await asker.ask([[1.0, 2.0]])
        await until(lambda: records)
        (record,) = records
    assert record.code == ("INTERNAL" if protocol == "grpc" else 500)


@both_versions
async def test_ids_are_made_and_returned(version: str) -> None:
    seen: list[tuple[str, str]] = []

    async def ids(payload: Any, context: Context) -> list[Any]:
        seen.append((context.request_id, context.traceparent))
        return [context.request_id]

    async with (
        recorded(ids) as (server, records),
        connected(version, server.port) as client,
    ):
        answers = [
            await client.fetch("POST", "/v1/models/m:predict", body=b'{"instances":[]}')
            for _ in range(2)
        ]
        live = await client.fetch("GET", "/v2/health/live")
        await until(lambda: len(records) == 3)
    for answer, told, record in zip(answers, seen, records, strict=False):
        request_id, traceparent = told
        assert answer.headers["x-request-id"] == request_id == record.request_id
        assert answer.headers["traceparent"] == traceparent == record.traceparent
        # One id finds the request in logs and in traces.
        assert re.fullmatch(f"00-{request_id}-[0-9a-f]{{16}}-00", traceparent)
        assert answer.json == [request_id]
    assert seen[0] != seen[1]
    assert live.headers["x-request-id"] == records[2].request_id
    assert live.headers["traceparent"] == records[2].traceparent


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_ids_that_a_client_gives(protocol: str) -> None:
    seen: list[str] = []

    async def ids(x: np.ndarray, context: Context) -> np.ndarray:
        seen.append(context.request_id)
        return x

    fields = (("x-request-id", "mine-1"), ("traceparent", GIVEN))
    async with recorded(ids) as (server, records), asking(protocol, server) as asker:
        fetch = asker.client.fetch if protocol != "grpc" else asker.client.post

        async def with_ids(*args: Any, **named: Any) -> Any:
            method, path, *rest = args if protocol != "grpc" else ("", "", *args)
            if protocol == "grpc":
                return await fetch(rest[0], *rest[1:], *fields, **named)
            return await fetch(method, path, *rest, *fields, **named)

        setattr(asker.client, fetch.__name__, with_ids)
        await asker.ask([[1.0]])
        await until(lambda: records)
        if protocol == "grpc":
            (stream,) = asker.client.streams.values()
            assert stream.headers["x-request-id"] == "mine-1"
            assert stream.headers["traceparent"] == records[0].traceparent
    assert seen == ["mine-1"]
    assert records[0].request_id == "mine-1"
    trace, span, flags = records[0].trace
    assert (trace, flags) == (TRACE, "01")
    assert span != PARENT


@pytest.mark.parametrize(
    "given",
    ["", "a b", "x" * (MAX_ID + 1), "é", "tab\there"],
)
def test_an_id_that_cannot_be_sent_back_is_not_taken(given: str) -> None:
    record = Record("1.1", "GET", "/", {"x-request-id": given}, "", lambda: False)
    assert re.fullmatch("[0-9a-f]{32}", record.request_id)
    assert record.ids[0] == record.request_id.encode()


@pytest.mark.parametrize(
    "given",
    [
        "",
        "00",
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-01\n",
        f"00-{TRACE}-{PARENT}-0",
        f"00-{TRACE}-{PARENT}-01-" + "x" * 1_000_000 + "\n",
    ],
)
def test_a_trace_that_is_not_one_begins_anew(given: str) -> None:
    record = Record("1.1", "GET", "/", {"traceparent": given}, "", lambda: False)
    trace, span, flags = record.trace
    assert TRACE not in (trace, trace.upper())
    assert trace == record.request_id
    assert (len(trace), len(span), flags) == (32, 16, "00")


def test_a_later_version_of_a_trace() -> None:
    headers = {"traceparent": f"cc-{TRACE}-{PARENT}-01-what-the-future-brings"}
    record = Record("1.1", "GET", "/", headers, "", lambda: False)
    assert record.trace[0] == TRACE
    assert record.traceparent.startswith(f"00-{TRACE}-")


@pytest.mark.parametrize("order", ["all first", "id first", "trace first"])
def test_ids_stay_whoever_asks_first(order: str) -> None:
    record = Record("1.1", "GET", "/", {}, "", lambda: False)
    if order == "id first":
        assert record.request_id
    elif order == "trace first":
        assert record.trace
    first = record.ids
    assert first == (record.request_id.encode(), record.traceparent.encode())
    assert record.ids == first
    assert record.trace[0] == record.request_id


@both_versions
async def test_a_client_that_leaves_first(version: str) -> None:
    started = anyio.Event()

    async def hangs(payload: Any) -> None:
        started.set()
        await anyio.sleep_forever()

    async with recorded(hangs) as (server, records):
        if version == "http1":
            async with Client(server.port) as client:
                await client.send(predict(1))
                await started.wait()
        else:
            async with H2Client(server.port) as other:
                stream_id = await other.predict([1])
                await started.wait()
                await other.cancel(stream_id)
                await other.flush()
                await until(lambda: records)
        await until(lambda: records)
    (record,) = records
    assert (record.code, record.sent, record.model) == (499, 0, "m")


async def test_what_the_transport_refuses_is_known_too() -> None:
    async with recorded(echo, max_body_size=10) as (server, records):
        async with Client(server.port) as client:
            answer = await client.ask(b"GET / HTTP/1.1\r\n\r\n")
            assert answer.status == 400
        async with Client(server.port) as client:
            answer = await client.ask(post(b'{"instances":[1,2,3]}'))
            assert answer.status == 413
        async with H2Client(server.port) as other:
            stream_id = await other.post(b'{"instances":[1,2,3]}')
            assert (await other.answer(stream_id)).status == 413
        await until(lambda: len(records) == 3)
    assert [record.code for record in records] == [400, 413, 413]
    assert all(record.sent for record in records)
    assert not any(record.action for record in records)


async def test_streams_are_counted_when_they_end() -> None:
    async def items(payload: Any) -> AsyncIterator[str]:
        for item in payload["instances"]:
            yield item

    async with recorded(items) as (server, records), Client(server.port) as client:
        body = json.dumps({"instances": ["ab", "cde"]}).encode()
        assert (await client.ask(post(body))).body == b"abcde"
        await until(lambda: records)
    assert (records[0].code, records[0].sent) == (200, 5)


async def test_models_that_do_not_exist_have_no_name_in_metrics() -> None:
    async with recorded(echo) as (server, records), Client(server.port) as client:
        for path in ("/v1/models/guess:predict", "/v1/models/m:predict", "/nowhere"):
            await client.ask(post(path=path))
        await client.ask(LIVE)
        await until(lambda: len(records) == 4)
        text = (await client.ask(get("/metrics"))).body.decode()
    assert [record.model for record in records[:4]] == ["guess", "m", "", ""]
    assert "guess" not in text
    line = (
        'kserve_lite_requests_total{{code="{}",method="{}",model_name="{}",'
        'protocol="{}"}} 1.0\n'
    )
    assert line.format(404, "predict", "", "v1") in text
    assert line.format(200, "predict", "m", "v1") in text
    assert line.format(404, "", "", "http") in text
    assert line.format(200, "live", "", "v2") in text


async def test_bytes_and_connections_are_counted() -> None:
    async with recorded(Model("m", predict=echo)) as (server, _):
        async with Client(server.port) as client:
            request = predict("x" * 1000)
            await client.ask(request)
            await client.ask(request)
            text = (await client.ask(get("/metrics"))).body.decode()
        came = 2 * len(request) + len(get("/metrics"))
        assert f"kserve_lite_received_bytes_total {float(came)}\n" in text
        assert "kserve_lite_connections 1.0\n" in text
        assert "kserve_lite_accepted_connections_total 1.0\n" in text
        (sent,) = re.findall(r"^kserve_lite_sent_bytes_total (.+)$", text, re.MULTILINE)
        assert 2000 < float(sent) < 4000
        await until(lambda: not server._listener._connections)
        async with H2Client(server.port) as other:
            stream_id = await other.ask_for("GET", "/metrics")
            text = (await other.answer(stream_id)).body.decode()
        assert "kserve_lite_connections 1.0\n" in text
        assert "kserve_lite_accepted_connections_total 2.0\n" in text


async def test_ids_differ_in_a_model_that_seeds_random() -> None:
    async def seeds(payload: Any, context: Context) -> str:
        random.seed(42)
        return context.request_id

    async with recorded(seeds) as (server, records), Client(server.port) as client:
        for _ in range(200):  # more than are made at a time
            await client.ask(predict(1))
        await until(lambda: len(records) == 200)
    assert len({record.request_id for record in records}) == 200


VARIABLE: ContextVar[str] = ContextVar("VARIABLE", default="clean")


async def test_what_a_handler_sets_is_not_seen_by_pipelined_requests() -> None:
    seen: list[str] = []

    async def sets(payload: Any) -> Any:
        seen.append(VARIABLE.get())
        VARIABLE.set("dirty")
        return payload

    async with serving(sets) as server, Client(server.port) as client:
        await client.send(predict(1) * 3)
        for _ in range(3):
            await client.answer()
        await client.ask(predict(1))
    assert seen == ["clean"] * 4


async def test_a_body_that_does_not_come_to_its_end() -> None:
    async with recorded(echo) as (server, records):
        async with Client(server.port) as client:
            whole = predict("x" * 100)
            await client.send(whole[:-50])
            await until(
                lambda: any(
                    getattr(c, "_request", None) for c in server._listener._connections
                )
            )
        await until(lambda: len(records) == 1)
        async with H2Client(server.port) as other:
            path = "/v1/models/m:predict"
            stream_id = await other.begin("POST", path, ("content-length", "9"))
            await other.body(stream_id, b"123", end=False)
            await other.cancel(stream_id)
            await until(lambda: len(records) == 2)
            stream_id = await other.begin("POST", path, ("content-length", "9"))
            await other.body(stream_id, b"123", end=False)
            assert (await other.fetch("GET", "/v2/health/live")).status == 200
        await until(lambda: len(records) == 4)
    assert [record.code for record in records] == [499, 499, 200, 499]
    assert all(record.target for record in records)


async def test_a_stream_that_is_reset_at_once() -> None:
    async with recorded(echo) as (server, records), H2Client(server.port) as client:
        stream_id = await client.ask_for("GET", "/v2/health/live")
        await client.cancel(stream_id)
        await until(lambda: records)
    assert records[0].code in (200, 499)


async def test_head_sends_no_bytes_of_a_body() -> None:
    async with recorded(echo) as (server, records), Client(server.port) as client:
        await client.send(get("/v2").replace(b"GET", b"HEAD"))
        await client.answer(no_body=True)
        await until(lambda: records)
    assert (records[0].code, records[0].sent) == (200, 0)


@pytest.mark.parametrize("method", ["ModelMetadata", "ModelReady", "ModelConfig"])
async def test_calls_about_a_model_name_it(method: str) -> None:
    async with recorded(echo) as (server, records), H2Client(server.port) as client:
        request = proto(f"{method}Request", name="m")
        path = f"/inference.GRPCInferenceService/{method}"
        stream_id = await client.post(framed(request), *GRPC, path=path)
        await client.answer(stream_id)
        await until(lambda: records)
    assert (records[0].model, records[0].action, records[0].code) == ("m", method, "OK")


async def test_a_batch_is_not_in_flight_beside_its_requests() -> None:
    model = Model("m")
    in_flight: list[int] = []

    @model.predict(max_batch_size=4)
    async def counts(x: np.ndarray) -> np.ndarray:
        (running,) = server.dataplane.running.values()
        in_flight.append(running.in_flight)
        return x

    async with serving(model) as server, asking("v2", server) as asker:
        await asker.ask([[1.0]])
        await until(lambda: not next(iter(server.dataplane.running.values())).batches)
    assert in_flight == [1]
