"""curl and nghttp, as people type them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from tests.clients.models import make_echo
from tests.support import ServerThread

needs_curl = pytest.mark.skipif(
    shutil.which("curl") is None, reason="curl is not installed"
)
needs_nghttp = pytest.mark.skipif(
    shutil.which("nghttp") is None, reason="nghttp is not installed"
)
needs_h2load = pytest.mark.skipif(
    shutil.which("h2load") is None, reason="h2load is not installed"
)
BODY = '{"instances": [1, 2]}'
ANSWER = {"predictions": [1, 2]}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with ServerThread(make_echo()) as server:
        yield server.url


def said(*command: str, given: str = "") -> str:
    done = subprocess.run(
        command, input=given, capture_output=True, text=True, timeout=20, check=True
    )
    return done.stdout


WRITE = ("-w", "\n%{http_version} %{http_code}")


@needs_curl
@pytest.mark.parametrize(
    ("option", "version"),
    [
        ("--http1.0", "1.0|1.1"),
        ("--http1.1", "1.1"),
        ("--http2", "1.1"),  # by Upgrade, which is ignored
        ("--http2-prior-knowledge", "2"),
    ],
)
def test_curl(url: str, option: str, version: str) -> None:
    predict = f"{url}/v1/models/echo:predict"
    got = said("curl", "-sS", option, *WRITE, "-d", BODY, predict)
    answer, _, status = got.rpartition("\n")
    assert json.loads(answer) == ANSWER
    assert re.fullmatch(rf"({version}) 200", status)
    live = said("curl", "-sS", option, *WRITE, f"{url}/v2/health/live")
    assert live.startswith('{"live":true}\n')
    missing = said("curl", "-sS", option, *WRITE, f"{url}/v2/models/nobody")
    assert missing.endswith(" 404")


@needs_curl
@pytest.mark.parametrize("option", ["--http1.1", "--http2-prior-knowledge"])
def test_curl_sends_much(url: str, option: str) -> None:
    numbers = list(range(200_000))
    answer = said(
        "curl",
        "-sS",
        option,
        "--data-binary",
        "@-",
        f"{url}/v1/models/echo:predict",
        given=json.dumps({"instances": numbers}),
    )
    assert json.loads(answer) == {"predictions": numbers}


@needs_nghttp
def test_nghttp(url: str) -> None:
    got = said("nghttp", "-v", f"{url}/v2/health/live", f"{url}/v2/models/echo")
    statuses = re.findall(r"recv \(stream_id=(\d+)\) :status: (\d+)", got)
    assert [status for _, status in statuses] == ["200", "200"]
    assert len(dict(statuses)) == 2
    assert '{"live":true}' in got
    assert "error_code=NO_ERROR" in got


@needs_nghttp
def test_nghttp_posts(url: str) -> None:
    predict = f"{url}/v1/models/echo:predict"
    assert json.loads(said("nghttp", "-d", "-", predict, given=BODY)) == ANSWER


@needs_nghttp
def test_nghttp_upgrades_in_vain(url: str) -> None:
    """`-u` asks for h2c by Upgrade: it is answered by HTTP/1.1 all the same."""
    done = subprocess.run(
        ["nghttp", "-u", "-v", f"{url}/v2/health/live"],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert "HTTP/1.1 200 OK" in done.stdout


@needs_h2load
def test_h2load(url: str) -> None:
    got = said("h2load", "-n2000", "-c4", "-m16", f"{url}/v2/health/live")
    assert "2000 succeeded, 0 failed, 0 errored" in got
