"""Starts KServe's two AlexNet programs in processes that share the import of torch.

    python start_alexnets.py PICTURE V1_STDERR GRPC_STDERR

That import takes three times as long as all that the programs then do. Weights cannot
be downloaded: $TORCH_HOME, torch's cache folder, gets a file of the right name, with
tensors that repeat a few numbers. Prints the programs' process ids and the five highest
probabilities, by torchvision alone with these weights, and waits for the programs.
"""

import json
import os
import runpy
import sys
from pathlib import Path

import torch
from PIL import Image
from torchvision.models import AlexNet_Weights, alexnet

WEIGHTS = AlexNet_Weights.IMAGENET1K_V1
FILE = Path(os.environ["TORCH_HOME"], "hub", "checkpoints", Path(WEIGHTS.url).name)
NUMBERS = 4099  # a prime: rows of tensors do not repeat each other
FLAGS = ("--http_port", "0", "--max_threads", "2", "--host", "127.0.0.1")


def write_weights() -> None:
    """Write 16 KB that stand for 233 MiB."""
    with torch.device("meta"):
        shapes = {n: t.shape for n, t in alexnet(weights=None).state_dict().items()}
    generator = torch.Generator().manual_seed(11)
    numbers = torch.randn(NUMBERS, generator=generator)
    state = {}
    for name, shape in shapes.items():
        fan_in = max(1, shape[1:].numel())
        scale = (2.0 / fan_in) ** 0.5 * (4 if name == "classifier.6.weight" else 1)
        small = (numbers * scale)[: min(NUMBERS, shape.numel())].clone()
        state[name] = repeated(small, shape)
    FILE.parent.mkdir(parents=True)
    torch.save(state, FILE)


def repeated(numbers: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A tensor of overlapping rows, so that a file holds `numbers` and no more."""
    strides, left = [], len(numbers) - 1
    for size in shape:
        step = max(0, left // max(1, size - 1)) if size > 1 else 0
        step = min(step, 7)
        strides.append(step)
        left -= step * (size - 1)
    return numbers.as_strided(shape, strides)


def best(picture: str) -> list[float]:
    with torch.device("meta"):
        network = alexnet(weights=None).eval()
    network.load_state_dict(torch.load(FILE, weights_only=True), assign=True)
    pixels = WEIGHTS.transforms()(Image.open(picture))
    with torch.inference_mode():
        values: list[float] = (
            network(pixels[None]).softmax(1).topk(5).values[0].tolist()
        )
    return values


def start(program: str, stderr: int) -> int:
    """Run a program as `python PROGRAM FLAGS` would; return its process id."""
    pid = os.fork()
    if pid:
        return pid
    os.dup2(stderr, 2)
    sys.argv = [program, "--model_name", "alexnet", *FLAGS]
    status = 1
    try:
        runpy.run_path(program, run_name="__main__")
        status = 0
    finally:
        os._exit(status)


if __name__ == "__main__":
    picture, *pipes = sys.argv[1:]
    write_weights()
    pids = [
        start(program, int(pipe))
        for program, pipe in zip(("alexnet.py", "alexnet_grpc.py"), pipes, strict=True)
    ]
    print(json.dumps([pids, best(picture)]), flush=True)
    sys.exit(max(os.waitpid(pid, 0)[1] for pid in pids))
