"""S3, as moto serves it on loopback; and servers that fetch before models load."""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import boto3  # type: ignore[import-untyped]
import httpx
import pytest
from moto.server import ThreadedMotoServer

from kserve_lite import Model, StartupError, serve
from kserve_lite.counters import State
from kserve_lite.server.asgi import asgi
from kserve_lite.server.storage import fsspec_store, retrying
from kserve_lite.server.storage.fsspec_store import FsspecStore
from kserve_lite.server.storage.progress import Progress
from kserve_lite.server.storage.remotes import Remote
from kserve_lite.server.storage.staging import Stopped
from kserve_lite.server.storage.uris import source_of
from kserve_lite.testing import AsyncClient
from tests.server.fleet import Fleet
from tests.server.process import finish
from tests.server.test_storage_fetching import fetch, names, refusal, tree
from tests.server.webstore import WebStore

BLOB = random.Random(11).randbytes(6_000_000)

READS = """
from kserve_lite import Model, run

model = Model("m")

@model.load
def load():
    return model.path("words.txt").read_text()

@model.predict
def predict(payload, state):
    return {"predictions": [state, str(model.path())]}

if __name__ == "__main__":
    run(model)
"""


@pytest.fixture(scope="module")
def bucket() -> Iterator[Any]:
    """A client of an S3 with a bucket, "box"; the environment leads to it."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            patch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="box")
        for key, content in {
            "model/": b"",
            "model/words.txt": b"found",
            "model/deep/er/blob": BLOB,
            "model/empty": b"",
            "model2/words.txt": b"another model's",
        }.items():
            client.put_object(Bucket="box", Key=key, Body=content)
        yield client
        client.close()
    server.stop()


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrying, "BACK_OFF", 0.001)


def test_a_prefix_is_a_folder(bucket: Any, tmp_path: Path) -> None:
    fetch("s3://box/model", tmp_path / "m")
    files = {"words.txt": b"found", "deep/er/blob": BLOB, "empty": b""}
    assert tree(tmp_path / "m") == files
    assert "nothing is found" in refusal("s3://box/mod", tmp_path / "n")
    fetch("s3://box/model/words.txt", tmp_path / "one")
    assert tree(tmp_path / "one") == {"words.txt": b"found"}


def test_an_object_goes_on_where_it_was(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fsspec_store, "CHUNK", 1_000_000)
    stopping = threading.Event()
    offsets = []
    real_add, real_read = Progress.add, FsspecStore.read

    def add(self: Progress, count: int) -> None:
        real_add(self, count)
        if count > 900_000:
            stopping.set()

    def read(self: FsspecStore, remote: Remote, offset: int) -> Any:
        offsets.append((remote.name, offset))
        return real_read(self, remote, offset)

    monkeypatch.setattr(Progress, "add", add)
    monkeypatch.setattr(FsspecStore, "read", read)
    with pytest.raises(Stopped):
        fetch("s3://box/model/deep", tmp_path / "m", stopping=stopping)
    assert names(tmp_path) == {"m.partial"}
    fetch("s3://box/model/deep", tmp_path / "m")
    assert tree(tmp_path / "m") == {"er/blob": BLOB}
    assert offsets == [("er/blob", 0), ("er/blob", 1_000_000)]


def test_what_was_sent_in_parts_has_no_md5(bucket: Any, tmp_path: Path) -> None:
    where = {"Bucket": "box", "Key": "parts/blob"}
    upload = bucket.create_multipart_upload(**where)["UploadId"]
    parts = []
    for number, part in enumerate((BLOB[:5_500_000], BLOB[5_500_000:]), 1):
        sent = bucket.upload_part(
            **where, UploadId=upload, PartNumber=number, Body=part
        )
        parts.append({"PartNumber": number, "ETag": sent["ETag"]})
    bucket.complete_multipart_upload(
        **where, UploadId=upload, MultipartUpload={"Parts": parts}
    )
    (remote,) = FsspecStore(source_of("s3://box/parts")).files()
    assert (remote.size, remote.checksum) == (len(BLOB), "")
    fetch("s3://box/parts", tmp_path / "m")
    assert tree(tmp_path / "m") == {"blob": BLOB}


def test_a_wrong_md5_is_found_unless_it_is_none(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put_object(Bucket="box", Key="sum/plain", Body=b"p")
    store = FsspecStore(source_of("s3://box/sum"))
    (remote,) = store.files()
    assert remote.algorithm == "md5"
    assert remote.checksum == hashlib.md5(b"p").hexdigest()
    assert store.vouches(remote)
    real = FsspecStore.files

    def files(self: FsspecStore) -> list[Remote]:
        return [
            Remote(r.name, r.path, r.size, r.tag, "md5", "0" * 32) for r in real(self)
        ]

    monkeypatch.setattr(FsspecStore, "files", files)
    assert "another checksum" in refusal("s3://box/sum", tmp_path / "m")
    # With a key of KMS an ETag looks like one, and is none.
    key = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": "k"}
    bucket.put_object(Bucket="box", Key="sum/plain", Body=b"p", **key)
    fetch("s3://box/sum", tmp_path / "m")
    assert tree(tmp_path / "m") == {"plain": b"p"}


def test_errors_of_s3_are_told(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = refusal("s3://no-such-bucket/model", tmp_path / "m")
    assert "there is no bucket or container 'no-such-bucket'" in text
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "there are no credentials" in refusal("s3://box/model", tmp_path / "m")
    monkeypatch.setenv("awsAnonymousCredential", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert "cannot be reached" in refusal("s3://box/model", tmp_path / "m")


# --- servers --------------------------------------------------------------------------


def test_a_server_with_workers_fetches_once(bucket: Any, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(READS)
    cache = tmp_path / "cache"
    with Fleet(
        tmp_path,
        *("--storage_ignore_patterns", "deep/*"),
        workers=2,
        STORAGE_URI="s3://box/model",
        XDG_CACHE_HOME=str(cache),
    ) as app:
        (words, folder) = app.ask("/v1/models/m:predict", {"instances": []})[1][
            "predictions"
        ]
        assert words == "found"
        assert Path(folder).parent == cache / "kserve-lite"
        assert set(tree(Path(folder))) == {"words.txt", "empty"}
        ended = app.stop()
    lines = "\n".join([*app.lines, ended.err])
    assert lines.count("fetched s3://box/model: ") == 1
    assert ended.status == 0


def test_a_server_that_cannot_fetch_ends_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(READS)
    with WebStore({}) as web:
        uri = web.url("/words.txt?secret")
        ended = finish(
            *("app.py", "--workers", "2", "--http_port", "0"),
            *("--host", "127.0.0.1", "--storage_uri", uri, "--model_dir", "here"),
            cwd=tmp_path,
        )
        assert ended.status == 1
        shown = web.url("/words.txt")
        want = f"kserve-lite: storage_uri {shown}: nothing is found there"
        (line,) = ended.errors
        assert line.startswith(want)
        assert "secret" not in ended.err
        assert len(web.asked) == 1


def reader() -> Model:
    model = Model("m")

    @model.load
    def load() -> str:
        return model.path("words.txt").read_text()

    @model.predict
    def predict(payload: dict[str, Any], state: str) -> dict[str, Any]:
        return {"predictions": [state]}

    return model


async def eventually(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - it comes about in another thread
        await anyio.sleep(0.01)


@pytest.mark.anyio
async def test_liveness_answers_while_it_fetches(tmp_path: Path) -> None:
    go_on = threading.Event()
    with WebStore({"/words.txt": b"found"}) as web:
        web.sending = lambda: go_on.wait(30)
        options = {"http_port": 0, "host": "127.0.0.1", "enable_grpc": False}
        server = serve(
            reader(),
            storage_uri=web.url("/words.txt"),
            model_dir=tmp_path / "m",
            **options,
        )
        try:
            with anyio.fail_after(30):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(server._serve)
                    await eventually(lambda: bool(web.asked))
                    async with httpx.AsyncClient(base_url=server.url) as client:
                        live = await client.get("/v2/health/live")
                        assert live.status_code == 200
                        ready = await client.get("/v2/health/ready")
                        assert ready.status_code == 503
                        go_on.set()
                        await eventually(
                            lambda: server.application.sheet.state is State.READY
                        )
                        answer = await client.post(
                            "/v1/models/m:predict", json={"instances": []}
                        )
                        assert answer.json() == {"predictions": ["found"]}
                    server.stop()
        finally:
            go_on.set()


@pytest.mark.anyio
async def test_a_stop_ends_a_fetch(tmp_path: Path) -> None:
    go_on = threading.Event()
    with WebStore({"/words.txt": b"found"}) as web:
        web.sending = lambda: go_on.wait(30)
        uri = web.url("/words.txt")
        server = serve(
            reader(),
            http_port=0,
            host="127.0.0.1",
            storage_uri=uri,
            model_dir=tmp_path / "m",
        )
        try:
            with anyio.fail_after(30):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(server._serve)
                    await eventually(lambda: bool(web.asked))
                    server.stop()
        finally:
            go_on.set()
    assert not (tmp_path / "m").exists()


@pytest.mark.anyio
async def test_every_other_way_in_fetches_too(tmp_path: Path) -> None:
    with WebStore({"/words.txt": b"found"}) as web:
        options = {"storage_uri": web.url("/words.txt")}
        async with AsyncClient(reader(), model_dir=tmp_path / "a", **options) as client:
            assert await client.predict({"instances": []}) == {"predictions": ["found"]}
        application = asgi(reader(), model_dir=tmp_path / "b", **options)
        async with application:
            assert tree(tmp_path / "b") == {"words.txt": b"found"}
        options["storage_uri"] = web.url("/none")
        with pytest.raises(StartupError, match="nothing is found there"):
            async with asgi(reader(), model_dir=tmp_path / "c", **options):
                pass
