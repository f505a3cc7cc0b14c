"""Serve torchvision's AlexNet: a picture comes in, the five likeliest classes go out.

`load` finds the weights, `preprocess` turns what the client sent into one batch of
normalised pixels, `predict` runs the network and `postprocess` names the classes. None
of them knows which protocol was spoken. README.md has the requests and the answers.

A row is either `image`, an encoded picture, or `data`, pixels that are normalised
already. What clients send is not trusted: pictures are bounded in number and in size.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import io
import pickle
import socket
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.models import (  # type: ignore[import-untyped]
    AlexNet,
    AlexNet_Weights,
    alexnet,
)

from kserve_lite import InferRequest, InvalidInput, Model, run

WEIGHTS = AlexNet_Weights.IMAGENET1K_V1
CLASSES = np.array(WEIGHTS.meta["categories"], dtype=object)
TRANSFORMS = WEIGHTS.transforms()  # resize to 256, crop to 224, normalise

MAX_IMAGES = 64
MAX_PIXELS = 50_000_000  # of one picture
MAX_MAGNITUDE = 1e6  # of ready pixels: theirs is about 3, and huge ones overflow to NaN
FORMATS = ("JPEG", "PNG", "WEBP")  # the more of Pillow's formats, the more to attack
DOWNLOAD_TIMEOUT = 20.0  # seconds of silence; some networks neither answer nor refuse

# torch.load documents no errors: these are the ones that broken files make it raise.
UNREADABLE = (
    *(AssertionError, AttributeError, EOFError, LookupError, OSError, RuntimeError),
    *(TypeError, ValueError, pickle.UnpicklingError, struct.error),
)

model = Model("alexnet")


@model.load
def load() -> AlexNet:
    """The network with the model folder's weights, or else the pretrained ones."""
    folder = model.path()
    file = find_weights(folder)
    weights = read_weights(file) if file else download_weights(folder)
    network = alexnet(weights=None)
    try:
        # Strict, as is the default: not one parameter stays random.
        network.load_state_dict(weights)
    except (AttributeError, RuntimeError, TypeError) as error:
        source = file or WEIGHTS.url
        raise RuntimeError(f"{source} is no state dict of AlexNet: {error}") from error
    return network.eval().to("cuda" if torch.cuda.is_available() else "cpu")


@model.preprocess
def preprocess(request: InferRequest) -> torch.Tensor:
    """One batch of normalised pixels, (N, 3, 224, 224), from pictures or ready data."""
    given = [name for name in ("image", "data") if name in request]
    if len(given) != 1:
        got = "both" if given else "neither"
        raise InvalidInput(f"Expected one of the inputs image and data, got {got}.")
    array = request[given[0]]
    got = f"{array.dtype} of shape {list(array.shape)}"
    if array.ndim == 0 or not 1 <= len(array) <= MAX_IMAGES:
        raise InvalidInput(f"Expected 1 to {MAX_IMAGES} images, got {got}.")
    if given == ["data"]:
        if array.dtype.kind not in "iuf" or array.shape[1:] != (3, 224, 224):
            raise InvalidInput(
                f"Expected data to be numbers of shape [N, 3, 224, 224], got {got}."
            )
        return as_pixels(array)
    if array.ndim != 1 or not all(isinstance(item, bytes) for item in array):
        raise InvalidInput(f"Expected image to be BYTES of shape [N], got {got}.")
    return torch.stack([decode(item, row) for row, item in enumerate(array)])


@model.predict
def predict(images: torch.Tensor, state: AlexNet) -> torch.Tensor:
    """Logits, (N, 1000), on the CPU wherever they were computed."""
    with torch.inference_mode():
        logits: torch.Tensor = state(images.to(next(state.parameters()).device))
    return logits.cpu()


@model.postprocess
def postprocess(logits: torch.Tensor) -> dict[str, np.ndarray]:
    """The five likeliest classes of each picture, the likeliest first."""
    top = logits.softmax(dim=1).topk(5)
    indices = top.indices.numpy()
    return {
        "classes": CLASSES[indices],
        "indices": indices,
        "probabilities": top.values.numpy(),
    }


def find_weights(folder: Path) -> Path | None:
    """The folder's alexnet.pt or, whatever its name, its only *.pt or *.pth."""
    files = sorted(f for f in folder.glob("*") if f.suffix in (".pt", ".pth"))
    if folder / "alexnet.pt" in files:
        return folder / "alexnet.pt"
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise RuntimeError(
            f"{folder} holds {names}: which are AlexNet's weights? "
            "Name that file alexnet.pt, or leave only that one"
        )
    return files[0] if files else None


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    try:
        # weights_only: a file from elsewhere must not run code here.
        weights: dict[str, torch.Tensor] = torch.load(file, "cpu", weights_only=True)
    except UNREADABLE as error:
        # Not with torch's own text, which recommends to switch weights_only off.
        raise RuntimeError(
            f"{file} cannot be read as a state dict ({type(error).__name__}): "
            "make one with torch.save(network.state_dict(), ...)"
        ) from error
    return weights


def download_weights(folder: Path) -> dict[str, Any]:
    """Torchvision's pretrained weights, 233 MiB, from torch's cache or its site."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # torch.hub lets nobody pass one
    try:
        weights: dict[str, Any] = WEIGHTS.get_state_dict(
            progress=sys.stderr.isatty(),
            check_hash=True,
            map_location="cpu",
            weights_only=True,
        )
    except (*UNREADABLE, http.client.HTTPException) as error:
        raise RuntimeError(
            f"no AlexNet weights: {folder} holds no *.pt and the download from "
            f"{WEIGHTS.url} failed ({error}); put a state dict in the folder or give "
            "--model_dir"
        ) from error
    finally:
        socket.setdefaulttimeout(before)
    return weights


def as_pixels(array: np.ndarray) -> torch.Tensor:
    """Ready pixels as float32; V1's JSON makes them FP64 or INT64."""
    with np.errstate(over="ignore", invalid="ignore"):  # the next check sees those
        pixels = array.astype(np.float32, order="C")
    if not (np.abs(pixels) <= MAX_MAGNITUDE).all():  # put so, NaN is refused as well
        raise InvalidInput(
            "Expected data to be normalised pixels, got NaN or a number beyond "
            f"{MAX_MAGNITUDE:g}."
        )
    return torch.from_numpy(pixels)


def decode(item: bytes, row: int) -> torch.Tensor:
    """One picture's normalised pixels; it comes raw or, from V2's JSON, as base64."""
    if item.isascii():  # no picture is
        try:
            item = base64.b64decode(b"".join(item.split()), validate=True)
        except binascii.Error:
            raise InvalidInput(
                f"Image {row}: expected a picture or base64 of one, got other text."
            ) from None
    try:
        # Opening reads no more than the header; convert() decodes.
        with Image.open(io.BytesIO(item), formats=FORMATS) as image:
            check_header(image, row)
            pixels: torch.Tensor = TRANSFORMS(image.convert("RGB"))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InvalidInput(
            f"Image {row}: expected at most {MAX_PIXELS:,} pixels, got far more."
        ) from None
    except (OSError, SyntaxError, ValueError):  # Pillow's, for what it cannot read
        raise InvalidInput(
            f"Image {row}: expected a picture ({', '.join(FORMATS)}), got {len(item)} "
            "bytes that cannot be read as one."
        ) from None
    return pixels


def check_header(image: Image.Image, row: int) -> None:
    """Refuse what is small as a file but huge in memory, or would be read wrongly."""
    short, long = sorted(image.size)
    # The transforms make the shorter side 256: a thin line of few pixels grows huge.
    if max(short * long, 256 * 256 * long // short) > MAX_PIXELS:
        raise InvalidInput(
            f"Image {row}: expected at most {MAX_PIXELS:,} pixels, also once its "
            f"shorter side is 256, got {image.width} x {image.height}."
        )
    if image.mode.startswith("I"):  # Pillow would turn nearly all of it white
        raise InvalidInput(f"Image {row}: expected 8 bits a channel, got 16 bits grey.")


if __name__ == "__main__":
    run(model)
