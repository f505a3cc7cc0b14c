"""`/metrics`: both formats, read back by prometheus_client's own parsers."""

from __future__ import annotations

import http.client
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import anyio
import prometheus_client
import pytest
from prometheus_client import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_open,
)
from prometheus_client.parser import text_string_to_metric_families as parse_plain
from prometheus_client.utils import floatToGoString

from kserve_lite import Model
from kserve_lite.counters import NOW, SPARE, Board, State
from kserve_lite.metrics import (
    BATCH_ROWS,
    CONNECTIONS,
    FAMILIES,
    IN_FLIGHT,
    MOST_REMEMBERED,
    PREDICT,
    QUEUE_TIMES,
    RECEIVED,
    REQUEST_TIMES,
    REQUESTS,
    SECOND,
    WORKERS,
    HistogramFamily,
    RequestCounts,
)
from kserve_lite.records import Record
from kserve_lite.server.metrics import Metrics
from tests.support import ServerThread
from tests.transports.client import echo

ROOT = Path(__file__).parents[2]
PLAIN = "text/plain; version=0.0.4; charset=utf-8"
OPEN = (
    "application/openmetrics-text; version=1.0.0; charset=utf-8; escaping=underscores"
)
ASK_OPEN = "application/openmetrics-text; version=1.0.0"
AWKWARD = ['q"uote', "new\nline", "back\\slash", "größe 🜁", "", "a,b={}", "\\n"]

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def render(metrics: Metrics, accept: str | None = None) -> tuple[str, str]:
    content_type, body = anyio.run(metrics.render, accept)
    return content_type.decode(), body.decode()


def parse(content_type: str, text: str) -> list[Metric]:
    found = list((parse_open if "openmetrics" in content_type else parse_plain)(text))
    assert len({metric.name for metric in found}) == len(found)
    return found


def samples(families: Iterable[Metric]) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def shown(board: Board, accept: str | None = None) -> Samples:
    return samples(parse(*render(Metrics(board), accept)))


def at(name: str, **labels: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    return name, tuple(sorted(labels.items()))


@pytest.fixture
def two() -> Iterator[Board]:
    board = Board(2)
    yield board
    board.close()


def counted() -> Board:
    """A board with something of every kind, in several sizes."""
    board = Board()
    (sheet,) = board.sheets
    for number, model in enumerate(["m", *AWKWARD]):
        for size in range(0, 20 * SECOND, SECOND // 3):
            PREDICT.on(sheet, model).observe(size * (number + 1))
        QUEUE_TIMES.on(sheet, model).observe(7)
        BATCH_ROWS.on(sheet, model).observe(10**12 * number)
        REQUESTS.on(sheet, model, "v1", "predict", "200").add(17**number)
        IN_FLIGHT.on(sheet, model).set(number)
    RECEIVED.on(sheet).add(123_456_789_000)
    CONNECTIONS.on(sheet).set(1_000_000)
    return board


# --- What is shown ---


@pytest.mark.parametrize("accept", [None, ASK_OPEN])
def test_both_formats_say_what_was_counted(accept: str | None) -> None:
    found = shown(counted(), accept)
    for number, model in enumerate(["m", *AWKWARD]):
        sizes = [s * (number + 1) for s in range(0, 20 * SECOND, SECOND // 3)]
        for bound in (*PREDICT.bounds, math.inf):
            le = "+Inf" if bound == math.inf else repr(bound / SECOND)
            assert found[
                at("request_predict_seconds_bucket", model_name=model, le=le)
            ] == sum(size <= bound for size in sizes)
        of_model = {"model_name": model}
        assert found[at("request_predict_seconds_count", **of_model)] == len(sizes)
        assert found[at("request_predict_seconds_sum", **of_model)] == pytest.approx(
            sum(sizes) / SECOND
        )
        labels = of_model | {"protocol": "v1", "method": "predict", "code": "200"}
        assert found[at("kserve_lite_requests_total", **labels)] == 17**number
        assert found[at("kserve_lite_requests_in_flight", **of_model)] == number
        assert found[at("kserve_lite_batch_rows_sum", **of_model)] == 10**12 * number
    assert found[at("kserve_lite_received_bytes_total")] == 123_456_789_000
    assert found[at("kserve_lite_connections")] == 1_000_000


def test_what_has_no_labels_is_zero_before_it_is_counted() -> None:
    found = shown(Board())
    for family in FAMILIES:
        if not family.labels:
            assert found[at(family.name)] == 0


class Theirs:
    """The same families for prometheus_client's encoders, as its metrics give them."""

    def __init__(self, board: Board) -> None:
        self._board = board

    def collect(self) -> Iterator[Metric]:
        totals = self._board.totals()
        for state in list(State)[1:]:
            totals[WORKERS.name, state.name.lower()] = [0]
        for family in FAMILIES:
            metric = Metric(family.stem, family.help, family.kind)
            rows = [
                (key[2:] if key[0] == NOW else key[1:], numbers)
                for key, numbers in totals.items()
                if family.name in key[:2]
            ]
            if not family.labels and not rows:
                rows = [((), [0])]
            for values, numbers in rows:
                labels = dict(zip(family.labels, values, strict=True))
                if isinstance(family, HistogramFamily):
                    self._histogram(metric, family, labels, numbers)
                else:
                    metric.add_sample(family.name, labels, numbers[0])
                if family.kind != "gauge":
                    name = f"{family.stem}_created"
                    metric.add_sample(name, labels, self._board.since)
            yield metric

    def _histogram(
        self,
        metric: Metric,
        family: HistogramFamily,
        labels: dict[str, str],
        numbers: list[int],
    ) -> None:
        counts = list(accumulate(numbers[:-1]))
        for bound, count in zip((*family.bounds, math.inf), counts, strict=True):
            le = "+Inf" if bound == math.inf else _go(bound / family.unit)
            metric.add_sample(f"{family.name}_bucket", {**labels, "le": le}, count)
        metric.add_sample(f"{family.name}_count", labels, counts[-1])
        metric.add_sample(f"{family.name}_sum", labels, numbers[-1] / family.unit)


def _go(number: float) -> str:
    text: Any = floatToGoString  # has no types
    return str(text(number))


@pytest.mark.parametrize("accept", ["", ASK_OPEN])
@pytest.mark.parametrize("board", [counted(), Board()], ids=["counted", "empty"])
def test_ours_is_byte_for_byte_what_prometheus_client_writes(
    accept: str, board: Board
) -> None:
    _, text = render(Metrics(board), accept)
    begin = text.index(f"# HELP {FAMILIES[0].name}")
    encode, _ = choose_encoder(accept)
    assert text[begin:] == encode(Theirs(board)).decode()


def test_names_labels_and_rows_are_such_as_can_be_shown() -> None:
    stems = [family.stem for family in FAMILIES]
    assert len(set(stems)) == len(stems)  # OpenMetrics: a name has one family
    for family in FAMILIES:
        assert family.kind in ("counter", "gauge", "histogram")
        assert family.name.endswith("_total") == (family.kind == "counter")
        assert family.width <= SPARE
        assert all(label > "le" for label in family.labels) or family.width == 1
        if isinstance(family, HistogramFamily):
            assert list(family.bounds) == sorted(set(family.bounds))


def test_kserves_histograms_have_its_buckets() -> None:
    theirs = prometheus_client.Histogram.DEFAULT_BUCKETS
    assert [bound / SECOND for bound in PREDICT.bounds] == list(theirs[:-1])


def test_created_lines_can_be_switched_off() -> None:
    library: Any = prometheus_client  # these have no types
    board = counted()
    since = shown(board)[at("request_predict_seconds_created", model_name="m")]
    assert since == pytest.approx(board.since, abs=0.001)
    library.disable_created_metrics()
    try:
        for accept in (None, ASK_OPEN):
            assert not [name for name, _ in shown(board, accept) if "_created" in name]
    finally:
        library.enable_created_metrics()


def test_rows_that_are_not_ours_to_show_are_not_shown() -> None:
    board = Board()
    (sheet,) = board.sheets
    sheet.counter("statistics", "m").add(3)
    sheet.row("batch", "m", "4", width=2)
    sheet.row(PREDICT.name, "m", width=3)  # of code with other bounds
    sheet.row(REQUESTS.name, "m")  # of code with other labels
    for accept in (None, ASK_OPEN):
        _, text = render(Metrics(board), accept)
        assert "statistics" not in text
        assert '"m"' not in text
        assert '"4"' not in text


def test_a_name_that_is_no_unicode_is_shown_as_far_as_it_is() -> None:
    board = Board()
    PREDICT.on(board.sheets[0], "a\ud800b").observe(1)
    labels = {"model_name": "a?b"}
    assert shown(board)[at("request_predict_seconds_count", **labels)] == 1


# --- What is asked for ---


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        (None, PLAIN),
        ("", PLAIN),
        ("*/*", PLAIN),
        ("text/html,application/xhtml+xml,*/*;q=0.8", PLAIN),
        ("text/plain;version=0.0.4", PLAIN),
        (ASK_OPEN, OPEN),
        ("application/openmetrics-text;version=1.0.0;q=0.5,text/plain;q=0.1", OPEN),
        ("application/openmetrics-text;version=1.0.0;escaping=dots", OPEN),
        ("application/openmetrics-text;version=7.0", OPEN.partition("; esc")[0]),
        ("application/openmetrics-text;version=0.0.1,text/plain", PLAIN),
        ("application/openmetrics-text;version=1.x", PLAIN),
        ("application/openmetrics-text;version=1.0.0é", PLAIN),
        ("application/openmetrics-text;version=" + "9" * 5000, None),
        (",;=,;;version=,\x7f application/openmetrics-text;;=;version", None),
        ("," * 8000, PLAIN),
    ],
)
def test_any_accept_header_is_answered(
    accept: str | None, expected: str | None
) -> None:
    board = Board()
    PREDICT.on(board.sheets[0], "m").observe(1)
    content_type, text = render(Metrics(board), accept)
    if expected is not None:
        assert content_type.startswith(expected)
    assert content_type.startswith((PLAIN, "application/openmetrics-text; version=1."))
    found = samples(parse(content_type, text))
    assert found[at("request_predict_seconds_count", model_name="m")] == 1


def test_what_holds_now_is_published_before_it_is_read() -> None:
    board = Board()
    busy = IN_FLIGHT.on(board.sheets[0], "m")
    metrics = Metrics(board, publish=lambda: busy.set(4))
    found = samples(parse(*render(metrics)))
    assert found[at("kserve_lite_requests_in_flight", model_name="m")] == 4


@pytest.mark.anyio
async def test_those_who_wait_share_an_answer() -> None:
    """However many ask at once, few answers are made; none is older than its asking."""
    board = Board()
    made: list[int] = []
    metrics = Metrics(board, publish=lambda: made.append(1))
    answers: list[bytes] = []

    async def ask() -> None:
        answers.append((await metrics.render(None))[1])

    async with anyio.create_task_group() as tasks:
        for _ in range(100):
            tasks.start_soon(ask)
    assert len(answers) == 100
    assert len(made) <= 2
    made.clear()
    RECEIVED.on(board.sheets[0]).add(5)
    await ask()
    assert made
    assert b"kserve_lite_received_bytes_total 5.0\n" in answers[-1]


@pytest.mark.anyio
async def test_others_have_their_turn_while_much_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kserve_lite.server.metrics._SLICE", 0)
    board = Board()
    for i in range(500):
        PREDICT.on(board.sheets[0], str(i)).observe(1)
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(others)
        await anyio.lowlevel.checkpoint()
        before = turns
        await Metrics(board).render()
        during = turns - before
        tasks.cancel_scope.cancel()
    assert during >= 500


# --- What is not ours ---


def test_the_default_registry_is_shown_but_for_our_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """KServe's SDK, if it is imported, registers the same histograms."""
    registry = prometheus_client.CollectorRegistry()
    prometheus_client.PlatformCollector(registry)
    prometheus_client.ProcessCollector(registry=registry)
    mine = prometheus_client.Counter("mine", "Of the user", registry=registry)
    mine.inc(3)
    theirs = prometheus_client.Histogram(
        "request_predict_seconds", "KServe's", ["model_name"], registry=registry
    )
    theirs.labels("m").observe(1)
    monkeypatch.setattr(prometheus_client, "REGISTRY", registry)
    board = Board()
    PREDICT.on(board.sheets[0], "m").observe(1)
    PREDICT.on(board.sheets[0], "m").observe(1)
    for accept in (None, ASK_OPEN):
        found = shown(board, accept)
        assert found[at("mine_total")] == 3
        assert found[at("process_open_fds")] > 0
        assert any(name == "python_info" for name, _ in found)
        assert found[at("request_predict_seconds_count", model_name="m")] == 2


def test_a_collector_that_fails_takes_only_what_is_not_ours(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Fails:
        def collect(self) -> Iterator[Metric]:
            yield Metric("half", "Of a collector", "gauge")
            raise RuntimeError("secret")

    monkeypatch.setattr(prometheus_client, "REGISTRY", Fails())
    content_type, text = render(Metrics(counted()), ASK_OPEN)
    found = samples(parse(content_type, text))
    assert found[at("kserve_lite_connections")] == 1_000_000
    assert "secret" not in text
    assert "half" not in text
    assert "a collector" in caplog.text


# --- Several processes ---


def child(board: Board, index: int, code: str) -> subprocess.Popen[str]:
    start = f"""
import sys
from kserve_lite.counters import Board, State
from kserve_lite.metrics import *
board = Board(2, fd={board.fd})
sheet = board.sheets[{index}]
"""
    return subprocess.Popen(
        [sys.executable, "-c", start + code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=[board.fd],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


COUNTS = """
sheet.state = State.READY
PREDICT.on(sheet, "m").observe(2_000_000)
IN_FLIGHT.on(sheet, "m").set(2)
print("counted", flush=True)
sys.stdin.read()
"""


def test_each_process_is_shown_and_all_are_added_up(two: Board) -> None:
    children = [child(two, index, COUNTS) for index in range(2)]
    for process in children:
        assert process.stdout is not None
        assert process.stdout.readline() == "counted\n"
    for accept in (None, ASK_OPEN):
        found = shown(two, accept)
        assert found[at("request_predict_seconds_count", model_name="m")] == 2
        assert found[at("kserve_lite_requests_in_flight", model_name="m")] == 4
        assert found[at("kserve_lite_workers", state="ready")] == 2
        for worker in "01":
            assert found[at("process_resident_memory_bytes", worker=worker)] > 1e6
            assert found[at("process_cpu_seconds_total", worker=worker)] > 0
        names = {name for name, _ in found}
        assert "python_info" in names
        assert not any(name.startswith("python_gc") for name in names)
        assert at("process_open_fds") not in found
    children[1].kill()
    children[1].communicate(timeout=30)
    two.sheets[1].leave()
    found = shown(two)
    assert found[at("request_predict_seconds_count", model_name="m")] == 2
    assert found[at("kserve_lite_requests_in_flight", model_name="m")] == 2
    assert found[at("kserve_lite_workers", state="ready")] == 1
    assert at("process_open_fds", worker="0") in found
    assert at("process_open_fds", worker="1") not in found
    children[0].communicate("", timeout=30)


def test_an_applications_metrics_are_added_up_as_prometheus_client_does(
    two: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    count = """
from prometheus_client import Counter
Counter("mine", "Of the user").inc(21)
"""
    for index in range(2):
        process = child(two, index, count)
        process.communicate(timeout=30)
        assert process.returncode == 0
    for accept in (None, ASK_OPEN):
        assert shown(two, accept)[at("mine_total")] == 42
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR")
    assert at("mine_total") not in shown(two)


# --- Requests ---


def record_of(
    action: str, model: str = "m", code: int | str = 200, protocol: str = "v1"
) -> Record:
    record = Record("1.1", "POST", "/", {}, "", lambda: False)
    record.action, record.model = action, model
    record.protocol, record.code = protocol, code
    return record


def test_requests_are_counted_by_what_was_asked_and_the_status() -> None:
    board = Board()
    requests = RequestCounts(board.sheets[0], {"m", "n"}.__contains__)
    for _ in range(3):
        requests.count(record_of("v1_predict"))
    requests.count(record_of("v1_predict", "n", 503))
    requests.count(record_of("ModelInfer", "m", "UNAVAILABLE", "grpc"))
    # One action of two protocols.
    requests.count(record_of("model_names", "", 200, "v1"))
    requests.count(record_of("model_names", "", 200, "v2"))
    found = shown(board)
    name = "kserve_lite_requests_total"

    def count(model: str, protocol: str, method: str, code: str) -> float:
        labels = {"model_name": model, "protocol": protocol}
        return found[at(name, **labels, method=method, code=code)]

    assert count("m", "v1", "predict", "200") == 3
    assert count("n", "v1", "predict", "503") == 1
    assert count("m", "grpc", "ModelInfer", "UNAVAILABLE") == 1
    assert count("", "v1", "model_names", "200") == 1
    assert count("", "v2", "model_names", "200") == 1
    times = "kserve_lite_request_seconds_count"
    assert found[at(times, model_name="m", protocol="v1")] == 3
    assert found[at(times, model_name="m", protocol="grpc")] == 1
    assert at(times, model_name="", protocol="v1") not in found


def test_a_peer_cannot_make_labels() -> None:
    board = Board()
    known: set[str] = set()
    requests = RequestCounts(board.sheets[0], known.__contains__)
    for i in range(10_000):
        requests.count(record_of("v1_predict", f"guess-{i}", 404))
    assert board.totals() == {
        (REQUESTS.name, "", "v1", "predict", "404"): [10_000],
    }
    known.add("guess-1")  # a model of that name comes
    requests.count(record_of("v1_predict", "guess-1", 200))
    assert board.total((REQUESTS.name, "guess-1", "v1", "predict", "200")) == [1]


def test_what_is_remembered_is_bounded_and_the_rest_counts_too(
    caplog: pytest.LogCaptureFixture,
) -> None:
    board = Board()
    requests = RequestCounts(board.sheets[0], lambda _: True)
    kinds = MOST_REMEMBERED + 100
    for _ in range(2):
        for code in range(kinds):
            requests.count(record_of("v1_predict", code=code))
    assert len(requests._kinds) == MOST_REMEMBERED
    labels = (REQUESTS.name, "m", "v1", "predict")
    totals = board.totals()
    assert all(totals[*labels, str(code)] == [2] for code in range(kinds))
    width = REQUEST_TIMES.width
    times = board.total((REQUEST_TIMES.name, "m", "v1"), width)
    assert sum(times[:-1]) == 2 * kinds
    assert not caplog.records


def test_a_family_has_its_labels() -> None:
    sheet = Board().sheets[0]
    makers: list[Callable[..., object]] = [REQUESTS.on, IN_FLIGHT.on, PREDICT.on]
    for make in makers:
        with pytest.raises(ValueError, match="has the labels"):
            make(sheet, "m", "n")


# --- Over HTTP ---


@pytest.mark.parametrize(("accept", "expected"), [(None, PLAIN), (ASK_OPEN, OPEN)])
def test_a_server_answers(accept: str | None, expected: str) -> None:
    with ServerThread(Model("m", predict=echo)) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        headers = {} if accept is None else {"Accept": accept}
        for method in ("GET", "HEAD"):
            connection.request(method, "/metrics", headers=headers)
            answer = connection.getresponse()
            body = answer.read().decode()
            assert answer.status == 200
            assert answer.headers["content-type"] == expected
            if method == "HEAD":
                assert body == ""
                assert int(answer.headers["content-length"]) > 1000
                continue
            families = {family.name for family in parse(expected, body)}
            assert {family.stem for family in FAMILIES} <= families | {
                # The text parser names counters as they are written.
                family.name.removesuffix("_total")
                for family in FAMILIES
            }
            assert {"process_open_fds", "python_info"} <= families
        connection.request("POST", "/metrics")
        answer = connection.getresponse()
        answer.read()
        assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD")
        connection.close()


def test_prometheus_client_is_not_imported_before_it_is_needed() -> None:
    code = (
        "import sys, kserve_lite, kserve_lite.server.application;"
        "assert 'prometheus_client' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


IMPORTS = """
import sys, threading
from kserve_lite import Model
from kserve_lite.testing import Client

class Spy:
    found = []
    def find_spec(self, name, path=None, target=None):
        self.found.append((name.partition(".")[0], threading.get_ident()))

loops = set()
async def predict(payload):
    loops.add(threading.get_ident())
    return payload

sys.meta_path.insert(0, Spy())
with Client(Model("m", predict=predict)) as client:
    client.predict([1])
    assert all(name != "prometheus_client" for name, _ in Spy.found)
    client.request("GET", "/metrics")
    first = [thread for name, thread in Spy.found if name == "prometheus_client"]
    assert first and not loops & set(first), (loops, first)
    Spy.found.clear()
    threads = threading.active_count()
    for accept in ("", "application/openmetrics-text;version=1.0.0", "x/y"):
        client.request("GET", "/metrics", headers={"accept": accept})
    assert threads == threading.active_count()
    assert all(name != "prometheus_client" for name, _ in Spy.found), Spy.found
"""


def test_the_first_scrape_holds_up_no_event_loop_with_imports() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", IMPORTS], check=True, env=environment)
