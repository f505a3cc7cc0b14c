"""The KServe side: `serve_kserve.py HANDLER --port N [--grpc_port N] [--uvloop]`.

`--workers N` is KServe's own: processes for REST, spawned; gRPC stays in the first.

Runs in bench/.kserve-venv. KServe is set up to be measured at its best: no gRPC
server unless its port is given, no latency log, no access log, log level WARNING
(KSERVE_LOGLEVEL, set by compare.py). Two things are patched, neither on the path of
a request except to take work away: the host, which KServe 0.21 fixes to 0.0.0.0, and
uvicorn's access log.

`--uvloop` exists because KServe 0.21 awaits uvicorn inside its own `asyncio.run`, so
that in one process its `--event-loop` option has no effect and it runs on asyncio's
own loop. A policy set beforehand gives it uvloop all the same.
"""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

import kserve  # type: ignore[import-not-found, unused-ignore]
import numpy as np
import uvicorn  # type: ignore[import-not-found, unused-ignore]
from kserve.protocol.rest import server  # type: ignore[import-not-found, unused-ignore]
from kserve.utils.utils import (  # type: ignore[import-not-found, unused-ignore]
    get_predict_response,
)


class LoopbackConfig(uvicorn.Config):  # type: ignore[misc, unused-ignore]
    """uvicorn's settings with the two that KServe offers no way to choose."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.update(host="127.0.0.1", access_log=False)
        super().__init__(*args, **kwargs)


class Base(kserve.Model):  # type: ignore[misc, unused-ignore]
    def __init__(self) -> None:
        super().__init__("echo")
        self.ready = True


class Echo(Base):
    async def predict(self, payload: dict[str, Any], headers: Any = None) -> Any:
        return {"predictions": payload["instances"]}


class EchoBoth(Base):
    async def predict(self, payload: Any, headers: Any = None) -> Any:
        if isinstance(payload, dict):
            return {"predictions": payload["instances"]}
        x = payload.inputs[0]
        out = kserve.InferOutput(x.name, x.shape, x.datatype, data=x.data)
        return kserve.InferResponse(payload.id, self.name, [out])


class EchoSync(Base):
    def predict(self, payload: dict[str, Any], headers: Any = None) -> Any:
        return {"predictions": payload["instances"]}


class Tensor(Base):
    async def predict(self, payload: Any, headers: Any = None) -> Any:
        x = payload.inputs[0].as_numpy()
        out = kserve.InferOutput("output-0", list(x.shape), "FP32")
        out.set_data_from_numpy(x, binary_data=False)
        return kserve.InferResponse(payload.id, self.name, [out])


class LargeTensor(Base):
    async def predict(self, payload: Any, headers: Any = None) -> Any:
        x = payload.inputs[0].as_numpy()
        # An array as `data` is turned into bytes or numbers once, when it is written;
        # with set_data_from_numpy or get_predict_response that is done twice.
        out = kserve.InferOutput("output-0", list(x.shape), "FP32", data=x)
        return kserve.InferResponse(
            payload.id,
            self.name,
            [out],
            use_binary_outputs=payload.use_binary_outputs,
            requested_outputs=payload.request_outputs,
        )


class Image(Base):
    async def predict(self, payload: dict[str, Any], headers: Any = None) -> Any:
        x = np.array(payload["instances"], dtype=np.float32)
        return {"predictions": x.mean(axis=(1, 2, 3)).tolist()}


class ImageV2(Base):
    async def predict(self, payload: Any, headers: Any = None) -> Any:
        x = payload.inputs[0].as_numpy()
        # Not an InferOutput with an array as `data`: over gRPC, KServe 0.21 fails on
        # that where the request was raw. This answers raw to raw, typed to typed.
        return get_predict_response(payload, x.mean(axis=(1, 2, 3)), self.name)


HANDLERS = {
    "echo": Echo,
    "echo_both": EchoBoth,
    "echo_sync": EchoSync,
    "tensor": Tensor,
    "large_tensor": LargeTensor,
    "image": Image,
    "image_v2": ImageV2,
}


def serve(
    model: Any, *, port: int, grpc_port: int | None = None, workers: int = 1
) -> None:
    server.uvicorn.Config = LoopbackConfig
    kserve.ModelServer(
        http_port=port,
        grpc_port=grpc_port or 0,
        workers=workers,
        enable_grpc=grpc_port is not None,
        enable_latency_logging=False,
    ).start([model])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("handler", choices=HANDLERS)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--grpc_port", type=int, help="serve gRPC too, on this port")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--uvloop", action="store_true")
    options = parser.parse_args()
    if options.uvloop:
        # Only here: compare.py tells from the mapped files who runs on uvloop.
        import uvloop  # noqa: PLC0415

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
        # KServe asks for a current loop before it runs one; this policy makes none.
        asyncio.set_event_loop(asyncio.new_event_loop())
    serve(
        HANDLERS[options.handler](),
        port=options.port,
        grpc_port=options.grpc_port,
        workers=options.workers,
    )


if __name__ == "__main__":
    main()
