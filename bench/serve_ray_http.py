"""Plain Ray Serve, beside which parallel.py puts a replica of ours.

`serve_ray_http.py HANDLER --port N` starts a Ray cluster of this machine, deploys the
handler behind Ray Serve's own HTTP (no FastAPI) and prints the cluster's address, which
a server of ours joins. The handler answers twice, from a replica each: at /shipped with
the 5 requests at a time that Ray Serve allows a replica, at /wide with 1,000. Switched
off are the dashboard and the access log. The cluster ends with this program.
"""

from __future__ import annotations

import argparse
import signal
from typing import Any

import numpy as np
import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

# More than there are, so that replicas of both sides find room.
CPUS = 8


class Echo:
    """V1's JSON in and out, as serve_lite.py's `echo`."""

    async def __call__(self, request: Request) -> dict[str, Any]:
        payload = await request.json()
        return {"predictions": payload["instances"]}


class Tensor:
    """An FP32 tensor in and out as bytes, which is less than V2 has to say."""

    async def __call__(self, request: Request) -> Response:
        array = np.frombuffer(await request.body(), np.float32)
        return Response(array.tobytes(), media_type="application/octet-stream")


HANDLERS: dict[str, type] = {"echo": Echo, "large_tensor": Tensor}
LIMITS = {"shipped": 5, "wide": 1000}  # requests at a time in a replica


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("handler", choices=HANDLERS)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    # Blocked before Ray starts its threads, and taken by none of its handlers.
    stop = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, stop)
    ray.init("local", num_cpus=CPUS, include_dashboard=False)
    serve.start(http_options={"host": "127.0.0.1", "port": options.port})
    for name, limit in LIMITS.items():
        deployed = serve.deployment(
            name="echo",
            max_ongoing_requests=limit,
            logging_config={"enable_access_log": False},
        )(HANDLERS[options.handler])
        serve.run(deployed.bind(), name=name, route_prefix=f"/{name}")
    print(ray.get_runtime_context().gcs_address, flush=True)
    signal.sigwait(stop)
    serve.shutdown()  # type: ignore[no-untyped-call]
    ray.shutdown()


if __name__ == "__main__":
    main()
