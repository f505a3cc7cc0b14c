"""AlexNet on KServe: `serve_alexnet_kserve.py WAY --port N [--torch_from FOLDER]`.

The handler is KServe's own AlexNet example, less what costs it time and has nothing to
do with serving: `inference_mode`, which the example lacks, one conversion of input and
output, no top five. KServe 0.21 runs `def` and `async def` alike on its event loop;
the way `thread` is what a user who knows that would write.

FOLDER holds torch for an environment that has none: it is searched last, and after
KServe has been imported, so that KServe's pinned packages are what KServe runs on.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable
from typing import Any

import kserve  # type: ignore[import-not-found, unused-ignore]
from serve_kserve import serve


class AlexNet(kserve.Model):  # type: ignore[misc, unused-ignore]
    def __init__(self, infer: Callable[[Any], Any]) -> None:
        super().__init__("alexnet")
        self.infer = infer
        self.ready = True

    async def predict(self, payload: Any, headers: Any = None) -> Any:
        return self.answer(payload, self.infer(payload.inputs[0].as_numpy()))

    def answer(self, payload: Any, y: Any) -> Any:
        # As in serve_kserve.py: an array as `data` is converted once.
        out = kserve.InferOutput("output-0", list(y.shape), "FP32", data=y)
        return kserve.InferResponse(
            payload.id,
            self.name,
            [out],
            use_binary_outputs=payload.use_binary_outputs,
            requested_outputs=payload.request_outputs,
        )


class AlexNetInThread(AlexNet):
    async def predict(self, payload: Any, headers: Any = None) -> Any:
        x = payload.inputs[0].as_numpy()
        return self.answer(payload, await asyncio.to_thread(self.infer, x))


WAYS = {"loop": AlexNet, "thread": AlexNetInThread}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--torch_from", help="a site-packages folder")
    options = parser.parse_args()
    if options.torch_from:
        sys.path.append(options.torch_from)
    import torch  # noqa: PLC0415
    from alexnet_torch import network  # noqa: PLC0415

    model = network()

    def infer(x: Any) -> Any:
        with torch.inference_mode():
            return model(torch.from_numpy(x)).numpy()

    serve(WAYS[options.way](infer), port=options.port)


if __name__ == "__main__":
    main()
