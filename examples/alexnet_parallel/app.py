"""AlexNet on two replicas, each a process of Ray Serve with half a GPU, or with a core.

Pictures come in, the five likeliest classes of each go out, as in examples/alexnet,
which has more to say to clients that send nonsense. All handlers run in the replicas:
the server keeps the connections and chooses who gets a request.
"""

from __future__ import annotations

import base64
import io
from typing import Annotated

import numpy as np
import torch
from PIL import Image
from torchvision.models import (  # type: ignore[import-untyped]
    AlexNet,
    AlexNet_Weights,
    alexnet,
)

from kserve_lite import InvalidInput, Model, TensorSpec, run

WEIGHTS = AlexNet_Weights.IMAGENET1K_V1
CLASSES = np.array(WEIGHTS.meta["categories"], dtype=object)
TRANSFORMS = WEIGHTS.transforms()  # resize to 256, crop to 224, normalise
MAX_IMAGES = 16
MAX_PIXELS = 20_000_000  # of one picture

# For each replica. Two halves share a GPU; without one, torch gets as many threads as
# the replica has CPUs.
SHARE = {"num_gpus": 0.5} if torch.cuda.is_available() else {"num_cpus": 1}

model = Model(
    "alexnet",
    replicas=2,
    resources=SHARE,
    idempotent=True,  # asking twice gives the same: a replica may die amid a request
    max_concurrency=1,  # one batch at a time keeps a replica busy
)


@model.load
def load() -> AlexNet:
    """The network, in each replica: the model folder's weights, or torchvision's."""
    file = model.path("alexnet.pt")
    network = alexnet(weights=None if file.exists() else WEIGHTS)
    if file.exists():
        network.load_state_dict(torch.load(file, "cpu", weights_only=True))
    return network.eval().to("cuda" if torch.cuda.is_available() else "cpu")


@model.preprocess
def preprocess(
    image: Annotated[np.ndarray, TensorSpec("BYTES", [-1])],
) -> torch.Tensor:
    """Normalised pixels, (N, 3, 224, 224), of encoded pictures."""
    if not 1 <= len(image) <= MAX_IMAGES:
        raise InvalidInput(f"Expected 1 to {MAX_IMAGES} images, got {len(image)}.")
    return torch.stack([decode(item, row) for row, item in enumerate(image)])


@model.predict(max_batch_size=MAX_IMAGES, max_delay_ms="auto")
def predict(images: torch.Tensor, state: AlexNet) -> torch.Tensor:
    """Logits, (N, 1000), of the images of one or several requests."""
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


def decode(item: bytes, row: int) -> torch.Tensor:
    """One picture's pixels; V2's JSON has it as base64, all else as it is."""
    try:
        if item.isascii():  # no picture is
            item = base64.b64decode(item)
        with Image.open(io.BytesIO(item), formats=("JPEG", "PNG", "WEBP")) as picture:
            short, long = sorted(picture.size)
            # By the header, before there are pixels. The transforms make the shorter
            # side 256, so a long thin line would grow.
            if short * long > MAX_PIXELS or long > 16 * short:
                raise InvalidInput(f"Image {row}: it is too large, or too thin.")
            pixels: torch.Tensor = TRANSFORMS(picture.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InvalidInput(f"Image {row}: expected a picture.") from error
    return pixels


if __name__ == "__main__":
    run(model)
