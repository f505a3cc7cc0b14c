"""`serve()` in programs that are not about it: plain asyncio, anyio, other servers.

What a server does by itself, and what it leaves behind, is in `test_lifecycle.py`.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

import anyio
import httpx
import numpy as np
import pytest
import uvicorn
import uvloop
from fastapi import FastAPI

from kserve_lite import Model, TensorSpec, serve
from kserve_lite.model import Phase
from tests.server.test_lifecycle import everything_open
from tests.transports.client import PATIENCE, Client, echo, model_of, predict, until

HERE: dict[str, Any] = {"http_port": 0, "host": "127.0.0.1"}
Main = Callable[[], Awaitable[Any]]


def plain_asyncio(main: Main) -> Any:
    async def run() -> Any:
        return await main()

    return asyncio.run(run())


def plain_uvloop(main: Main) -> Any:
    async def run() -> Any:
        return await main()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run())


def with_anyio(main: Main) -> Any:
    return anyio.run(main)


def with_anyio_on_uvloop(main: Main) -> Any:
    return anyio.run(main, backend_options={"use_uvloop": True})


every_program = pytest.mark.parametrize(
    "program", [plain_asyncio, plain_uvloop, with_anyio, with_anyio_on_uvloop]
)


def batched() -> Model:
    """A model with everything that could hold on to a loop: threads, batches, state."""
    model = Model("m", max_concurrency=2)
    model.load(lambda: "the state")

    @model.ready
    async def ready() -> bool:
        return True

    @model.predict(max_batch_size=4, max_delay_ms=1)
    def predict(
        x: Annotated[np.ndarray, TensorSpec("FP32", [-1, 1])],
    ) -> np.ndarray:
        return x * 2

    return model


async def told(port: int, what: bytes) -> bytes:
    """What a line-wise echo server says."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(what + b"\n")
    line = await reader.readline()
    writer.close()
    await writer.wait_closed()
    return line


async def says(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(await reader.readline())
    writer.close()


@every_program
def test_in_programs_of_all_kinds_beside_another_server(
    program: Callable[[Main], Any], capfd: pytest.CaptureFixture[str]
) -> None:
    model = batched()

    async def main() -> None:
        other = await asyncio.start_server(says, "127.0.0.1", 0)
        async with other:
            its_port = other.sockets[0].getsockname()[1]
            before = await everything_open()
            for _ in range(2):  # in one loop
                async with serve(model, **HERE) as server:
                    async with Client(server.port) as client:
                        answers = await asyncio.gather(
                            client.ask(predict([3])), told(its_port, b"hello")
                        )
                    assert answers[0].json == {"predictions": [[6]]}
                    assert answers[1] == b"hello\n"
                assert await told(its_port, b"still") == b"still\n"
            assert await everything_open() == before

    threads = threading.enumerate()
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for _ in range(2):  # and in another one
        program(main)
    assert model.phase is Phase.UNLOADED
    # Those of the server were waited for in main().
    assert set(threading.enumerate()) <= set(threads)
    assert handlers == [
        signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)
    ]
    assert capfd.readouterr() == ("", "")


@every_program
def test_two_servers_with_different_models(program: Callable[[Main], Any]) -> None:
    async def main() -> None:
        async with serve(model_of(echo, "a"), max_body_size=50, **HERE) as one:
            async with (
                serve(model_of(echo, "b"), **HERE) as other,
                httpx.AsyncClient() as client,
            ):
                large = {"instances": [0] * 50}
                for server, own, status in ((one, "a", 413), (other, "b", 200)):
                    names = await client.get(f"{server.url}/v1/models")
                    assert names.json() == {"models": [own]}
                    path = f"{server.url}/v1/models/{own}:predict"
                    assert (await client.post(path, json=large)).status_code == status
                    foreign = "ab".replace(own, "")
                    path = f"{server.url}/v1/models/{foreign}:predict"
                    assert (await client.post(path, json={})).status_code == 404
            # The end of one is none of the other's.
            async with httpx.AsyncClient() as client:
                ready = await client.get(f"{one.url}/v2/health/ready")
                assert ready.json() == {"ready": True}

    program(main)


@every_program
@pytest.mark.parametrize("how", ["task", "timeout", "group"])
def test_cancelled_as_asyncio_does_it(program: Callable[[Main], Any], how: str) -> None:
    unloaded: list[str] = []
    model = model_of(echo)
    model.unload(lambda: unloaded.append("m"))

    async def main() -> None:
        before = asyncio.all_tasks()
        server = serve(model, **HERE)

        async def ask() -> None:
            await until(lambda: model.phase is Phase.READY)
            async with Client(server.port) as client:
                assert (await client.ask(predict(1))).status == 200

        async def live() -> None:
            await server

        if how == "timeout":
            asking = asyncio.create_task(ask())

            async def timed() -> None:
                async with asyncio.timeout(PATIENCE) as timeout:
                    asking.add_done_callback(lambda _: timeout.reschedule(0))
                    await server

            with pytest.raises(TimeoutError):
                await timed()
            await asking
        elif how == "task":
            task = asyncio.create_task(live())
            await ask()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:

            async def grouped() -> None:
                async with asyncio.TaskGroup() as group:
                    group.create_task(live())
                    await ask()
                    raise KeyError("a sibling's")

            with pytest.raises(ExceptionGroup) as caught:
                await grouped()
            assert len(caught.value.exceptions) == 1
        assert server.report.startswith("drained 0, aborted 0, in ")
        assert asyncio.all_tasks() == before

    program(main)
    assert unloaded == ["m"]
    assert model.phase is Phase.UNLOADED


@every_program
def test_beside_uvicorn_in_one_loop(program: Callable[[Main], Any]) -> None:
    """Each has its own end, and the one does not disturb the other."""
    app = FastAPI()

    @app.get("/")
    async def root() -> str:
        return "theirs"

    async def main() -> None:
        theirs = uvicorn.Server(
            uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None)
        )
        serving = asyncio.create_task(theirs.serve())
        async with serve(model_of(echo), **HERE) as ours:
            while not theirs.started:
                assert not serving.done()
                await asyncio.sleep(0.005)
            port = theirs.servers[0].sockets[0].getsockname()[1]
            async with httpx.AsyncClient() as client:
                answer = await client.get(f"http://127.0.0.1:{port}/")
                assert answer.json() == "theirs"
                answer = await client.get(f"{ours.url}/v2/health/ready")
                assert answer.json() == {"ready": True}
                theirs.should_exit = True
                await serving
                answer = await client.get(f"{ours.url}/v2/health/ready")
                assert answer.json() == {"ready": True}

    program(main)


def test_the_logs_of_the_program_stay_its_own(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """What it configured is used, and nothing is written past it."""
    own = logging.getLogger("kserve_lite")
    before = (own.level, list(own.handlers), own.propagate)

    async def main() -> None:
        server = serve(model_of(echo), **HERE)
        async with server, Client(server.port) as client:
            assert (await client.ask(predict(1))).status == 200

    with caplog.at_level(logging.INFO, "kserve_lite"):
        asyncio.run(main())
    assert "loaded m in " in caplog.text
    assert "stopped: drained 0, aborted 0" in caplog.text
    assert (own.level, list(own.handlers), own.propagate) == before
    assert capfd.readouterr() == ("", "")


INTERRUPTED = """
import asyncio
from kserve_lite import Model, serve

async def predict(payload):
    print("asked", flush=True)
    await asyncio.sleep(0.1)
    return payload

async def main():
    model = Model("m", predict=predict, unload=lambda: print("unloaded", flush=True))
    async with serve(model, host="127.0.0.1", http_port=0) as server:
        print(server.url, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


def test_an_interrupt_ends_the_program_in_its_own_way() -> None:
    """SIGINT is asyncio's: it cancels main(), and what is in flight is answered."""
    program = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", INTERRUPTED],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent.parent,
    )
    with program:
        assert program.stdout is not None
        assert program.stderr is not None
        url = program.stdout.readline().strip()

        def interrupt() -> None:
            assert program.stdout is not None
            assert program.stdout.readline() == "asked\n"
            program.send_signal(signal.SIGINT)

        watching = threading.Thread(target=interrupt)
        watching.start()
        answer = httpx.post(f"{url}/v1/models/m:predict", json={"instances": [1]})
        watching.join()
        assert answer.json() == {"instances": [1]}
        assert program.stdout.read() == "unloaded\n"
        assert "KeyboardInterrupt" in program.stderr.read()
        assert program.wait(PATIENCE) == -signal.SIGINT
