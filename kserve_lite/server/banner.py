"""What a person sees when the server is ready: addresses, and a curl line to paste."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from urllib.parse import quote

from kserve_lite.handlers import Stage
from kserve_lite.model import Model
from kserve_lite.rest.examples import example_of

# A longer body is no help to anyone.
MAX_LENGTH = 500


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
    names = ", ".join(model.name for model in models) or "no model yet"
    lines = [f"kserve-lite serves {names} on {url}"]
    for model in models:
        name = quote(model.name, safe="")
        lines += (
            f"  V1  {url}/v1/models/{name}:predict",
            f"  V2  {url}/v2/models/{name}/infer",
        )
    if grpc_ports:
        host = url.partition("//")[2].rpartition(":")[0]
        lines.append("  gRPC  " + ", ".join(f"{host}:{port}" for port in grpc_ports))
    if not models:
        return "\n".join(lines)
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
    plan = model.plan(Stage.PREDICT)
    body = example_of("V1Request", plan, model.example).body
    text = json.dumps(body, separators=(",", ":"))
    return None if body is None or len(text) > MAX_LENGTH else text
