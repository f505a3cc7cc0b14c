"""docs/transformers.md: its program runs, its tables say what is there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from kserve_lite import Model
from kserve_lite.forwarding.failures import OF_GRPC, OF_HTTP
from kserve_lite.rest.replies import STATUS
from kserve_lite.server.settings import known_settings
from kserve_lite.testing import Client
from tests.forwarding.recorder import Recorder, Reply

TEXT = (Path(__file__).parents[2] / "docs/transformers.md").read_text()


def test_its_program_runs(recorded: Recorder) -> None:
    answer = {"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [0.1, 0.9]}
    body = json.dumps({"outputs": [answer]}).encode()
    recorded.in_turn(Reply(404), Reply(body=body))
    found = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert found is not None
    names: dict[str, Any] = {"__name__": "app"}
    exec(compile(found[1], "app.py", "exec", dont_inherit=True), names)
    model = names["model"]
    assert isinstance(model, Model)
    flags = {"predictor_host": recorded.host, "predictor_protocol": "v2"}
    with Client(model, **flags) as client:
        assert client.predict({"instances": [[255] * 64]}) == {"predictions": [1]}
    (sent,) = json.loads(recorded.asked[-1].body)["inputs"]
    assert sent == {"name": "x", "datatype": "FP32", "shape": [1, 64], "data": [1] * 64}


def test_its_flags_are_all_there_are() -> None:
    told = dict(re.findall(r"^\| `--(\w+)` \| (\w*)", TEXT, re.MULTILINE))
    known = {s.name: s for s in known_settings().values() if s.group == "forwarding"}
    assert told.keys() == known.keys() - {"predictor_ca_certs"}
    for name, default in told.items():
        assert known[name].shown.removesuffix(" s") in (default, "none")
    assert "--predictor_ca_certs" in TEXT


def test_its_statuses_are_those_of_the_tables() -> None:
    rows = re.findall(r"^\| (.*?) \| (\d{3})\b", TEXT, re.MULTILINE)
    for codes, status in rows:
        for code in re.findall(r"\b\d{3}\b", codes):
            if "Retry-After" not in codes or code != "503":
                assert STATUS[OF_HTTP[int(code)]] == int(status)
        for code in re.findall(r"[A-Z]+_?[A-Z]+", codes.replace("Retry", "")):
            assert STATUS[OF_GRPC[code]] == int(status)
    told = {int(code) for codes, _ in rows for code in re.findall(r"\b\d{3}\b", codes)}
    assert told == set(OF_HTTP)
