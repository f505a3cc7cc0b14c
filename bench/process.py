"""What the production process is worth: workers, start, memory, logs and metrics.

`python bench/process.py [--only start ...]` measures four parts, each in rounds in
which the servers alternate, and writes bench/results/process-<part>.json:

workers    requests a second of a handler that computes, 2 workers next to 1
start      seconds to the first 200 for a ready model, next to KServe
memory     of each worker and of what watches over them, next to KServe
observing  what access log and counting cost an echo, next to a server without both

bench/README.md says how. Standard library only, so that any interpreter runs it.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import loaders
import machine
import process_load
import process_size
import report
from compare import HERE, KSERVE_PYTHON, ensure_kserve


@dataclass(frozen=True, slots=True)
class Part:
    """One thing to measure; `programs` make its load."""

    measure: Callable[[argparse.Namespace], dict[str, Any]]
    rounds: int
    programs: tuple[str, ...] = ()
    needs_kserve: bool = False


PARTS = {
    "workers": Part(process_load.workers, 5, ("wrk", "h2load"), needs_kserve=True),
    "start": Part(process_size.start, 9, needs_kserve=True),
    "memory": Part(process_size.memory, 3, ("wrk", "h2load"), needs_kserve=True),
    "observing": Part(process_load.observing, 5, ("wrk",)),
}


def conclude(result: dict[str, Any]) -> None:
    """Print what the bars are about, and what makes it doubtful."""
    for name, bar in result["bars"].items():
        met = "met" if bar["met"] else "NOT met"
        print(f"{name}: {bar['value']:.2f}; bar {bar['bar']}: {met}")
    for warning in result["warnings"]:
        print(f"WARNING: {warning}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    defaults = ", ".join(f"{name} {part.rounds}" for name, part in PARTS.items())
    parser.add_argument("--rounds", type=int, help=f"default: {defaults}")
    help_seconds = "of each round of a load (default: 5)"
    parser.add_argument("--seconds", type=int, default=5, help=help_seconds)
    help_retries = "disturbed rounds of a load to throw away and repeat"
    parser.add_argument("--retries", type=int, default=0, help=help_retries)
    help_wait = "seconds to wait at most for a quiet machine before each round"
    parser.add_argument("--wait", type=float, default=0.0, help=help_wait)
    help_python = "interpreter for kserve-lite (default: this one)"
    parser.add_argument("--python", type=Path, default=sys.executable, help=help_python)
    help_results = "folder for the JSON (default: bench/results)"
    default_results = HERE / "results"
    parser.add_argument(
        "--results", type=Path, default=default_results, help=help_results
    )
    options = parser.parse_args()
    # Else `timeout` or `kill` would end this program and leave its servers running.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    parts = {name: PARTS[name] for name in PARTS if name in options.only}
    loaders.require(one for part in parts.values() for one in part.programs)
    environments = {"kserve-lite's environment": options.python}
    if any(part.needs_kserve for part in parts.values()):
        ensure_kserve()
        environments["kserve's environment"] = KSERVE_PYTHON
    known = machine.facts(environments)
    for name, part in parts.items():
        rounds = options.rounds or part.rounds
        own = argparse.Namespace(**vars(options) | {"rounds": rounds})
        result = known | {"case": f"process-{name}"} | part.measure(own)
        conclude(result)
        report.save(result, options.results / f"process-{name}.json")


if __name__ == "__main__":
    main()
