"""`kserve_lite.testing`: models tested over the real protocols, without a port."""

from __future__ import annotations

import asyncio
import gc
import inspect
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, get_args

import anyio
import numpy as np
import pytest

from kserve_lite import (
    Context,
    InferRequest,
    InferResponse,
    InvalidInput,
    Model,
    SettingsError,
    StartupError,
    Tensor,
    TensorSpec,
)
from kserve_lite.model import Phase
from kserve_lite.tensors import DATATYPES, numpy_dtype
from kserve_lite.testing import AsyncClient, Client, Inferred, Refused
from kserve_lite.testing.async_client import Over
from tests.transports.client import PATIENCE

OVER = get_args(Over)


def doubling(name: str = "m", **fields: Any) -> Model:
    model = Model(name, **fields)

    @model.predict
    def predict(x: np.ndarray, response_headers: dict[str, str]) -> np.ndarray:
        response_headers["x-rows"] = str(len(x))
        return x * 2

    return model


def telling(name: str = "story") -> Model:
    model = Model(name)

    @model.predict
    async def tell(payload: dict[str, str]) -> AsyncIterator[str]:
        for word in payload["text_input"].split():
            if word == "bad":
                raise InvalidInput("no bad words")
            yield word

    return model


def counting() -> Model:
    model = Model("counter")

    @model.predict
    async def count(to: np.ndarray) -> AsyncIterator[np.ndarray]:
        if to[0] < 0:
            raise InvalidInput("not below 0")
        for number in range(to[0]):
            yield np.array([number])

    return model


def threads_since(before: list[threading.Thread]) -> list[threading.Thread]:
    """Threads that were not there before, and do not end either."""
    new = [thread for thread in threading.enumerate() if thread not in before]
    for thread in new:  # what was told to end is given the time to do so
        thread.join(PATIENCE)
    return [thread for thread in new if thread.is_alive()]


# --- plain tests -----------------------------------------------------------------


def test_v1() -> None:
    model = doubling()

    @model.explain
    def explain(x: np.ndarray) -> np.ndarray:
        return -x

    with Client(model) as client:
        answer = client.predict({"instances": [[1, 2], [3, 4]]})
        assert answer == {"predictions": [[2, 4], [6, 8]]}
        given = client.predict({"instances": np.array([[1.5]])}, "m")
        assert given == {"predictions": [[3.0]]}
        assert client.explain({"instances": [[1]]}) == {"explanations": [[-1]]}


@pytest.mark.parametrize("over", OVER)
def test_v2(over: Over) -> None:
    with Client(doubling(version="3")) as client:
        x = np.array([[1.5, -2], [0, 4]], np.float32)
        answer = client.infer({"x": x}, over=over, headers={"x-request-id": "r1"})
        assert answer["output-0"].dtype == np.float32
        assert (answer["output-0"] == x * 2).all()
        assert (answer.model_name, answer.model_version) == ("m", "3")
        assert answer.id
        assert answer.headers["x-rows"] == "2"
        assert answer.headers["x-request-id"] == "r1"
        of_version = client.infer({"x": x}, over=over, version="3")
        assert of_version["output-0"].shape == (2, 2)
        with pytest.raises(Refused, match="has no version 4"):
            client.infer({"x": x}, over=over, version="4")
        with pytest.raises(KeyError):
            answer["none"]


def sample(datatype: str) -> np.ndarray:
    if datatype == "BYTES":
        return np.array([[b"a", "\N{SNOWMAN}".encode(), b""]], object)
    if datatype == "BOOL":
        return np.array([[True, False, True]])
    return np.array([[0, 1, 100]]).astype(numpy_dtype(datatype))


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("datatype", DATATYPES)
def test_every_datatype_there_and_back(over: Over, datatype: str) -> None:
    seen: list[InferRequest] = []

    async def predict(request: InferRequest) -> InferResponse:
        seen.append(request)
        return InferResponse(request.inputs)

    array = sample(datatype)
    with Client(Model("m", predict=predict)) as client:
        answer = client.infer({"a": array, "b": array}, over=over)
    assert [tensor.datatype for tensor in seen[0].inputs] == [datatype] * 2
    assert [tensor.datatype for tensor in answer.outputs] == [datatype] * 2
    for name in ("a", "b"):
        assert answer[name].dtype == array.dtype
        assert answer[name].tolist() == array.tolist()


@pytest.mark.parametrize("over", OVER)
def test_what_a_request_may_have(over: Over) -> None:
    seen: list[InferRequest] = []

    async def predict(request: InferRequest, context: Context) -> InferResponse:
        seen.append(request)
        assert context.headers["x-own"] == "1"
        named = [Tensor.from_array(n, np.zeros(1)) for n in ("a", "b", "c")]
        return InferResponse(tuple(named), parameters={"p": 1, "q": "text"})

    asked = {"flag": True, "count": 2, "part": 0.5, "text": "t"}
    with Client(Model("m", predict=predict)) as client:
        answer = client.infer(
            {},
            over=over,
            outputs=["c", "a"],
            parameters=asked,
            headers={"x-own": "1"},
        )
    assert [tensor.name for tensor in answer.outputs] == ["c", "a"]
    assert answer.parameters == {"p": 1, "q": "text"}
    given = {k: v for k, v in seen[0].parameters.items() if k in asked}
    assert given == asked


@pytest.mark.parametrize("over", OVER)
def test_not_a_number(over: Over) -> None:
    async def predict(x: np.ndarray) -> np.ndarray:
        return np.array([1, np.nan], np.float16)

    with Client(Model("m", predict=predict)) as client:
        answer = client.infer({"x": np.zeros(1)}, over=over)
    assert answer["output-0"].dtype == np.float16
    assert np.isnan(answer["output-0"]).tolist() == [False, True]


def test_generate() -> None:
    with Client(telling()) as client:
        asked = {"text_input": "once upon"}
        assert client.generate(asked)["text_output"] == "onceupon"
        items = client.generate_stream(asked)
        assert [item["text_output"] for item in items] == ["once", "upon"]
        pieces = client.stream("POST", "/v1/models/story:predict", json=asked)
        assert b"".join(pieces) == b"onceupon"


def test_a_stream_over_grpc() -> None:
    with Client(counting()) as client:
        answers = client.infer_stream({"to": np.array([3])})
        assert [answer["output-0"].tolist() for answer in answers] == [[0], [1], [2]]


def test_errors_are_raised() -> None:
    async def picky(payload: Any, context: Context) -> Any:
        raise InvalidInput("not like this")

    models = Model("picky", predict=picky), telling(), counting()
    with Client(*models) as client:
        for call in (client.predict, client.generate):
            with pytest.raises(Refused) as caught:
                call({"instances": [1]}, "picky")
            assert (caught.value.code, caught.value.reason) == (400, "not like this")
        for over, code in (("json", 400), ("grpc", "INVALID_ARGUMENT")):
            with pytest.raises(Refused, match="not like this") as caught:
                client.infer({"x": np.zeros(1)}, "picky", over=over)  # type: ignore[arg-type]
            assert caught.value.code == code
        with pytest.raises(Refused) as caught:
            next(client.stream("GET", "/no/such"))
        assert (caught.value.code, caught.value.reason) == (
            404,
            "There is no such path.",
        )
        items = client.generate_stream({"text_input": "a bad one"}, "story")
        assert next(items)["text_output"] == "a"
        with pytest.raises(Refused, match="200: no bad words"):
            next(items)
        with pytest.raises(Refused, match="OK: not below 0"):
            next(client.infer_stream({"to": np.array([-1])}, "counter"))
        pieces = client.stream(
            "POST", "/v1/models/story:predict", json={"text_input": "a bad one"}
        )
        assert next(pieces) == b"a"
        with pytest.raises(ConnectionError, match="cut short"):
            next(pieces)


def test_any_request() -> None:
    with Client(doubling(), max_body_size=100) as client:
        ready = client.request("GET", "/v2/health/ready")
        assert (ready.status, ready.json()) == (200, {"ready": True})
        assert ready.headers["server"] == "kserve-lite"
        head = client.request("HEAD", "/v2/models/m")
        assert head.body == b""
        assert int(head.headers["content-length"]) > 0
        assert client.request("GET", "/no/such").status == 404
        content = b'{"instances": [[1]]}'
        answer = client.request("POST", "/v1/models/m:predict", content=content)
        assert answer.json() == {"predictions": [[2]]}
        large = client.request("POST", "/v1/models/m:predict", content=bytes(5_000_000))
        assert large.status == 413


def test_what_is_counted() -> None:
    with Client(doubling()) as client:
        client.predict({"instances": [[1]]})
        client.infer({"x": np.ones(1)}, over="grpc")
        metrics = client.request("GET", "/metrics").body.decode()
    assert 'workers{state="ready"} 1.0' in metrics
    counted = [line for line in metrics.splitlines() if "requests_total{" in line]
    assert [line.rpartition(" ")[2] for line in counted] == ["1.0", "1.0"], counted


def test_requests_that_are_none() -> None:
    with Client(doubling()) as client:
        own = client.request("GET", "/", headers={"Host": "other.test"})
        assert own.json() == {"status": "alive"}
        for headers in ({"a b": "c"}, {"content-length": "5"}):
            with pytest.raises(ValueError, match="this is no HTTP request"):
                client.request("POST", "/", content=b"1234", headers=headers)


@pytest.mark.parametrize("over", OVER)
def test_what_is_no_tensor(over: Over) -> None:
    with Client(doubling()) as client:
        with pytest.raises(TypeError, match="input 'x' must be an array"):
            client.infer({"x": [1, 2]}, over=over)
        with pytest.raises(TypeError, match="no datatype for arrays of complex128"):
            client.infer({"x": np.ones(1, complex)}, over=over)
        with pytest.raises(TypeError, match="the parameter 'p' must be"):
            client.infer({"x": np.ones(1)}, over=over, parameters={"p": [1]})


def test_any_json_is_a_payload() -> None:
    async def predict(payload: Any) -> Any:
        return [type(payload).__name__]

    with Client(Model("m", predict=predict)) as client:
        payloads: tuple[Any, ...] = (None, 1, "text", [], {})
        for payload in payloads:
            assert client.predict(payload) == [type(payload).__name__]


def test_torch_tensors() -> None:
    torch = pytest.importorskip("torch")
    with Client(doubling()) as client:
        answer = client.infer({"x": torch.tensor([1.0, 2.0], dtype=torch.bfloat16)})
    assert answer.outputs[0].datatype == "BF16"
    assert answer["output-0"].tolist() == [2, 4]


def test_a_client_that_is_not_entered() -> None:
    client = Client(doubling())
    for _ in range(2):
        with pytest.raises(RuntimeError, match="with Client"):
            client.predict({"instances": [[1]]})
        with pytest.raises(RuntimeError, match="with Client"):
            next(client.stream("GET", "/"))
        with client:
            assert client.request("GET", "/").status == 200
            answer = client.infer({"x": np.ones(1)}, over="grpc")
            assert answer["output-0"] == 2


@pytest.mark.anyio
async def test_a_client_that_is_not_entered_in_a_loop() -> None:
    client = AsyncClient(doubling())
    for _ in range(2):
        for over in OVER:
            with pytest.raises(RuntimeError, match="not entered"):
                await client.infer({"x": np.ones(1)}, over=over)
        async with client:
            for over in OVER:
                answer = await client.infer({"x": np.ones(1)}, over=over)
                assert answer["output-0"] == 2


def test_several_models_are_told_by_name() -> None:
    with Client(doubling("one"), doubling("two, of 3")) as client:
        with pytest.raises(ValueError, match="say which model: one, two, of 3"):
            client.predict({"instances": [[1]]})
        for over in OVER:
            answer = client.infer({"x": np.ones(1)}, "two, of 3", over=over)
            assert answer.model_name == "two, of 3"
        assert client.predict({"instances": [[1]]}, "two, of 3") == {
            "predictions": [[2]]
        }


def test_a_model_under_another_name() -> None:
    with Client(doubling(), model_name="other") as client:
        assert client.infer({"x": np.ones(1)}).model_name == "other"
        assert client.request("GET", "/v1/models").json() == {"models": ["other"]}


def test_models_are_loaded_and_unloaded() -> None:
    seen: list[str] = []
    model = doubling()
    model.load(lambda: seen.append("load"))
    model.unload(lambda: seen.append("unload"))
    for _ in range(2):
        with Client(model) as client:
            assert seen == ["load"]
            assert client.request("POST", LOAD).status == 200
            assert seen == ["load", "load", "unload"]
        assert seen == ["load", "load", "unload", "unload"]
        assert model.phase is Phase.UNLOADED
        seen.clear()
    with Client(model, enable_model_control=False) as client:
        assert client.request("POST", LOAD).status == 403


LOAD = "/v2/repository/models/m/load"


def test_a_failing_load_is_raised() -> None:
    def load() -> None:
        raise OSError("no weights")

    before = threading.enumerate()
    with pytest.raises(StartupError, match="OSError: no weights"):
        Client(doubling(load=load)).__enter__()
    assert threads_since(before) == []


def test_settings() -> None:
    with pytest.raises(SettingsError, match="did you mean 'max_body_size'"):
        Client(doubling(), max_bodysize=1)
    with pytest.raises(StartupError, match="no model"):
        Client()
    with Client(doubling(), enable_grpc=False) as client:
        assert client.infer({"x": np.ones(1)})["output-0"] == 2
        with pytest.raises(Refused) as caught:
            client.infer({"x": np.ones(1)}, over="grpc")
        assert isinstance(caught.value.code, str)


def test_a_stream_that_nobody_reads_to_its_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    closed = threading.Event()

    async def forever(payload: Any) -> AsyncIterator[str]:
        try:
            while True:
                yield "more"
                await asyncio.sleep(0)
        finally:
            closed.set()

    with Client(Model("m", predict=forever)) as client:
        pieces = client.stream("POST", "/v1/models/m:predict", json=[1])
        assert next(pieces).startswith(b"more")
        pieces.close()
        assert closed.wait(PATIENCE)
        closed.clear()
        left = client.generate_stream({"text_input": "a"})
        assert next(left)["text_output"] == "more"
    assert closed.is_set()
    left.close()  # its client has ended
    assert caplog.records == []


def test_threads_ask_at_the_same_time() -> None:
    everybody = threading.Barrier(4)

    def predict(x: np.ndarray) -> np.ndarray:
        everybody.wait(PATIENCE)
        return x

    model = Model("m", predict=predict)
    with Client(model) as client, ThreadPoolExecutor(4) as threads:

        def ask(number: int) -> Any:
            over: Any = OVER[number % 3]
            return client.infer({"x": np.array([number])}, over=over)["output-0"][0]

        assert list(threads.map(ask, range(4))) == [0, 1, 2, 3]


def test_nothing_is_left_behind() -> None:
    before = threading.enumerate()
    with Client(doubling()) as client:
        for over in OVER:
            client.infer({"x": np.ones(1)}, over=over)
    gc.collect()  # what is not closed says so, which is an error here
    assert threads_since(before) == []


NO_PORT = """
import socket, sys
from pathlib import Path

def refuse(event, args):
    if event in ("socket.bind", "socket.connect"):
        raise OSError(f"{event} is not possible here")

sys.addaudithook(refuse)
with socket.socket() as sock:
    try:
        sock.bind(("127.0.0.1", 0))
    except OSError:
        pass
    else:
        sys.exit("the test does not test")

import numpy as np
from kserve_lite import Model
from kserve_lite.testing import Client

def listening():
    "Sockets of this process that listen: by the kernel, whoever made them."
    mine = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            mine.add(str(entry.readlink()))
        except OSError:
            pass
    found = []
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in mine:
                found.append(line)
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if int(fields[3], 16) & 0x10000 and f"socket:[{fields[6]}]" in mine:
            found.append(line)
    return found

def double(x: np.ndarray) -> np.ndarray:
    return x * 2

model = Model("m", predict=double)
with Client(model, event_loop=sys.argv[1]) as client:
    for over in ("json", "binary", "grpc"):
        client.infer({"x": np.ones(1)}, over=over)
    assert client.predict({"instances": [1]}) == {"predictions": [2]}
    assert listening() == []
print("done")
"""


@pytest.mark.skipif(not Path("/proc/net/unix").exists(), reason="not on this system")
@pytest.mark.parametrize("event_loop", ["asyncio", "uvloop"])
def test_no_port_is_needed(event_loop: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", NO_PORT, event_loop],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.stdout, ran.returncode) == ("done\n", 0), ran.stderr


def test_the_plain_client_has_the_methods_of_the_other() -> None:
    methods = {name for name in vars(AsyncClient) if not name.startswith("_")}
    assert methods == {name for name in vars(Client) if not name.startswith("_")}
    for name in methods:
        ours, theirs = getattr(Client, name), getattr(AsyncClient, name)
        assert ours.__doc__ == theirs.__doc__
        assert inspect.signature(ours) == inspect.signature(theirs)


# --- tests inside an event loop --------------------------------------------------


@pytest.mark.anyio
async def test_the_model_runs_in_the_loop_of_the_test() -> None:
    go_on = asyncio.Event()
    started = asyncio.Event()

    async def predict(payload: Any) -> Any:
        started.set()
        await go_on.wait()
        return payload

    async with AsyncClient(Model("m", predict=predict)) as client:
        asking = asyncio.create_task(client.predict({"instances": [1]}))
        with anyio.fail_after(PATIENCE):
            await started.wait()
            ready = await client.request("GET", "/v2/health/ready")
            assert ready.json() == {"ready": True}
            go_on.set()
            assert await asking == {"instances": [1]}


@pytest.mark.anyio
async def test_all_protocols_at_the_same_time_in_one_batch() -> None:
    batches: list[int] = []
    model = Model("m")

    @model.predict(max_batch_size=3, max_delay_ms=10_000)
    def predict(
        x: Annotated[np.ndarray, TensorSpec("FP32", [-1, 1])],
    ) -> np.ndarray:
        batches.append(len(x))
        return x * 2

    async def ask(number: int) -> Inferred:
        over: Any = OVER[number]
        return await client.infer({"x": np.full((1, 1), number, "float32")}, over=over)

    async with AsyncClient(model) as client:
        with anyio.fail_after(PATIENCE):
            answers = await asyncio.gather(*map(ask, range(3)))
    assert [answer["output-0"].tolist() for answer in answers] == [[[0]], [[2]], [[4]]]
    assert batches == [3]


@pytest.mark.anyio
async def test_streams_in_a_loop() -> None:
    async with AsyncClient(telling(), counting()) as client:
        asked = {"text_input": "once upon"}
        items = client.generate_stream(asked, "story")
        assert [item["text_output"] async for item in items] == ["once", "upon"]
        answers = client.infer_stream({"to": np.array([2])}, "counter")
        assert [a["output-0"].tolist() async for a in answers] == [[0], [1]]
        pieces = client.stream("POST", "/v1/models/story:predict", json=asked)
        assert b"".join([piece async for piece in pieces]) == b"onceupon"


@pytest.mark.anyio
async def test_what_is_in_flight_at_the_end_is_cut() -> None:
    ended: list[str] = []

    async def predict(payload: Any) -> Any:
        started.release()
        try:
            await anyio.sleep_forever()
        finally:
            ended.append("cancelled")

    started = anyio.Semaphore(0)
    failures: list[BaseException] = []
    before = asyncio.all_tasks()
    client = AsyncClient(Model("m", predict=predict))

    async def ask(over: Any) -> None:
        try:
            await client.infer({"x": np.zeros(1)}, over=over)
        except ConnectionError as error:
            failures.append(error)

    async with anyio.create_task_group() as tasks, client:
        for over in ("json", "grpc"):
            tasks.start_soon(ask, over)
        for _ in range(2):
            await started.acquire()
    assert ended == ["cancelled", "cancelled"]
    assert len(failures) == 2
    assert asyncio.all_tasks() == before


@pytest.mark.anyio
async def test_a_plain_client_does_not_block_a_loop() -> None:
    before = threading.enumerate()
    with pytest.raises(RuntimeError, match="use `async with AsyncClient"):
        Client(doubling()).__enter__()
    assert threads_since(before) == []


@pytest.mark.anyio
async def test_a_failing_load_is_raised_in_a_loop() -> None:
    def load() -> None:
        raise OSError("no weights")

    with pytest.raises(StartupError, match="OSError: no weights"):
        async with AsyncClient(doubling(load=load)):
            pytest.fail("it must not start")


# --- settings of logs ----------------------------------------------------------------


@pytest.mark.parametrize("access_log", [True, False])
def test_lines_go_where_the_program_says(
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    access_log: bool,
) -> None:
    caplog.set_level("INFO", "kserve_lite")
    settings = {"access_log": access_log, "log_format": "json", "log_level": "ERROR"}
    with Client(doubling(), enable_latency_logging=True, **settings) as client:
        answer = client.request("POST", "/v1/models/m:predict", json={"instances": [1]})
    assert "predict;dur=" in answer.headers["server-timing"]
    names = [record.name for record in caplog.records]
    assert names.count("kserve_lite.trace") == 1
    assert names.count("kserve_lite.access") == access_log
    assert "POST /v1" not in "".join(capfd.readouterr())


def test_a_handlers_own_server_timing_stays() -> None:
    async def predict(payload: Any, response_headers: dict[str, str]) -> Any:
        response_headers["Server-Timing"] = "own;dur=1"
        return payload

    model = Model("m", predict=predict)
    with Client(model, enable_latency_logging=True) as client:
        answer = client.request("POST", "/v1/models/m:predict", json=[1])
    assert answer.headers["server-timing"] == "own;dur=1"
