"""How much memory one large tensor costs kserve-lite, at its peak.

`python bench/memory.py` starts a server for each measurement, sends it one V2 request
of 100 MB as a binary tensor with curl, which is echoed as one, and reads from /proc how
far the resident memory of the process rose meanwhile, as a multiple of the tensor. It
prints a line for each measurement and writes bench/results/memory.json. It needs Linux
and curl, and no KServe. bench/README.md says what counts as idle.

Standard library only, so that any interpreter runs it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import answers
import loaders
import machine
import report
from cases import FEW, V2, Case, binary_head, binary_headers, image_values
from compare import lite, started

HERE = Path(__file__).resolve().parent
SIZE = 100_000_000  # bytes of the tensor
BAR = 2.3  # times that
# How curl sends it. Left alone over HTTP/1.1, it asks for leave before a large body,
# which clients in Python do not; such a request goes through h11 in the server.
WAYS = {
    "http1": ("--http1.1", "-H", "expect:"),
    "http1-expect": ("--http1.1", "-H", "expect: 100-continue"),
    "http2": ("--http2-prior-knowledge",),
}


@dataclass(frozen=True, slots=True)
class Peak:
    """One measurement; `multiple` is what the peak has over idle, by SIZE."""

    multiple: float
    idle_kib: int
    peak_kib: int
    after_kib: int  # once the answer had gone and the process had nothing to do
    seconds: float  # of curl, which also reads and writes a file


def tensor_of(size: int) -> bytes:
    values = image_values()
    return (values * (size // len(values) + 1))[:size]


def echo(port: int, tensor: bytes, way: Sequence[str], scratch: Path) -> float:
    """Send a tensor, and stop unless it comes back; give back the seconds of curl."""
    head = binary_head([len(tensor) // 4])
    body, answer = scratch / "body", scratch / "answer"
    body.write_bytes(head + tensor)
    argv = ["curl", "--silent", "--show-error", "--max-time", "120", *way]
    argv += ["--output", str(answer), "--data-binary", f"@{body}"]
    for name, value in binary_headers(head):
        argv += ["-H", f"{name}: {value}"]
    begin = time.monotonic()
    done = subprocess.run([*argv, f"http://127.0.0.1:{port}{V2}"], check=False)
    seconds = time.monotonic() - begin
    if done.returncode:
        raise SystemExit(f"curl ended with {done.returncode}: see above")
    content = answer.read_bytes()
    try:
        found = answers.binary(content, max(0, len(content) - len(tensor)))
    except (ValueError, KeyError):
        found = {}
    if list(found.get("tensors", {}).values()) != [tensor]:
        raise SystemExit(f"the tensor did not come back: {content[:300]!r}")
    return seconds


def measure(python: Path, way: Sequence[str], scratch: Path) -> Peak:
    """One request to a new server: an old one has memory that it freed and kept."""
    case = Case("memory", V2, "large_tensor", bytes, "")
    with started(lite(python, FEW), case, scratch) as server:
        pid = server.process.pid
        echo(server.port, tensor_of(16), way, scratch)  # Imports numpy, for one.
        tensor = tensor_of(SIZE)
        machine.wait_until_idle(pid, limit=10.0)
        machine.reset_peak(pid)
        idle = machine.memory(pid, "VmRSS")
        seconds = echo(server.port, tensor, way, scratch)
        peak = machine.memory(pid, "VmHWM")
        machine.wait_until_idle(pid, limit=10.0)
        after = machine.memory(pid, "VmRSS")
    return Peak((peak - idle) * 1024 / SIZE, idle, peak, after, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--way", nargs="+", choices=WAYS, default=list(WAYS))
    help_python = "interpreter for kserve-lite (default: this one)"
    parser.add_argument("--python", type=Path, default=sys.executable, help=help_python)
    help_results = "folder for the JSON (default: bench/results)"
    default_results = HERE / "results"
    parser.add_argument(
        "--results", type=Path, default=default_results, help=help_results
    )
    options = parser.parse_args()
    loaders.require(["curl"])
    known = machine.facts({"kserve-lite's environment": options.python})
    print(f"memory: V2 binary echo of {SIZE:,} bytes, FP32, above idle, by that size")
    seen: dict[str, list[Peak]] = {way: [] for way in options.way}
    for number in range(options.rounds):
        for way, peaks in seen.items():
            with tempfile.TemporaryDirectory() as scratch:
                one = measure(options.python, WAYS[way], Path(scratch))
            peaks.append(one)
            kib = (one.idle_kib, one.peak_kib, one.after_kib)
            idle, peak, after = (value / 1024 for value in kib)
            print(
                f"{number + 1:<7}{way:14}{one.multiple:6.2f}x   {idle:.0f} MiB", end=""
            )
            print(f" idle, {peak:.0f} peak, {after:.0f} after", end="")
            print(f"; {one.seconds:.2f} s", flush=True)
    worst = {way: max(one.multiple for one in peaks) for way, peaks in seen.items()}
    for way, multiple in worst.items():
        met = "met" if multiple <= BAR else "NOT met"
        print(f"{way}: {multiple:.2f}x at most; bar {BAR:g}x: {met}")
    result = known | {
        "case": "memory",
        "what": "V2 binary echo: peak resident memory above idle, by the tensor's size",
        "request": {"path": V2, "tensor_bytes": SIZE},
        "bar": BAR,
        "bar_met": all(multiple <= BAR for multiple in worst.values()),
        "ways": {
            way: {
                "client": " ".join(("curl", *WAYS[way])),
                "most": worst[way],
                "rounds": [asdict(one) for one in peaks],
            }
            for way, peaks in seen.items()
        },
    }
    report.save(result, options.results / "memory.json")


if __name__ == "__main__":
    main()
