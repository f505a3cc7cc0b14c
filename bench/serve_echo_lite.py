"""An echo for what process.py measures: `serve_echo_lite.py --http_port N ...`.

Answers V1 and, for one gRPC request before memory is read, V2 as well. It imports
nothing but kserve-lite, as its users' programs may; serve_lite.py imports numpy, which
takes 0.11 s.
"""

from __future__ import annotations

from typing import Any

from kserve_lite import InferRequest, InferResponse, Model, run

model = Model("echo")


@model.predict
async def echo(payload: dict[str, Any] | InferRequest) -> Any:
    if isinstance(payload, dict):
        return {"predictions": payload["instances"]}
    return InferResponse(payload.inputs)


def main() -> None:
    run(model)


if __name__ == "__main__":
    main()
