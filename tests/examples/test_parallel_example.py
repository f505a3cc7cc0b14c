"""examples/alexnet_parallel as a user runs it: its Procfile, two replicas, real Ray.

One server for all tests, since a Ray cluster takes seconds to start. The weights are
seeded, and torch alone says what the answers must be.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
import torch
from PIL import Image
from torchvision.models import (  # type: ignore[import-untyped]
    AlexNet_Weights,
    alexnet,
)

from tests.deploy.web import ROOT, begun
from tests.parallel.processes import alive, below, wait_for
from tests.support import banner_url

pytestmark = pytest.mark.ray

EXAMPLE = ROOT / "examples" / "alexnet_parallel"
ALEXNET = ROOT / "examples" / "alexnet"
WEIGHTS = AlexNet_Weights.IMAGENET1K_V1
CATEGORIES = WEIGHTS.meta["categories"]


class Served(NamedTuple):
    """A server that answers, and what torch alone makes of the sample."""

    url: str
    process: subprocess.Popen[str]
    indices: list[int]
    probabilities: list[float]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("models")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        network = alexnet(weights=None).eval()
        # As initialised, every class gets about a thousandth.
        torch.nn.init.normal_(network.classifier[6].weight, std=1.0)
    torch.save(network.state_dict(), folder / "alexnet.pt")
    with Image.open(ALEXNET / "sample.jpg") as picture:
        pixels = WEIGHTS.transforms()(picture.convert("RGB")).unsqueeze(0)
    with torch.inference_mode():
        top = network(pixels).softmax(1).topk(5)
    process = begun(EXAMPLE, STORAGE_URI=str(folder))
    try:
        url = banner_url(process)
        yield Served(url, process, top.indices[0].tolist(), top.values[0].tolist())
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()
        (folder / "alexnet.pt").unlink()  # 233 MiB


def shown(program: str, url: str) -> list[subprocess.CompletedProcess[str]]:
    """Run what the README shows of a program, against this server."""
    blocks = re.findall(r"```sh\n(.*?)```", (EXAMPLE / "README.md").read_text(), re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    commands = [line for line in lines if line.startswith(program)]
    assert commands
    address = url.removeprefix("http://")
    done = []
    for command in commands:
        words = shlex.split(re.sub(r"(localhost|127\.0\.0\.1):8080", address, command))
        if words[0] == "python":
            words[0] = sys.executable
        done.append(
            subprocess.run(
                words,
                cwd=EXAMPLE,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                capture_output=True,
                text=True,
                timeout=60,
                check=True,
            )
        )
    return done


def test_http_answers_as_torch_does(served: Served) -> None:
    v1, v2 = [json.loads(done.stdout) for done in shown("curl", served.url)]
    (row,) = v1["predictions"]
    outputs = {output["name"]: output["data"] for output in v2["outputs"]}
    for answer in (row, outputs):
        assert answer["indices"] == served.indices
        assert answer["classes"] == [CATEGORIES[index] for index in served.indices]
        assert answer["probabilities"] == pytest.approx(served.probabilities, abs=1e-5)


def test_grpc_answers_as_torch_does(served: Served) -> None:
    (done,) = shown("python ../alexnet/client_grpc.py", served.url)
    assert done.stdout.splitlines() == [
        f"{probability:8.4%}  {CATEGORIES[index]}"
        for index, probability in zip(served.indices, served.probabilities, strict=True)
    ]


@pytest.mark.parametrize("sent", [b"no picture", b"\xff\xd8\xff no JPEG"])
def test_what_is_no_picture_is_refused(served: Served, sent: bytes) -> None:
    """By a replica, with the status that it would have without one."""
    tensor = {"name": "image", "shape": [1], "datatype": "BYTES"}
    size = len(sent) + 4
    tensor |= {"parameters": {"binary_data_size": size}}  # type: ignore[dict-item]
    head = json.dumps({"inputs": [tensor]}).encode()
    answer = httpx.post(
        f"{served.url}/v2/models/alexnet/infer",
        content=head + len(sent).to_bytes(4, "little") + sent,
        headers={"inference-header-content-length": str(len(head))},
    )
    assert answer.status_code == 400
    assert "Image 0: expected a picture." in answer.json()["error"]


def test_two_replicas_and_a_stop_that_leaves_none(served: Served) -> None:
    """The last test: it stops the server."""
    children = below(served.process.pid)
    names = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in alive(children)]
    assert sum(name.startswith(b"ray::ServeReplica") for name in names) == 2
    served.process.send_signal(signal.SIGTERM)
    _, said = served.process.communicate(timeout=60)
    assert served.process.returncode == 0, said
    wait_for(lambda: not alive(children), "the end of Ray's processes")
