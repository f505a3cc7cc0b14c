"""The part `ways` of parallel.py: what workers, batching and replicas give a model.

Three models, one that computes in bytecode, one that waits and AlexNet, each as one
process, with `--workers 2`, with batching (AlexNet only: the others have nothing to
gain), and with two replicas, all loaded in turn.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import answers
import loaders
import trees
from cases import CASES, WRK
from compare import Contender, request_to
from parallel_sides import Side, compared, pss, titled

MODELS = {"python": "v1-echo", "wait": "v1-echo", "torch": "v2-binary"}
WAYS = {
    "one": (),
    "workers": ("--workers", "2"),
    "batching": (),
    "replicas": (),
}


def ways(options: argparse.Namespace) -> dict[str, Any]:
    """Each model, served in each way."""
    return {
        "what": "one process, 2 workers, batching, 2 replicas",
        "switched_off": {"kserve-lite": "the access log (--access_log false)"},
        "not_measured": "more than two cores; a GPU; several machines",
        "load": str(WRK),
        "models": {model: _model(model, options) for model in options.models},
    }


def _model(model: str, options: argparse.Namespace) -> dict[str, Any]:
    case = next(case for case in CASES if case.name == MODELS[model])
    print(f"\nways, {model}: {WRK}")
    with contextlib.ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        body = logs / "body"
        body.write_bytes(case.body())
        servers = []
        for way, flags in WAYS.items():
            if way == "batching" and model != "torch":
                continue
            argv = ("serve_ways_lite.py", model, way, "--http_port", "{port}")
            rest = ("--host", "127.0.0.1", "--access_log", "false", *flags)
            one = Contender(way, options.python, (*argv, *rest), WRK)
            servers.append(stack.enter_context(trees.started(one, "", logs)))
        replies = [
            answers.ask_rest(
                one.contender.name, request_to(one, case, body), http2=False
            )
            for one in servers
        ]
        same_numbers(replies)
        sides = []
        for server, reply in zip(servers, replies, strict=True):
            pids = trees.tree(server.process.pid)
            replicas = titled(pids, "ServeReplica")
            own = [server.process.pid, *replicas] if replicas else pids
            request = request_to(server, case, body)
            sides.append(Side(server, request, reply.size, own, pids))
        memory = {
            side.server.contender.name: {
                "pss_kib": pss(side.pids),
                "pss_kib_of_ray": pss(sorted(set(side.others) - set(side.pids))),
            }
            for side in sides
        }
        return compared(sides, options) | {
            "client": " ".join(loaders.command(WRK, options.seconds)),
            "memory": memory,
        }


def same_numbers(replies: Sequence[answers.Answer]) -> None:
    """Stop unless all answered the same; tensors nearly, not to the bit.

    torch sums up in another order in a replica, where it has one thread.
    """
    first, *others = (reply.value for reply in replies)
    for other in others:
        if "tensors" not in first:
            agree = answers.same(first, other)
        else:
            agree = first["json"] == other["json"] and all(
                math.isclose(a, b, abs_tol=1e-5)
                for name, tensor in first["tensors"].items()
                for (a,), (b,) in zip(
                    struct.iter_unpack("<f", tensor),
                    struct.iter_unpack("<f", other["tensors"][name]),
                    strict=True,
                )
            )
        if not agree:
            raise SystemExit(f"answers differ: {first!r:.200} {other!r:.200}")
