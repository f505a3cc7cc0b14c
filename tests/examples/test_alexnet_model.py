"""The AlexNet example's handlers, called directly: no server, no network.

A state dict made from a seed stands in for the pretrained weights, and torchvision's
own network, transforms and softmax say what the answers must be. Its last layer is
scaled up, since the probabilities of a fresh network are all about 1/1000: any two
answers would then agree to 1e-5.

The other tests are about what may go wrong: no weights or wrong ones, and requests that
no picture can be read from.
"""

from __future__ import annotations

import base64
import email.message
import importlib.util
import io
import json
import pickle
import socket
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import (  # type: ignore[import-untyped]
    AlexNet_Weights,
    alexnet,
)

from kserve_lite import InferRequest, InvalidInput, Tensor

EXAMPLE = Path(__file__).parents[2] / "examples" / "alexnet"
JPEG = (EXAMPLE / "sample.jpg").read_bytes()
WEIGHTS = AlexNet_Weights.IMAGENET1K_V1


def import_example() -> ModuleType:
    """Import app.py under a name of its own: each example has an app.py."""
    spec = importlib.util.spec_from_file_location("alexnet_app", EXAMPLE / "app.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


app = import_example()


@pytest.fixture(scope="module")
def seeded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file with a whole state dict; deleted at the end, as it is 233 MiB."""
    file = tmp_path_factory.mktemp("seeded") / "weights"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20)
        weights = alexnet(weights=None).state_dict()
    weights["classifier.6.weight"] *= 100
    torch.save(weights, file)
    yield file
    file.unlink()


@pytest.fixture(scope="module")
def reference(seeded: Path) -> torch.nn.Module:
    network: torch.nn.Module = alexnet(weights=None)
    network.load_state_dict(torch.load(seeded, weights_only=True))
    return network.eval()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model folder; torch's cache is empty and no name can be looked up."""

    def offline(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    models = tmp_path / "models"
    models.mkdir()
    monkeypatch.setattr(app.model, "model_dir", models)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.setattr(socket, "getaddrinfo", offline)
    return models


def request(**inputs: np.ndarray) -> InferRequest:
    tensors = [Tensor.from_array(name, array) for name, array in inputs.items()]
    return InferRequest(model_name="alexnet", inputs=tuple(tensors))


def pictures(*items: object) -> np.ndarray:
    array = np.empty(len(items), dtype=object)
    array[:] = items
    return array


def encode(picture: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    checksum = zlib.crc32(kind + body)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)


def png_header(width: int, height: int) -> bytes:
    """The start of a PNG: it claims a size and has no pixel yet."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header)


def empty_png(width: int, height: int) -> bytes:
    pixels = png_chunk(b"IDAT", zlib.compress(b""))
    return png_header(width, height) + pixels + png_chunk(b"IEND", b"")


def torchs_pixels(*encoded: bytes) -> torch.Tensor:
    """What torchvision's documentation does with a picture."""
    transforms = WEIGHTS.transforms()
    opened = [Image.open(io.BytesIO(item)).convert("RGB") for item in encoded]
    return torch.stack([transforms(picture) for picture in opened])


def random_pixels() -> np.ndarray:
    return np.random.default_rng(7).normal(size=(2, 3, 224, 224))


PNG = encode(Image.effect_noise((300, 280), 80).convert("RGB"), "PNG")
TEXT = base64.b64encode(JPEG)
READ_ONLY = random_pixels().astype(np.float32)
READ_ONLY.setflags(write=False)  # as an array over a received buffer is
WHOLE_NUMBERS = (random_pixels() * 3).astype(np.int64)


@pytest.mark.parametrize(
    ("sent", "pixels"),
    [
        ({"image": pictures(JPEG)}, torchs_pixels(JPEG)),
        ({"image": pictures(TEXT)}, torchs_pixels(JPEG)),
        ({"image": pictures(base64.encodebytes(JPEG))}, torchs_pixels(JPEG)),
        ({"image": pictures(JPEG, PNG, TEXT)}, torchs_pixels(JPEG, PNG, JPEG)),
        ({"data": random_pixels()}, torch.from_numpy(random_pixels()).float()),
        ({"data": READ_ONLY}, torch.tensor(READ_ONLY)),
        ({"data": WHOLE_NUMBERS}, torch.from_numpy(WHOLE_NUMBERS).float()),
    ],
    ids=["jpeg", "base64", "lines", "batch", "fp64", "fp32", "int64"],
)
def test_answers_equal_torchs_own(
    folder: Path,
    seeded: Path,
    reference: torch.nn.Module,
    sent: dict[str, np.ndarray],
    pixels: torch.Tensor,
) -> None:
    (folder / "alexnet.pt").symlink_to(seeded)
    logits = app.predict(app.preprocess(request(**sent)), state=app.load())
    answer = app.postprocess(logits)

    with torch.inference_mode():
        expected = reference(pixels)
    top = expected.softmax(dim=1).topk(5)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(answer["probabilities"], top.values, rtol=0, atol=1e-5)
    assert answer["indices"].tolist() == top.indices.tolist()
    categories = WEIGHTS.meta["categories"]
    names = [[categories[index] for index in row] for row in top.indices.tolist()]
    assert answer["classes"].tolist() == names


def test_answer_has_three_tensors_of_the_protocols_types() -> None:
    answer = app.postprocess(torch.arange(2000.0).reshape(2, 1000).sin())
    tensors = [Tensor.from_array(name, array) for name, array in answer.items()]
    assert [(t.name, t.datatype, t.array.shape) for t in tensors] == [
        ("classes", "BYTES", (2, 5)),
        ("indices", "INT64", (2, 5)),
        ("probabilities", "FP32", (2, 5)),
    ]
    assert all(isinstance(name, str) for name in answer["classes"].flat)


def test_input_files_hold_the_sample() -> None:
    v1 = json.loads((EXAMPLE / "input.json").read_text())
    v2 = json.loads((EXAMPLE / "input_v2.json").read_text())
    assert v1 == {"instances": [{"image": {"b64": TEXT.decode()}}]}
    (sent,) = v2["inputs"]
    assert sent.pop("data") == [TEXT.decode()]
    assert sent == {"name": "image", "shape": [1], "datatype": "BYTES"}


# Where the weights come from.


def first_parameter(network: Any) -> np.ndarray:
    return np.asarray(next(network.parameters()).detach().cpu())


@pytest.mark.parametrize("name", ["alexnet.pt", "best.pt", "alexnet-owt-7be5be79.pth"])
def test_loads_the_only_weights_whatever_their_name(
    folder: Path, seeded: Path, reference: torch.nn.Module, name: str
) -> None:
    (folder / name).symlink_to(seeded)
    (folder / "README.txt").write_text("no weights")
    np.testing.assert_array_equal(
        first_parameter(app.load()), first_parameter(reference)
    )


def test_of_several_files_the_named_one_is_found(folder: Path) -> None:
    for name in ("a.pt", "alexnet.pt", "b.pth"):
        (folder / name).touch()
    assert app.find_weights(folder) == folder / "alexnet.pt"


def test_several_files_and_none_named_is_an_error(folder: Path) -> None:
    for name in ("a.pt", "b.pth"):
        (folder / name).touch()
    with pytest.raises(RuntimeError, match=r"holds a\.pt, b\.pth.*alexnet\.pt"):
        app.load()


def test_without_a_file_torchs_cache_is_used(
    folder: Path, seeded: Path, reference: torch.nn.Module
) -> None:
    cached = folder.parent / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth"
    cached.parent.mkdir(parents=True)
    cached.symlink_to(seeded)
    np.testing.assert_array_equal(
        first_parameter(app.load()), first_parameter(reference)
    )


@pytest.mark.parametrize("there", [True, False], ids=["empty", "missing"])
def test_no_weights_at_all_is_an_error(folder: Path, there: bool) -> None:
    if not there:
        folder.rmdir()
    with pytest.raises(RuntimeError) as caught:
        app.load()
    message = str(caught.value)
    assert message.startswith(
        f"no AlexNet weights: {folder} holds no *.pt and the download from "
        "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth failed ("
    )
    assert "Name or service not known" in message
    assert message.endswith("put a state dict in the folder or give --model_dir")
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "log"])
def test_a_wrong_download_is_an_error_and_only_a_terminal_gets_a_bar(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    terminal: bool,
) -> None:
    timeouts = []

    class Response(io.BytesIO):
        def info(self) -> email.message.Message:
            headers = email.message.Message()
            headers["Content-Length"] = "9"
            return headers

    def urlopen(_: object) -> Response:
        timeouts.append(socket.getdefaulttimeout())
        return Response(b"not these")

    monkeypatch.setattr(torch.hub, "urlopen", urlopen)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with pytest.raises(RuntimeError, match=r"no AlexNet weights: .*invalid hash value"):
        app.load()
    assert timeouts == [app.DOWNLOAD_TIMEOUT]
    assert ("%" in capsys.readouterr().err) == terminal
    assert not list((folder.parent / "hub" / "checkpoints").iterdir())


def saved(thing: object) -> bytes:
    file = io.BytesIO()
    torch.save(thing, file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cannot be read as a state dict"),
        (b"version https://git-lfs.github.com/spec/v1\n", "cannot be read"),
        (saved(torch.ones(1000))[:2000], "cannot be read"),
        (saved(torch.nn.Linear(2, 2)), "cannot be read"),
        (saved([1.0, 2.0]), "is no state dict of AlexNet"),
        (saved({1: 2}), "is no state dict of AlexNet"),
        (saved({"state_dict": {"w": torch.ones(1)}}), "is no state dict of AlexNet"),
        (saved(torch.nn.Linear(2, 2).state_dict()), "is no state dict of AlexNet"),
    ],
    ids=["empty", "text", "cut", "module", "list", "numbers", "nested", "another"],
)
def test_wrong_file_is_an_error_naming_it(
    folder: Path, content: bytes, reason: str
) -> None:
    file = folder / "mine.pt"
    file.write_bytes(content)
    with pytest.raises(RuntimeError) as caught:
        app.load()
    assert str(caught.value).startswith(f"{file} ")
    assert reason in str(caught.value)
    assert "weights_only" not in str(caught.value)


def test_state_dict_that_lacks_a_parameter_is_an_error(
    folder: Path, seeded: Path
) -> None:
    weights = torch.load(seeded, weights_only=True)
    del weights["classifier.6.bias"]
    # Saved from views: the file then holds the one element each of them repeats.
    views = {k: torch.zeros(1).expand(v.shape) for k, v in weights.items()}
    torch.save(views, folder / "alexnet.pt")
    with pytest.raises(RuntimeError, match=r'Missing key.*"classifier\.6\.bias"'):
        app.load()


def test_code_in_a_weights_file_does_not_run(folder: Path) -> None:
    class Touch:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return (open, (str(folder / "ran"), "w"))  # type: ignore[return-value]

    (folder / "alexnet.pt").write_bytes(pickle.dumps(Touch(), protocol=2))
    with pytest.raises(RuntimeError, match="cannot be read as a state dict"):
        app.load()
    assert not (folder / "ran").exists()


# Requests that cannot be answered.

DATA = np.zeros((1, 3, 224, 224), dtype=np.float32)
LONG = pictures(*[JPEG] * 65)
NOT_DATA = "Expected data to be numbers of shape [N, 3, 224, 224], "


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ({}, "Expected one of the inputs image and data, got neither."),
        ({"pixels": DATA}, "Expected one of the inputs image and data, got neither."),
        (
            {"image": pictures(JPEG), "data": DATA},
            "Expected one of the inputs image and data, got both.",
        ),
        ({"image": LONG}, "Expected 1 to 64 images, got object of shape [65]."),
        ({"image": pictures()}, "Expected 1 to 64 images, got object of shape [0]."),
        ({"data": np.array(1.0)}, "Expected 1 to 64 images, got float64 of shape []."),
        (
            {"data": np.zeros((65, 3, 224, 224), dtype=np.int8)},
            "Expected 1 to 64 images, got int8 of shape [65, 3, 224, 224].",
        ),
        (
            {"data": np.zeros((3, 224, 224))},
            NOT_DATA + "got float64 of shape [3, 224, 224].",
        ),
        (
            {"data": np.zeros((1, 224, 224, 3))},
            NOT_DATA + "got float64 of shape [1, 224, 224, 3].",
        ),
        (
            {"data": DATA.astype(bool)},
            NOT_DATA + "got bool of shape [1, 3, 224, 224].",
        ),
        (
            {"image": np.zeros(2)},
            "Expected image to be BYTES of shape [N], got float64 of shape [2].",
        ),
        (
            {"image": pictures(JPEG, JPEG).reshape(2, 1)},
            "Expected image to be BYTES of shape [N], got object of shape [2, 1].",
        ),
    ],
)
def test_request_of_the_wrong_form_is_invalid(
    sent: dict[str, np.ndarray], message: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        app.preprocess(request(**sent))
    assert str(caught.value) == message


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, 1e300, -1e7])
def test_numbers_that_no_network_can_take_are_invalid(number: float) -> None:
    data = np.zeros((1, 3, 224, 224))
    data[0, 1, 2, 3] = number
    with pytest.raises(InvalidInput, match="got NaN or a number beyond 1e\\+06"):
        app.preprocess(request(data=data))


GREY_16 = Image.new("I;16", (300, 300), 40_000)
GIF = encode(Image.new("RGB", (300, 300)), "GIF")
UNREADABLE = "expected a picture \\(JPEG, PNG, WEBP\\), got [0-9]+ bytes that cannot"


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (b"", UNREADABLE),
        (b"\xff\xd8 but then nothing", UNREADABLE),
        (JPEG[: len(JPEG) // 2], UNREADABLE),
        (PNG[: len(PNG) // 2], UNREADABLE),
        (PNG[:20] + b"\0" * 13 + PNG[33:], UNREADABLE),
        (empty_png(0, 10), UNREADABLE),
        (empty_png(300, 300), UNREADABLE),
        (png_header(300, 300)[:8] + png_chunk(b"IHDR", b"short"), UNREADABLE),
        (
            png_header(300, 300)
            + png_chunk(b"IDAT", zlib.compress(bytes(999))[:9])
            + png_chunk(b"\1\2\3\4", b"no such chunk"),
            UNREADABLE,
        ),
        (GIF, UNREADABLE),
        (base64.b64encode(b"%PDF-1.7 hidden"), UNREADABLE),
        (b"secret, not base64", "expected a picture or base64 of one, got other text"),
        (TEXT[:-1], "expected a picture or base64 of one, got other text"),
        (encode(GREY_16, "PNG"), "expected 8 bits a channel, got 16 bits grey"),
        (empty_png(8000, 7000), "at most 50,000,000 pixels.*got 8000 x 7000"),
        (empty_png(1, 10_000), "at most 50,000,000 pixels.*got 1 x 10000"),
        (empty_png(10_000, 10_000), "at most 50,000,000 pixels, got far more"),
        (empty_png(50_000, 50_000), "at most 50,000,000 pixels, got far more"),
    ],
)
def test_bytes_that_are_no_usable_picture_are_invalid(
    item: bytes, message: str
) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        app.preprocess(request(image=pictures(JPEG, item)))
    assert str(caught.value).startswith("Image 1: ")
    assert "secret" not in str(caught.value)
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_pictures_of_every_mode_become_three_channels(mode: str) -> None:
    kind = "JPEG" if mode == "CMYK" else "PNG"
    item = encode(Image.open(io.BytesIO(JPEG)).convert(mode), kind)
    pixels = app.preprocess(request(image=pictures(item)))
    assert tuple(pixels.shape) == (1, 3, 224, 224)
    assert torch.equal(pixels, torchs_pixels(item))
