"""Real server processes for tests: started, spoken to, stopped by their id."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

ROOT = Path(__file__).parents[2]
PATIENCE = 30

ECHO = """
from kserve_lite import Model, run

model = Model("m")

@model.predict
async def predict(payload):
    return payload

if __name__ == "__main__":
    run(model)
"""


def environment(**variables: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("PORT", "KSERVE_LOGLEVEL")}
    return kept | {"PYTHONPATH": str(ROOT)} | variables


class Result(NamedTuple):
    """How a process ended."""

    status: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The lines of standard error that are no log lines."""
        return [
            line for line in self.err.splitlines() if not re.match(r"\d{4}-\d\d-", line)
        ]


def finish(*arguments: str, cwd: Path, **variables: str) -> Result:
    """Run Python until it ends by itself."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


class App:
    """A server process; `lines` is what it wrote to standard error until it served."""

    new_session = False

    def __init__(
        self, *arguments: str, cwd: Path, serves: bool = True, **variables: str
    ) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *arguments, "--host", "127.0.0.1"],
            cwd=cwd,
            env=environment(**variables),
            start_new_session=self.new_session,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self.url = ""
        self.curl = ""
        if serves:
            self._read_banner()

    def _read_banner(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))
            if found := re.match(r"kserve-lite serves .* on (http://\S+)$", line):
                self.url = found[1]
            if line.startswith("  curl "):
                self.curl = line.strip()
                return
        self.close()
        raise AssertionError("\n".join(self.lines))

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def stop(self) -> Result:
        self.signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> Result:
        out, err = self.process.communicate(timeout=PATIENCE)
        return Result(self.process.returncode, out, err)

    def said(self) -> str:
        """The next line that the program itself prints."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def release(self) -> None:
        """Let one handler go on that waits in `os.read(0, 1)`."""
        assert self.process.stdin is not None
        self.process.stdin.write("x")
        self.process.stdin.flush()

    def begin(self, path: str, value: Any) -> http.client.HTTPConnection:
        """Send a request; `getresponse()` of what comes back reads the answer."""
        connection = http.client.HTTPConnection(
            "127.0.0.1", self.port, timeout=PATIENCE
        )
        connection.request("POST", path, json.dumps(value))
        return connection

    def ask(self, path: str, value: Any = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection(
            "127.0.0.1", self.port, timeout=PATIENCE
        )
        try:
            if value is None:
                connection.request("GET", path)
            else:
                connection.request("POST", path, json.dumps(value))
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()
