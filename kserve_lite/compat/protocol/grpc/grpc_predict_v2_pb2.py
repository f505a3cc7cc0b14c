"""The messages of the gRPC API by the names that KServe's generated module gives them.

`ModelInferRequest`, `ModelInferResponse`, `InferParameter`, `InferTensorContents` and
all others of package `inference`. They are of a descriptor pool of our own, so this
module and `kserve`'s or `tritonclient`'s can be imported side by side; a message of one
is none of the other. Made when they are asked for: protobuf is imported only then.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if not name.startswith("_"):
        from kserve_lite.codecs.proto import message_class

        try:
            return message_class(f"inference.{name}")
        except KeyError:
            pass
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
