"""AlexNet, as every side of the comparison has it, and what torch alone makes of it.

`network()` is the network with weights from a fixed seed: speed does not depend on
them, and nothing is downloaded. As a program this is the bare loop: for each line on
standard input, `{"sizes": {"8": 20, "16": 3}, "seconds": 5}`, it runs batches of these
sizes, in these proportions and shuffled, for so long, and prints the seconds that each
took, by size. No server, no copies, the same input again and again. torch's threads
are left alone, here as in the servers.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections import defaultdict

import torch
import torchvision  # type: ignore[import-untyped]

IMAGE = (3, 224, 224)


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    made: torch.nn.Module = torchvision.models.alexnet(weights=None)
    return made.eval()


def main() -> None:
    model = network()
    draw = random.Random(0)
    print(json.dumps({"threads": torch.get_num_threads()}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        counts = {int(size): count for size, count in asked["sizes"].items()}
        batches = {size: torch.randn(size, *IMAGE) for size in counts}
        turns = [size for size, count in counts.items() for _ in range(count)]
        taken = defaultdict(list)
        with torch.inference_mode():
            for batch in batches.values():
                model(batch)  # A new shape is prepared for once.
            end = time.monotonic() + asked["seconds"]
            while time.monotonic() < end:
                draw.shuffle(turns)
                for size in turns:
                    begin = time.perf_counter()
                    model(batches[size])
                    taken[size].append(time.perf_counter() - begin)
                    if time.monotonic() >= end:
                        break
        print(json.dumps(taken), flush=True)


if __name__ == "__main__":
    main()
