"""The examples as a user runs them: `python app.py`, their own inputs, both APIs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import (  # type: ignore[import-untyped]
    AlexNet_Weights,
    alexnet,
)

from tests.deploy.web import started
from tests.support import running

ROOT = Path(__file__).parents[2]
ALEXNET = ROOT / "examples" / "alexnet"
DIGITS = ROOT / "examples" / "digits"


def post(url: str, path: str, body: bytes) -> Any:
    answer = httpx.post(url + path, content=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_digits_on_both_protocols() -> None:
    with running(sys.executable, "app.py", cwd=DIGITS) as url:
        v1 = post(
            url, "/v1/models/digits:predict", (DIGITS / "input.json").read_bytes()
        )
        v2 = post(
            url, "/v2/models/digits/infer", (DIGITS / "input_v2.json").read_bytes()
        )
    digit, probabilities = v2["outputs"]
    assert digit["data"] == [v1["predictions"][0]["digit"]] == [3]
    assert probabilities["data"] == pytest.approx(
        v1["predictions"][0]["probabilities"], rel=1e-6
    )


@pytest.fixture(scope="module")
def seeded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a state dict of seeded, well spread weights."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(7)
    network = alexnet(weights=None)
    # As initialised, every class gets about a thousandth: nothing would be compared.
    torch.nn.init.normal_(network.classifier[6].weight, std=1.0)
    torch.save(network.state_dict(), folder / "alexnet.pt")
    return folder


@pytest.fixture(scope="module")
def alexnet_url(seeded: Path) -> Iterator[str]:
    """Its Procfile's web process."""
    with started(ALEXNET, STORAGE_URI=str(seeded)) as url:
        yield url


def torchs_own(pixels: torch.Tensor, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The five likeliest classes and their probabilities, by torch alone."""
    network = alexnet(weights=None)
    network.load_state_dict(torch.load(folder / "alexnet.pt", weights_only=True))
    network.eval()
    with torch.inference_mode():
        top = network(pixels).softmax(1).topk(5)
    return top.indices.numpy(), top.values.numpy()


def sample_pixels() -> torch.Tensor:
    with Image.open(ALEXNET / "sample.jpg") as picture:
        pixels = AlexNet_Weights.IMAGENET1K_V1.transforms()(picture.convert("RGB"))
    return pixels.unsqueeze(0)  # type: ignore[no-any-return]


def test_alexnet_reads_a_jpeg_on_both_protocols(alexnet_url: str, seeded: Path) -> None:
    body = (ALEXNET / "input.json").read_bytes()
    (row,) = post(alexnet_url, "/v1/models/alexnet:predict", body)["predictions"]
    body = (ALEXNET / "input_v2.json").read_bytes()
    outputs = {
        output["name"]: output["data"]
        for output in post(alexnet_url, "/v2/models/alexnet/infer", body)["outputs"]
    }
    indices, probabilities = torchs_own(sample_pixels(), seeded)
    assert row["indices"] == indices[0].tolist() == outputs["indices"]
    assert row["probabilities"] == pytest.approx(probabilities[0], abs=1e-5)
    assert outputs["probabilities"] == pytest.approx(row["probabilities"], abs=1e-6)
    categories = AlexNet_Weights.IMAGENET1K_V1.meta["categories"]
    assert row["classes"] == [categories[i] for i in row["indices"]]
    assert outputs["classes"] == row["classes"]


def test_alexnet_answers_grpc_with_the_same_function(
    alexnet_url: str, seeded: Path
) -> None:
    """The client of the example, against the port of REST."""
    asked = subprocess.run(
        [
            *(sys.executable, "client_grpc.py", "sample.jpg"),
            alexnet_url.removeprefix("http://"),
        ],
        cwd=ALEXNET,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert asked.returncode == 0, asked.stderr
    indices, probabilities = torchs_own(sample_pixels(), seeded)
    categories = AlexNet_Weights.IMAGENET1K_V1.meta["categories"]
    assert asked.stdout.splitlines() == [
        f"{probability:8.4%}  {categories[index]}"
        for index, probability in zip(indices[0], probabilities[0], strict=True)
    ]


def test_alexnet_equals_torch_on_ready_tensors(alexnet_url: str, seeded: Path) -> None:
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    indices, probabilities = torchs_own(pixels, seeded)
    v1 = {"instances": [{"data": row} for row in pixels.tolist()]}
    rows = post(alexnet_url, "/v1/models/alexnet:predict", json.dumps(v1).encode())
    for row, index, probability in zip(
        rows["predictions"], indices, probabilities, strict=True
    ):
        assert row["indices"] == index.tolist()
        assert row["probabilities"] == pytest.approx(probability, abs=1e-5)
    tensor = {
        "name": "data",
        "shape": list(pixels.shape),
        "datatype": "FP32",
        "data": pixels.flatten().tolist(),
    }
    answer = post(
        alexnet_url,
        "/v2/models/alexnet/infer",
        json.dumps({"inputs": [tensor]}).encode(),
    )
    outputs = {output["name"]: output for output in answer["outputs"]}
    assert outputs["probabilities"]["shape"] == [2, 5]
    assert outputs["probabilities"]["data"] == pytest.approx(
        probabilities.flatten(), abs=1e-5
    )


def test_alexnet_without_weights_ends_with_one_line(tmp_path: Path) -> None:
    """No folder, and a proxy that is not there: the download fails for sure."""
    ended = subprocess.run(
        [
            *(sys.executable, ALEXNET / "app.py", "--model_dir", tmp_path),
            *("--host", "127.0.0.1", "--http_port", "0"),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "TORCH_HOME": str(tmp_path / "cache"),
            "https_proxy": "http://127.0.0.1:9",
        },
    )
    assert ended.returncode == 1
    (line,) = [li for li in ended.stderr.splitlines() if li.startswith("kserve-lite:")]
    assert "no AlexNet weights" in line
    assert "--model_dir" in line
