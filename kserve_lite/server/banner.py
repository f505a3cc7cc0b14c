"""What a person sees when the server is ready: addresses, and a curl line to paste."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from urllib.parse import quote

from kserve_lite.handlers import Form, Stage
from kserve_lite.model import Model
from kserve_lite.tensors import DATATYPES, TensorSpec, element_count

# A longer curl line is no help to anyone.
MAX_ELEMENTS = 100
_EXAMPLES = {"bool": False, "int": 0, "float": 0.0, "bytes": "text"}


def banner(
    models: tuple[Model, ...],
    url: str,
    *,
    grpc_ports: Sequence[int] = (),
    asks_certificate: bool = False,
) -> str:
    """Return the banner; its curl line answers 200 when pasted.

    url: of the server. grpc_ports: the ports that serve gRPC, none where it is off.
    asks_certificate: whether clients must show a certificate, which only they have.
    """
    lines = [f"kserve-lite serves {', '.join(m.name for m in models)} on {url}"]
    for model in models:
        name = quote(model.name, safe="")
        lines += (
            f"  V1  {url}/v1/models/{name}:predict",
            f"  V2  {url}/v2/models/{name}/infer",
        )
    if grpc_ports:
        host = url.partition("//")[2].rpartition(":")[0]
        lines.append("  gRPC  " + ", ".join(f"{host}:{port}" for port in grpc_ports))
    lines.append(
        "Try it, with a client's certificate and key in client.pem:"
        if asks_certificate
        else "Try it:"
    )
    line = curl_line(models[0], url, asks_certificate=asks_certificate)
    return "\n".join((*lines, f"  {line}"))


def curl_line(model: Model, url: str, *, asks_certificate: bool = False) -> str:
    """A command that works for the model: a prediction where its inputs are known."""
    body = _example(model)
    name = quote(model.name, safe="")
    words = ["curl"]
    if url.startswith("https:"):
        # Unverified: certificates name the server as others reach it, and seldom this
        # machine's own address, whoever has signed them.
        words.append("-k")
    if asks_certificate:
        words += ("--cert", "client.pem")
    if body is None:
        words.append(shlex.quote(f"{url}/v2/models/{name}"))
    else:
        target = shlex.quote(f"{url}/v1/models/{name}:predict")
        words += ("-d", shlex.quote(body), target)
    return " ".join(words)


def _example(model: Model) -> str | None:
    entry = model.plan(Stage.PREDICT)[0]
    inputs = model.inputs
    if entry.form is not Form.TENSORS or len(inputs) != len(entry.tensors):
        return None
    # The first dimension of V1 is the number of instances.
    if any(not spec.shape or spec.shape[0] not in (-1, 1) for spec in inputs):
        return None
    shapes = [[max(1, size) for size in spec.shape] for spec in inputs]
    if sum(map(element_count, shapes)) > MAX_ELEMENTS:
        return None
    row = {
        spec.name or "": _fill(spec, shape[1:])
        for spec, shape in zip(inputs, shapes, strict=True)
    }
    instance = row if len(row) > 1 else next(iter(row.values()))
    return json.dumps({"instances": [instance]}, separators=(",", ":"))


def _fill(spec: TensorSpec, shape: list[int]) -> object:
    value: object = _EXAMPLES[DATATYPES[spec.datatype].kind]
    for size in reversed(shape):
        value = [value] * size
    return value
