"""A program that serves and calls with another project's client in one process.

Their messages have the same names as ours, and protobuf's default pool takes a name
once: ours are in a pool of their own. (The two clients clash with each other.)
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SERVE = """
import threading
import numpy as np
from tests.clients.models import make_sums
from tests.support import ServerThread

PAIRS = np.array([[1, 2]], np.float32)
with ServerThread(make_sums()) as server:
    address = f"127.0.0.1:{server.port}"
"""

CALLS = {
    "tritonclient.grpc": """
    with tritonclient.grpc.InferenceServerClient(address) as client:
        pairs = tritonclient.grpc.InferInput("pairs", [1, 2], "FP32")
        pairs.set_data_from_numpy(PAIRS)
        print(client.infer("sums", [pairs]).as_numpy("sums").tolist())
""",
    "kserve": """
    import asyncio

    async def main():
        async with kserve.InferenceGRPCClient(address) as client:
            pairs = kserve.InferInput("pairs", [1, 2], "FP32")
            pairs.set_data_from_numpy(PAIRS)
            answer = await client.infer(kserve.InferRequest("sums", [pairs]))
            print(answer.outputs[0].as_numpy().tolist())

    asyncio.run(main())
""",
}


@pytest.mark.parametrize("ours", ["first", "second"])
@pytest.mark.parametrize("client", CALLS)
def test_one_process(client: str, ours: str) -> None:
    imports = ["import kserve_lite.rpc.app", f"import {client}"]
    if ours == "second":
        imports.reverse()
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(imports) + SERVE + CALLS[client]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "[3.0]\n"), done.stderr
