"""The protobuf messages of the gRPC API, in a descriptor pool of their own.

The default pool is one for the whole process and refuses two files that define the
same name differently, so a program that also imports `tritonclient` or `kserve` could
not start. A private pool costs nothing. `descriptors.binpb` is what protoc makes of the
`.proto` files here (a test compares); after a change, in this folder:

    python -m grpc_tools.protoc -I . --descriptor_set_out=descriptors.binpb *.proto

protobuf is imported with this module, so import it only where gRPC is used.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from google.protobuf import (
    descriptor_pb2,
    descriptor_pool,
    json_format,
    message_factory,
)


def _load() -> Any:
    pool = descriptor_pool.DescriptorPool()
    compiled = files(__name__).joinpath("descriptors.binpb").read_bytes()
    for file in descriptor_pb2.FileDescriptorSet.FromString(compiled).file:
        pool.AddSerializedFile(file.SerializeToString())
    return pool


# Any: protobuf's own types differ between its versions 5 to 7.
POOL: Any = _load()


def message_class(name: str) -> Any:
    """Return the message class of a full name, `inference.ModelInferRequest` say."""
    return message_factory.GetMessageClass(POOL.FindMessageTypeByName(name))


def message_from(kind: Any, document: dict[str, Any]) -> Any:
    """Return a message of a class, made of plain JSON by protobuf's own mapping.

    Raises ParseError for what the message has no place for.
    """
    return json_format.ParseDict(document, kind())
