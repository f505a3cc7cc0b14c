"""Serve a small neural network that reads handwritten digits of 8x8 pixels.

A request holds pictures, each a row of 64 pixels from 0 (paper) to 16 (ink). Each is
answered with the likeliest digit and the probabilities of all ten. `load` and
`predict` are plain functions on numpy arrays; README.md has the requests.
train.py made weights.npz.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np

from kserve_lite import Model, TensorSpec, run

Weights = dict[str, np.ndarray]

model = Model("digits")


@model.load
def load() -> Weights:
    """The weights and biases of the network's three layers."""
    with np.load(Path(__file__).with_name("weights.npz")) as file:
        return dict(file)


@model.predict
def predict(
    images: Annotated[np.ndarray, TensorSpec("FP32", [-1, 64])], state: Weights
) -> tuple[
    Annotated[np.ndarray, TensorSpec("INT64", [-1], "digit")],
    Annotated[np.ndarray, TensorSpec("FP32", [-1, 10], "probabilities")],
]:
    """Each image's digit, and how likely the digits 0 to 9 are."""
    # Training saw no other range, and huge pixels would overflow to NaN.
    x = np.clip(images / 16, 0, 1)
    x = np.maximum(x @ state["w1"] + state["b1"], 0)
    x = np.maximum(x @ state["w2"] + state["b2"], 0)
    scores = x @ state["w3"] + state["b3"]
    # Softmax is the same for scores less their maximum, and exp cannot overflow.
    likelihoods = np.exp(scores - scores.max(axis=1, keepdims=True))
    probabilities = likelihoods / likelihoods.sum(axis=1, keepdims=True)
    return probabilities.argmax(axis=1), probabilities


if __name__ == "__main__":
    run(model)
