"""AlexNet under load: kserve-lite with batching, without, KServe, and torch alone.

`python bench/alexnet.py` starts one process of each server, checks that all give the
same answer, to the bit, and loads them in turn with wrk, a real-time process where it
may be: 16 connections, each with one image at a time as a V2 binary tensor. Directly
after each turn of kserve-lite a bare loop (alexnet_torch.py) runs batches of the sizes
that the server has just run, so that the ratio says what serving costs. Prints each
round and the targets, and writes bench/results/alexnet.json and .svg. KServe gets torch
too: see `torch_for_kserve`.

Standard library only, so that any interpreter runs it.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import compare
import loaders
import machine
import report
from cases import IMAGE, WRK, Case, binary_head, binary_headers, image_values
from compare import KSERVE_PYTHON, Contender, Round, Server

HERE = Path(__file__).resolve().parent
HEAD = binary_head(IMAGE)
CASE = Case(
    "alexnet",
    "/v2/models/alexnet/infer",
    "",
    lambda: HEAD + image_values(),
    "AlexNet, V2 binary FP32 1x3x224x224",
    target=1.8,
    load=replace(WRK, apart=True),
    headers=binary_headers(HEAD),
    seconds=20,
)
BARE_TARGET = 0.95  # of what torch reaches alone with the same batches
SWEEP = {1: 1, 2: 1, 4: 1, 8: 1, 16: 1}
# Who can be measured: a script and its first argument.
LITE, KSERVE = "serve_alexnet_lite.py", "serve_alexnet_kserve.py"
WAYS = {
    "kserve-lite": (LITE, "batching"),
    "lite-greedy": (LITE, "greedy"),
    "lite-pair": (LITE, "pair"),
    "lite-single": (LITE, "single"),
    "lite-threaded": (LITE, "threaded"),
    "kserve": (KSERVE, "loop"),
    "kserve-thread": (KSERVE, "thread"),
}
USUAL = ("kserve-lite", "lite-single", "kserve", "kserve-thread")
SWITCHED_OFF = {
    "kserve": report.SWITCHED_OFF["kserve"],
    "kserve-thread": "the same as kserve",
    "kserve-lite": "nothing; max_concurrency=1, max_batch_size=16, max_delay_ms='auto'",
    "lite-greedy": "nothing; max_concurrency=1, max_batch_size=16, max_delay_ms=0",
    "lite-pair": "nothing; one torch thread, max_concurrency=2, else as kserve-lite",
    "lite-single": "batching; max_concurrency=1",
    "lite-threaded": "batching; no bound on concurrency but the threads",
    "all": "gradients (torch.inference_mode); the number of torch's threads is its own "
    "where nothing else is said",
}
NOT_MEASURED = (
    "trained weights (speed does not depend on them), other torch thread settings, a "
    "GPU, preprocessing, images that differ, a network between client and server; the "
    "client (real-time, as on a machine of its own, where permitted) takes processor "
    "time that the bare loop does not have to share"
)


@dataclass(frozen=True, slots=True)
class BatchedRound(Round):
    """A turn of kserve-lite: how often it ran which batch size, and torch after it."""

    sizes: dict[int, int] = field(default_factory=dict)
    torch_alone: float = 0.0  # images a second of the bare loop with these sizes

    @property
    def mean_size(self) -> float:
        return rows(self.sizes) / sum(self.sizes.values())

    @property
    def of_torch(self) -> float:
        return self.requests_per_second / self.torch_alone


def rows(sizes: Mapping[int, int]) -> int:
    return sum(size * count for size, count in sizes.items())


class BareLoop:
    """alexnet_torch.py, kept running; between the turns it waits."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.threads = int(self._line()["threads"])

    def rates(self, sizes: Mapping[int, int], seconds: float) -> dict[int, float]:
        """Images a second by batch size, of batches in these proportions."""
        assert self._process.stdin is not None
        asked = {"sizes": sizes, "seconds": seconds}
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        return {
            # The mean, as the servers' images a second count their slow batches too.
            int(size): int(size) / statistics.fmean(taken)
            for size, taken in self._line().items()
        }

    def rate(self, sizes: Mapping[int, int], seconds: float) -> float:
        """Images a second of all these batches together, each at its own speed."""
        alone = self.rates(_smaller(sizes), seconds)
        # A size so rare that it was not run is left out on both sides.
        known = {size: count for size, count in sizes.items() if size in alone}
        taken = sum(count * size / alone[size] for size, count in known.items())
        return rows(known) / taken

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        text = self._process.stdout.readline()
        if not text:
            raise SystemExit("the bare loop ended: see above")
        return cast("dict[str, Any]", json.loads(text))


def _smaller(sizes: Mapping[int, int]) -> dict[int, int]:
    """About the same proportions in few batches, every size at least once."""
    whole = sum(sizes.values())
    return {size: max(1, round(20 * count / whole)) for size, count in sizes.items()}


@contextlib.contextmanager
def bare_loop(python: Path) -> Iterator[BareLoop]:
    argv = [str(python), str(HERE / "alexnet_torch.py")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(argv, text=True, **pipes) as process:  # type: ignore[call-overload]
        try:
            yield BareLoop(process)
        finally:
            process.terminate()


def torch_for_kserve(python: Path) -> Path | None:
    """Where KServe's server finds torch: None for in its own environment.

    Else the folder of kserve-lite's environment, where that has the same version of
    Python; if not, it is installed (some GB).
    """
    own = machine.versions(KSERVE_PYTHON)
    if "torch" in own and "torchvision" in own:
        return None
    lender = machine.versions(python)
    if "torch" not in lender or "torchvision" not in lender:
        raise SystemExit(f"{python} has no torch and torchvision, which AlexNet needs")
    if _minor(own["python"]) == _minor(lender["python"]):
        find = "import torch; print(torch.__path__[0])"
        return Path(machine.output_of(str(python), "-c", find)).parent
    print("installing torch and torchvision into KServe's environment")
    pins = [f"{name}=={lender[name].partition('+')[0]}" for name in machine.TORCH]
    install = [str(KSERVE_PYTHON), "-m", "pip", "install", "-q", *pins]
    subprocess.run(install, check=True)
    return None


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


def contender(
    name: str, python: Path, torch_from: Path | None, flags: Sequence[str] = ()
) -> Contender:
    """The server of this name; `flags` go to kserve-lite's command line."""
    script, way = WAYS[name]
    if script == LITE:
        argv = (script, way, "--http_port", "{port}", "--host", "127.0.0.1")
        return Contender(name, python, (*argv, *flags), CASE.load)
    lent = () if torch_from is None else ("--torch_from", str(torch_from))
    argv = (script, way, "--port", "{port}", *lent)
    return Contender(name, KSERVE_PYTHON, argv, CASE.load)


def batch_sizes(server: Server) -> dict[int, int]:
    """How many batches of which size kserve-lite ran since it was last asked."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", "/v1/models/batches:predict", "{}")
    found = json.loads(connection.getresponse().read())["predictions"]
    connection.close()
    return {int(size): count for size, count in found.items()}


def turn(server: Server, body: Path, bare: BareLoop, seconds: int) -> Round:
    if server.contender.is_lite:
        batch_sizes(server)  # of what came before
    seen = compare.load(server, CASE, body, seconds=seconds, answer_bytes=0)
    if not server.contender.is_lite:
        return seen
    sizes = batch_sizes(server)
    alone = bare.rate(sizes, seconds / 2)
    return BatchedRound(**asdict(seen), sizes=sizes, torch_alone=alone)


def conclude_batches(server: Server) -> dict[str, Any]:
    """Print and return what batches a kserve-lite server ran, next to torch alone."""
    rounds = [one for one in server.rounds if isinstance(one, BatchedRound)]
    mean = statistics.median(one.mean_size for one in rounds)
    alone = statistics.median(one.torch_alone for one in rounds)
    each = [one.of_torch for one in rounds]
    ratio = statistics.median(each)
    name = server.contender.name
    print(
        f"{name}: batches of {mean:.1f} on average; torch alone with the same", end=" "
    )
    print(f"sizes {alone:.1f} images/s: {ratio:.3f} of that", end=" ")
    print(f"({min(each):.3f} to {max(each):.3f} over rounds)")
    return {"mean_batch_size": mean, "torch_alone": alone, "of_torch": ratio}


def targets(servers: Sequence[Server], of_torch: float) -> list[dict[str, Any]]:
    """The three targets, each against the way of KServe that does best in it."""
    first = next(one for one in servers if one.contender.name == "kserve-lite")
    rivals = [one for one in servers if not one.contender.is_lite]
    rate, p99 = "requests_per_second", "p99_ms"
    best = max(compare.median(one, rate) for one in rivals)
    least = min(compare.median(one, p99) for one in rivals)
    found = (
        ("images/s, to KServe", compare.median(first, rate) / best, CASE.target or 0.0),
        ("images/s, to torch alone", of_torch, BARE_TARGET),
        ("p99, KServe's to kserve-lite's", least / compare.median(first, p99), 1.0),
    )
    for what, reached, target in found:
        met = "met" if reached >= target else "NOT met"
        print(f"target: {what}: {reached:.3f}, at least {target:g}: {met}")
    names = ("what", "reached", "target")
    return [dict(zip(names, one, strict=True)) for one in found]


def measure(chosen: Sequence[Contender], options: argparse.Namespace) -> dict[str, Any]:
    seconds = options.seconds
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        body = scratch / "body"
        body.write_bytes(CASE.body())
        bare = stack.enter_context(bare_loop(options.python))
        servers = [
            stack.enter_context(compare.started(one, CASE, scratch)) for one in chosen
        ]
        replies = compare.ask_all(servers, CASE, body)
        size = body.stat().st_size
        print(
            f"\n{CASE.name}: {CASE.what}; {size:,} byte body, {CASE.load}, {seconds} s",
            end="",
        )
        print(f" a round; torch runs {bare.threads} threads")
        report.heads()
        for one in servers:
            turn(one, body, bare, max(5, compare.warm_up(seconds)))
        sweeps = [bare.rates(SWEEP, seconds)]
        discarded = compare.run_rounds(
            servers, lambda one: turn(one, body, bare, seconds), options
        )
        sweeps.append(bare.rates(SWEEP, seconds))
        for one in servers:
            compare.conclude_server(one)
    summaries = {
        one.contender.name: compare.summary(one, reply, seconds)
        for one, reply in zip(servers, replies, strict=True)
    }
    for sweep in sweeps:
        rates = ", ".join(
            f"{rate:.1f} at {size}" for size, rate in sorted(sweep.items())
        )
        print(f"torch alone, images/s by batch size: {rates}")
    for one in servers:
        if one.contender.is_lite:
            summaries[one.contender.name] |= conclude_batches(one)
    return {
        "case": CASE.name,
        "what": CASE.what,
        "request": {"path": CASE.path, "body_bytes": size},
        "answers_byte_equal": len({one.content for one in replies}) == 1,
        "seconds": seconds,
        "rounds_thrown_away": discarded,
        "torch_threads": bare.threads,
        "torch_alone_before_and_after": sweeps,
        "ratios": compare.ratios(servers),
        "targets": targets(servers, summaries["kserve-lite"]["of_torch"])
        if {"kserve-lite", "kserve"} <= summaries.keys()
        else [],
        "target_met": None,
        "servers": summaries,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    help_seconds = "of each turn; the bare loop after it takes half (default: 20)"
    parser.add_argument("--seconds", type=int, default=CASE.seconds, help=help_seconds)
    parser.add_argument("--rounds", type=int, default=3)
    help_retries = "disturbed rounds to throw away and repeat"
    parser.add_argument("--retries", type=int, default=0, help=help_retries)
    help_wait = "seconds to wait at most for a quiet machine before each round"
    parser.add_argument("--wait", type=float, default=0.0, help=help_wait)
    help_servers = f"(default: {' '.join(USUAL)})"
    parser.add_argument(
        "--servers", nargs="+", choices=WAYS, default=list(USUAL), help=help_servers
    )
    help_python = "interpreter for kserve-lite, with torch (default: this one)"
    parser.add_argument("--python", type=Path, default=sys.executable, help=help_python)
    help_results = "folder for the JSON and the plot (default: bench/results)"
    default_results = HERE / "results"
    parser.add_argument(
        "--results", type=Path, default=default_results, help=help_results
    )
    options = parser.parse_args()
    # Else `timeout` or `kill` would end this program and leave its servers running.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    loaders.require(["wrk"])
    environments = {"kserve-lite's environment": options.python}
    torch_from = None
    if any(WAYS[name][0] == KSERVE for name in options.servers):
        compare.ensure_kserve()
        environments["kserve's environment"] = KSERVE_PYTHON
        torch_from = torch_for_kserve(options.python)
    known = machine.facts(environments) | {
        "torch_of_kserve": "kserve-lite's environment" if torch_from else "its own",
        "switched_off": SWITCHED_OFF,
        "not_measured": NOT_MEASURED,
    }
    chosen = [contender(name, options.python, torch_from) for name in options.servers]
    result = known | measure(chosen, options)
    report.conclude(result)
    # Half a comparison must not replace a whole one.
    suffix = "" if set(USUAL) <= set(options.servers) else ".part"
    report.write(result, options.results, suffix)


if __name__ == "__main__":
    main()
