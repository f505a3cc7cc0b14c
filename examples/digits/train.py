"""Train the network that app.py serves, and write every file that lies beside it.

    pip install scikit-learn
    python examples/digits/train.py                   # train, half a minute or so
    python examples/digits/train.py --cross-validate  # judge the settings below

A quarter of scikit-learn's digits is held out: it is neither trained on nor used to
choose a setting, but only measures the finished network. The settings were chosen by
cross-validation within the other three quarters, which takes some minutes. The same
versions on the same machine write the same bytes.
"""

# scikit-learn and scipy have no types, and are not installed where types are checked.
# mypy: disable-error-code="import-not-found, import-untyped"

from __future__ import annotations

import argparse
import struct
import sys
import warnings
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.ndimage import map_coordinates
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import StratifiedKFold, train_test_split
from sklearn.neural_network import MLPClassifier

FOLDER = Path(__file__).parent
SEED = 0
HELD_OUT = 0.25
HIDDEN = (192, 128)
# One pass a rate, each over this many distorted copies of every digit.
LEARNING_RATES = (1e-3, 1e-3, 3e-4, 1e-4)
COPIES = 80
# Standard deviations of the distortions: radians, a factor's logarithm, pixels.
ROTATION, SCALE, SHIFT = 0.1, 0.05, 0.3
SAMPLE_DIGIT = 3
ENLARGE = 8


class Digits(NamedTuple):
    """images: (n, 64), from 0 (paper) to 16 (ink). labels: (n,), from 0 to 9."""

    images: np.ndarray
    labels: np.ndarray

    def pick(self, indices: np.ndarray) -> Digits:
        return Digits(self.images[indices], self.labels[indices])


def split() -> tuple[Digits, Digits]:
    """What is trained on, and what is held out; each class in the same proportion."""
    digits = Digits(*load_digits(return_X_y=True))
    train, held_out = train_test_split(
        np.arange(len(digits.labels)),
        test_size=HELD_OUT,
        stratify=digits.labels,
        random_state=SEED,
    )
    return digits.pick(train), digits.pick(held_out)


def distort(images: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Rotate, scale and shift each image a little, at random.

    A thousand digits are few. Whole-pixel shifts, the usual remedy, did not help this
    network: one pixel of eight is more than the digits vary.
    """
    n = len(images)
    angle = random.normal(0, ROTATION, (n, 1, 1))
    scale = np.exp(random.normal(0, SCALE, (n, 1, 1)))
    down, right = random.normal(0, SHIFT, (2, n, 1, 1))
    y, x = np.mgrid[:8, :8] - 3.5  # from the centre, so that it stays in place
    cos, sin = np.cos(angle) * scale, np.sin(angle) * scale
    rows = cos * y - sin * x + down + 3.5
    columns = sin * y + cos * x + right + 3.5
    number = np.broadcast_to(np.arange(n)[:, None, None], rows.shape)
    return map_coordinates(  # type: ignore[no-any-return]
        images.reshape(n, 8, 8), [number, rows, columns], order=1, mode="grid-constant"
    ).reshape(n, 64)


def fit(digits: Digits) -> MLPClassifier:
    """Train a network; progress is shown on a terminal."""
    random = np.random.default_rng(SEED)
    network = MLPClassifier(
        HIDDEN, max_iter=1, warm_start=True, batch_size=128, random_state=SEED
    )
    labels = np.tile(digits.labels, COPIES)
    for number, rate in enumerate(LEARNING_RATES, 1):
        if sys.stderr.isatty():
            print(f"pass {number} of {len(LEARNING_RATES)}", file=sys.stderr)
        # New distortions each pass, so that none can be learned by heart.
        images = [distort(digits.images, random) for _ in range(COPIES)]
        with warnings.catch_warnings():
            # One iteration a fit is meant: it is how the rate can change.
            warnings.simplefilter("ignore", ConvergenceWarning)
            network.set_params(learning_rate_init=rate)
            network.fit(np.concatenate(images) / 16, labels)
    return network


def accuracy(network: MLPClassifier, digits: Digits) -> float:
    return float(network.score(digits.images / 16, digits.labels))


def cross_validate(digits: Digits) -> float:
    """The mean accuracy on five parts, each by a network trained on the other four."""
    folds = StratifiedKFold(5, shuffle=True, random_state=SEED)
    parts = folds.split(digits.images, digits.labels)
    return float(
        np.mean([accuracy(fit(digits.pick(a)), digits.pick(b)) for a, b in parts])
    )


def write_png(path: Path, image: np.ndarray) -> None:
    """Write an 8x8 image, enlarged, as 8-bit greyscale: dark ink on white paper."""
    grey = np.rint(255 - image.reshape(8, 8) * (255 / 16)).astype(np.uint8)
    grey = grey.repeat(ENLARGE, axis=0).repeat(ENLARGE, axis=1)
    height, width = grey.shape
    # A line begins with the number of its filter; 0 leaves the pixels as they are.
    lines = np.insert(grey, 0, 0, axis=1).tobytes()
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(lines, 9)),
        (b"IEND", b""),
    ]
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for kind, data in chunks:
            checksum = zlib.crc32(kind + data)
            file.write(struct.pack(">I", len(data)) + kind + data)
            file.write(struct.pack(">I", checksum))


def write_requests(image: np.ndarray) -> None:
    """Write the requests on V1 and V2, in lines of eight: one can see the digit."""
    lines = [", ".join(f"{int(v):2}" for v in row) for row in image.reshape(8, 8)]
    pixels = ",\n  ".join(lines)
    (FOLDER / "input.json").write_text(f'{{"instances": [[\n  {pixels}\n]]}}\n')
    tensor = '"name": "images", "shape": [1, 64], "datatype": "FP32"'
    (FOLDER / "input_v2.json").write_text(
        f'{{"inputs": [{{{tensor}, "data": [\n  {pixels}\n]}}]}}\n'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the digits example.")
    parser.add_argument(
        "--cross-validate",
        action="store_true",
        help="judge the settings, write nothing",
    )
    train, held_out = split()
    if parser.parse_args().cross_validate:
        print(f"accuracy by cross-validation: {cross_validate(train):.2%}")
        return
    network = fit(train)
    arrays = {}
    layers = zip(network.coefs_, network.intercepts_, strict=True)
    for number, (weights, biases) in enumerate(layers, 1):
        arrays[f"w{number}"] = weights.astype(np.float32)
        arrays[f"b{number}"] = biases.astype(np.float32)
    np.savez(FOLDER / "weights.npz", **arrays)
    np.savez_compressed(
        FOLDER / "held_out.npz",
        images=held_out.images.astype(np.uint8),
        labels=held_out.labels.astype(np.uint8),
    )
    sample = held_out.images[held_out.labels == SAMPLE_DIGIT][0]
    write_png(FOLDER / "sample.png", sample)
    write_requests(sample)
    reached, count = accuracy(network, held_out), len(held_out.labels)
    print(f"accuracy on {count} held-out digits: {reached:.2%}")


if __name__ == "__main__":
    main()
