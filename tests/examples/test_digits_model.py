"""What examples/digits promises: a trained, small and accurate model.

The app's own functions are called directly, without a server, on the digits that
training held out. The files beside it must show one and the same digit.
"""

from __future__ import annotations

import importlib.util
import json
import struct
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "digits"


def module(file: str) -> ModuleType:
    """A module of the example, which is a folder of scripts and no package."""
    spec = importlib.util.spec_from_file_location(
        f"examples_digits_{Path(file).stem}", FOLDER / file
    )
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def app() -> ModuleType:
    return module("app.py")


@pytest.fixture(scope="module")
def weights(app: ModuleType) -> Any:
    return app.load()


def held_out() -> tuple[np.ndarray, np.ndarray]:
    with np.load(FOLDER / "held_out.npz") as file:
        return file["images"], file["labels"]


def sample() -> np.ndarray:
    body = json.loads((FOLDER / "input.json").read_text())
    return np.array(body["instances"], dtype=np.float32)


def read_png(path: Path) -> np.ndarray:
    """Decode 8-bit greyscale without filters, which is all that train.py writes."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks: dict[bytes, bytes] = {}
    at = 8
    while at < len(data):
        (size,) = struct.unpack_from(">I", data, at)
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        (checksum,) = struct.unpack_from(">I", data, at + 8 + size)
        assert checksum == zlib.crc32(kind + body)
        assert kind not in chunks
        chunks[kind] = body
        at += 12 + size
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    width, height, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert rest == [8, 0, 0, 0, 0]
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), dtype=np.uint8)
    lines = lines.reshape(height, width + 1)
    assert not lines[:, 0].any()
    return lines[:, 1:]


def test_accuracy_on_held_out_digits(app: ModuleType, weights: Any) -> None:
    images, labels = held_out()
    digits, _ = app.predict(images.astype(np.float32), weights)
    assert np.mean(digits == labels) >= 0.97


def test_held_out_digits_are_enough_of_each_class() -> None:
    images, labels = held_out()
    assert images.shape == (len(labels), 64)
    assert images.max() == 16
    assert len(np.unique(images, axis=0)) == len(images)
    assert np.bincount(labels, minlength=10).min() >= 40


def test_held_out_digits_are_no_training_digits() -> None:
    pytest.importorskip("sklearn", reason="only training needs scikit-learn")
    train, rest = module("train.py").split()
    images, labels = held_out()
    np.testing.assert_array_equal(rest.images, images)
    np.testing.assert_array_equal(rest.labels, labels)
    seen = {image.tobytes() for image in train.images}
    assert seen.isdisjoint(image.tobytes() for image in rest.images)
    assert len(train.labels) + len(rest.labels) == 1797


def test_weights_are_small_and_float32(weights: Any) -> None:
    assert (FOLDER / "weights.npz").stat().st_size <= 200_000
    assert {array.dtype for array in weights.values()} == {np.dtype(np.float32)}


def test_outputs_are_as_declared(app: ModuleType, weights: Any) -> None:
    images, _ = held_out()
    digits, probabilities = app.predict(images.astype(np.float32), weights)
    assert digits.dtype == np.int64
    assert digits.shape == (len(images),)
    assert probabilities.dtype == np.float32
    assert probabilities.shape == (len(images), 10)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("pixel", [-3e38, 255.0, 3e38])
def test_pixels_out_of_range_are_clipped(
    app: ModuleType, weights: Any, pixel: float
) -> None:
    images = np.full((1, 64), pixel, dtype=np.float32)
    _, probabilities = app.predict(images, weights)
    assert np.isfinite(probabilities).all()


def test_no_images_give_no_digits(app: ModuleType, weights: Any) -> None:
    digits, probabilities = app.predict(np.empty((0, 64), dtype=np.float32), weights)
    assert digits.shape == (0,)
    assert probabilities.shape == (0, 10)


def test_the_sample_is_read_right(app: ModuleType, weights: Any) -> None:
    images, labels = held_out()
    (label,) = labels[(images == sample()).all(axis=1)]
    digits, _ = app.predict(sample(), weights)
    assert digits.tolist() == [label]


def test_the_picture_shows_the_sample() -> None:
    picture = read_png(FOLDER / "sample.png")
    assert picture.shape == (64, 64)
    small = picture[::8, ::8]
    np.testing.assert_array_equal(small.repeat(8, axis=0).repeat(8, axis=1), picture)
    ink = np.rint((255.0 - small) * 16 / 255)
    np.testing.assert_array_equal(ink.reshape(1, 64), sample())


def test_both_protocols_send_the_sample() -> None:
    body = json.loads((FOLDER / "input_v2.json").read_text())
    assert body == {
        "inputs": [
            {
                "name": "images",
                "shape": [1, 64],
                "datatype": "FP32",
                "data": sample()[0].tolist(),
            }
        ]
    }
