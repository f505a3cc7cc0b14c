"""Fetching: what is brought where, resumed, checked, refused, and by one at a time."""

from __future__ import annotations

import base64
import errno
import fcntl
import hashlib
import json
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
import pytest

from kserve_lite import StartupError
from kserve_lite.server.storage import retrying, staging
from kserve_lite.server.storage.fetching import fetch_files
from kserve_lite.server.storage.staging import RECORD, Stopped
from kserve_lite.server.storage.uris import source_of
from tests.certificates import Authority
from tests.server.fleet import until
from tests.server.process import environment
from tests.server.webstore import WebStore

# No piece is like another.
BLOB = random.Random(7).randbytes(1_000_000)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little waiting before another try."""
    monkeypatch.setattr(retrying, "BACK_OFF", 0.001)
    monkeypatch.setattr(retrying, "MOST_BACK_OFF", 0.001)


@pytest.fixture
def web() -> Iterator[WebStore]:
    with WebStore({"/m/model.bin": BLOB}) as store:
        yield store


@pytest.fixture
def memory() -> Iterator[Any]:
    """The file system behind memory://, empty."""
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]


def put(filesystem: Any, **files: str) -> None:
    for name, text in files.items():
        filesystem.pipe(f"/model/{name.replace('__', '/')}.txt", text.encode())


def fetch(uri: str, folder: Path, **options: Any) -> None:
    fetch_files(source_of(uri), folder, **options)


def tree(folder: Path) -> dict[str, bytes]:
    """The files of a folder that people see."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != RECORD
    }


def names(folder: Path) -> set[str]:
    """What is in a folder, but for locks."""
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


def refusal(uri: str, folder: Path, **options: Any) -> str:
    with pytest.raises(StartupError) as caught:
        fetch(uri, folder, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert not folder.exists() or not tree(folder)
    return text


# --- what is brought where ------------------------------------------------------------


def test_files_lie_relative_to_the_uri(memory: Any, tmp_path: Path) -> None:
    put(memory, a="A", deep__er__b="B")
    memory.pipe("/model2/c.txt", b"another model's")
    fetch("memory://model", tmp_path / "m")
    assert tree(tmp_path / "m") == {"a.txt": b"A", "deep/er/b.txt": b"B"}
    assert names(tmp_path) == {"m"}


def test_a_single_object_has_its_own_name(memory: Any, tmp_path: Path) -> None:
    put(memory, a="A", b="B")
    fetch("memory://model/a.txt", tmp_path / "m")
    assert tree(tmp_path / "m") == {"a.txt": b"A"}


def test_patterns_choose(memory: Any, tmp_path: Path) -> None:
    put(memory, a="A", b="B", deep__c="C", deep__b="D")
    uri = "memory://model"
    fetch(uri, tmp_path / "m", allow=["deep/*", "a.*"], ignore=["*b.txt"])
    assert tree(tmp_path / "m") == {"a.txt": b"A", "deep/c.txt": b"C"}
    # Other patterns at the next start: what is to go goes, what is to come comes.
    fetch(uri, tmp_path / "m", ignore=["deep/*"])
    assert tree(tmp_path / "m") == {"a.txt": b"A", "b.txt": b"B"}
    assert not (tmp_path / "m" / "deep").exists()
    assert "leave none of its 4 files" in refusal(uri, tmp_path / "n", allow=["x"])


def test_what_has_not_changed_stays(
    memory: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(memory, a="A", b="B", c="C")
    fetch("memory://model", tmp_path / "m")
    before = {path: path.stat().st_ino for path in (tmp_path / "m").iterdir()}
    caplog.set_level(logging.INFO, "kserve_lite")
    fetch("memory://model", tmp_path / "m")
    assert not caplog.records
    assert {p: p.stat().st_ino for p in (tmp_path / "m").iterdir()} == before
    put(memory, a="other", d="D")
    memory.rm("/model/c.txt")
    fetch("memory://model", tmp_path / "m")
    texts = {"a.txt": b"other", "b.txt": b"B", "d.txt": b"D"}
    assert tree(tmp_path / "m") == texts
    kept = tmp_path / "m" / "b.txt"
    assert kept.stat().st_ino == before[kept]
    kept.unlink()
    fetch("memory://model", tmp_path / "m")
    assert tree(tmp_path / "m") == texts


def test_a_folder_that_exists_is_filled_where_it_is(
    memory: Any, tmp_path: Path
) -> None:
    put(memory, a="A", deep__b="B")
    folder = tmp_path / "volume"
    (folder / "lost+found").mkdir(parents=True)  # as a fresh one has it
    inode = folder.stat().st_ino
    fetch("memory://model", folder)
    assert tree(folder) == {"a.txt": b"A", "deep/b.txt": b"B"}
    assert folder.stat().st_ino == inode
    assert names(folder) == {"a.txt", "deep", "lost+found", RECORD}


def test_a_folder_that_others_have_filled_is_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "weights").write_text("mine")
    caplog.set_level(logging.INFO, "kserve_lite")
    fetch("s3://bucket/not/asked", tmp_path)
    assert tree(tmp_path) == {"weights": b"mine"}
    (record,) = caplog.records
    assert "is filled: s3://bucket/not/asked is not fetched" in record.getMessage()


def test_another_uris_folder_is_refused(memory: Any, tmp_path: Path) -> None:
    put(memory, a="A")
    fetch("memory://model", tmp_path / "m")
    with pytest.raises(StartupError, match="fetched from another storage_uri"):
        fetch("memory://model/a.txt", tmp_path / "m")
    assert tree(tmp_path / "m") == {"a.txt": b"A"}


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    text = refusal("memory://model", tmp_path / "file" / "m")
    assert "--model_dir" in text


def test_a_full_disk_is_told_before(
    web: WebStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    text = refusal(web.url("/m/model.bin"), tmp_path / "m")
    assert "976.6 KiB are to come and 1000 bytes are free" in text
    assert len(web.asked) == 1


@pytest.mark.parametrize(
    "name",
    ["/model/../../etc/x", "/model/a//b", "/model/a\\b", "/model/a\nb", "/model/./b"],
)
def test_names_that_lead_elsewhere_are_refused(
    name: str, memory: Any, tmp_path: Path
) -> None:
    put(memory, a="A")
    # As a store has it: fsspec's own functions would tidy it up.
    memory.store[name] = memory.store["/model/a.txt"]
    text = refusal("memory://model", tmp_path / "m")
    assert "holds the name" in text
    assert not names(tmp_path)


def test_a_file_that_is_a_folder_too_is_refused(memory: Any, tmp_path: Path) -> None:
    put(memory, a="A")
    memory.store["/model/a.txt/b"] = memory.store["/model/a.txt"]
    assert "is a file and a folder" in refusal("memory://model", tmp_path / "m")


def test_what_is_not_there_is_told(memory: Any, tmp_path: Path) -> None:
    assert "nothing is found there" in refusal("memory://none", tmp_path / "m")
    assert "foo:// is unknown" in refusal("foo://x", tmp_path / "m")


def test_packages_that_are_not_installed_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # fsspec remembers what it has imported.
    known = sys.modules["fsspec.registry"]._registry
    monkeypatch.delitem(known, "s3", raising=False)
    for module in ("s3fs", "fsspec"):
        monkeypatch.setitem(sys.modules, module, None)
        text = refusal("s3://bucket/model", tmp_path / "m")
        assert text.endswith("not installed: pip install 'kserve-lite[storage]'")


# --- from the web ---------------------------------------------------------------------


def test_a_broken_transfer_goes_on_where_it_was(web: WebStore, tmp_path: Path) -> None:
    web.most = 300_000
    fetch(web.url("/m/model.bin?token=secret"), tmp_path / "m")
    assert tree(tmp_path / "m") == {"model.bin": BLOB}
    offsets = [f"bytes={n}00000-" for n in (3, 6, 9)]
    assert [asked for _, asked in web.asked] == ["", "", *offsets]


def test_without_ranges_it_starts_again_and_is_given_up(
    web: WebStore, tmp_path: Path
) -> None:
    web.ranges, web.most = False, 300_000
    text = refusal(web.url("/m/model.bin"), tmp_path / "m")
    assert "cannot be reached, or fails (IncompleteRead)" in text
    # The first one has come further than what was there.
    assert len(web.asked) == 1 + 1 + retrying.MOST_TRIES - 1
    web.most = None
    fetch(web.url("/m/model.bin"), tmp_path / "m")
    assert tree(tmp_path / "m") == {"model.bin": BLOB}


def test_what_goes_on_is_not_late(
    web: WebStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large model, say, at each of whose breaks many minutes have passed."""
    monkeypatch.setattr(retrying, "LONGEST", 0.0)
    monkeypatch.setattr(retrying, "ENOUGH", 300_000)
    web.most = 300_000
    fetch(web.url("/m/model.bin"), tmp_path / "m")
    assert tree(tmp_path / "m") == {"model.bin": BLOB}
    web.most = 200_000
    assert "fails" in refusal(web.url("/m/model.bin?"), tmp_path / "n")


def test_a_range_behind_the_end_starts_again(
    web: WebStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    web.length = False
    monkeypatch.setattr(retrying, "MOST_TRIES", 1)
    web.headers = {"Content-MD5": base64.b64encode(bytes(16)).decode()}
    url = web.url("/m/model.bin")
    part = tmp_path / "m.partial" / "part" / "model.bin"
    assert "another checksum" in refusal(url, tmp_path / "m")
    # As a kill leaves it between the last byte and the check.
    part.write_bytes(BLOB)
    web.headers = {}
    web.asked.clear()
    fetch(url, tmp_path / "m")
    assert [asked for _, asked in web.asked] == ["", "bytes=1000000-", ""]
    assert tree(tmp_path / "m") == {"model.bin": BLOB}


def test_what_is_left_of_another_version_is_not_used(
    web: WebStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    web.most = 300_000
    monkeypatch.setattr(retrying, "MOST_TRIES", 1)
    assert "fails" in refusal(web.url("/m/model.bin"), tmp_path / "m")
    other = BLOB[::-1]
    web.files["/m/model.bin"], web.most = other, None
    web.asked.clear()
    fetch(web.url("/m/model.bin"), tmp_path / "m")
    assert tree(tmp_path / "m") == {"model.bin": other}
    assert [asked for _, asked in web.asked] == ["", ""]


def test_a_change_meanwhile_is_told(web: WebStore, tmp_path: Path) -> None:
    def change() -> None:
        if len(web.asked) == 2:
            web.files["/m/model.bin"] = BLOB[::-1]

    web.most, web.sending = 300_000, change
    text = refusal(web.url("/m/model.bin"), tmp_path / "m")
    assert "it was written while it was fetched" in text


@pytest.mark.parametrize(
    ("header", "algorithm", "form"),
    [
        ("Content-MD5", "md5", "{}"),
        ("Digest", "sha256", "SHA-256={}"),
        ("Repr-Digest", "sha256", "sha-512=:AAAA:, sha-256=:{}:"),
        ("x-goog-hash", "md5", "crc32c=AAAAAA==,md5={}"),
    ],
)
def test_checksums_of_the_web_count(
    header: str, algorithm: str, form: str, web: WebStore, tmp_path: Path
) -> None:
    right = base64.b64encode(hashlib.new(algorithm, BLOB).digest()).decode()
    wrong = base64.b64encode(hashlib.new(algorithm, b"x").digest()).decode()
    web.headers = {header: form.format(wrong)}
    text = refusal(web.url("/m/model.bin"), tmp_path / "m")
    assert "another checksum" in text
    assert len(web.asked) == 1 + retrying.MOST_TRIES
    web.headers = {header: form.format(right)}
    fetch(web.url("/m/model.bin"), tmp_path / "m")
    assert tree(tmp_path / "m") == {"model.bin": BLOB}


def test_faults_that_pass_are_sat_out(web: WebStore, tmp_path: Path) -> None:
    web.statuses = [503, 429, 500]
    fetch(web.url("/m/model.bin"), tmp_path / "m")
    assert tree(tmp_path / "m") == {"model.bin": BLOB}


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "its credentials are refused"),
        (403, "access is denied"),
        (404, "nothing is found there"),
        (400, "does not take this name"),
    ],
)
def test_others_are_told_at_once_and_without_secrets(
    status: int, words: str, web: WebStore, tmp_path: Path
) -> None:
    web.statuses = [status]
    url = web.url("/m/model.bin?sig=secret").replace("//", "//me:secret@")
    text = refusal(url, tmp_path / "m")
    assert words in text
    assert "secret" not in text
    assert text.startswith(f"storage_uri {web.url('/m/model.bin')}: ")
    assert len(web.asked) == 1


def test_a_complete_copy_serves_while_the_store_is_away(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with WebStore({"/m.bin": b"M"}) as web:
        url = web.url("/m.bin")
        fetch(url, tmp_path / "m")
    fetch(url, tmp_path / "m")
    assert tree(tmp_path / "m") == {"m.bin": b"M"}
    assert "serving what is in" in caplog.records[-1].getMessage()
    assert "cannot be reached" in refusal(url, tmp_path / "n")


def test_urls_as_people_write_them(web: WebStore, tmp_path: Path) -> None:
    web.files["/my%20m%C3%B6del.bin"] = b"M"
    for number, name in enumerate(("my mödel.bin", "my%20m%C3%B6del.bin")):
        folder = tmp_path / str(number)
        fetch(web.url(f"/{name}?sig=a b%20c"), folder)
        assert tree(folder) == {"my mödel.bin": b"M"}


def test_the_body_of_a_redirect_is_not_read(tmp_path: Path) -> None:
    begun = b"HTTP/1.1 302 F\r\nLocation: /b\r\nContent-Length: 9\r\n\r\n"
    whole = b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nM"
    gone = []

    def answer(listening: socket.socket) -> None:
        for _ in range(2):
            moved, _ = listening.accept()
            moved.recv(1 << 16)
            moved.sendall(begun)
            with listening.accept()[0] as there:  # though that body is still to come
                there.recv(1 << 16)
                there.sendall(whole)
            moved.close()
            gone.append(moved)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(10)
        thread = threading.Thread(target=answer, args=(listening,))
        thread.start()
        port = listening.getsockname()[1]
        fetch(f"http://127.0.0.1:{port}/m.bin", tmp_path / "m")
        thread.join()
    assert len(gone) == 2
    assert tree(tmp_path / "m") == {"m.bin": b"M"}


def test_credentials_stay_with_their_host(
    web: WebStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("127.0.0.1-headers", '{"X-Key": "k"}')
    with WebStore({}) as first:
        first.moved = {"/x.bin": first.url("/y.bin"), "/y.bin": web.url("/m/model.bin")}
        url = first.url("/x.bin").replace("//", "//me:pass@")
        fetch(url, tmp_path / "m")
        assert tree(tmp_path / "m") == {"x.bin": BLOB}
        for seen in first.seen:
            assert seen["authorization"] == "Basic bWU6cGFzcw=="
            assert seen["x-key"] == "k"
        for seen in web.seen:
            assert not {"authorization", "x-key"} & seen.keys()


def test_https_is_verified_and_never_left(
    web: WebStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = Authority(tmp_path / "ca")
    files = {"/model.bin": BLOB}
    secure = WebStore(files).secure(str(authority.cert), str(authority.key))
    with secure:
        secure.most = 600_000
        url = secure.url("/model.bin")
        assert "certificate is not trusted" in refusal(url, tmp_path / "m")
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(authority.ca))
        fetch(url, tmp_path / "m")
        assert tree(tmp_path / "m") == {"model.bin": BLOB}
        secure.moved = {"/other.bin": web.url("/m/model.bin")}
        text = refusal(secure.url("/other.bin"), tmp_path / "n")
        assert "leads from https to http" in text
        assert not web.asked


# --- kills, and others at the same time -----------------------------------------------

FETCH = """
import sys
from pathlib import Path
from kserve_lite.server.storage.fetching import fetch_files
from kserve_lite.server.storage.uris import source_of
fetch_files(source_of(sys.argv[1]), Path(sys.argv[2]))
"""


def process(uri: str, folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", FETCH, uri, str(folder)]
    return subprocess.Popen(command, env=environment())


@pytest.mark.parametrize("exists", [False, True], ids=["fresh", "volume"])
def test_a_kill_leaves_nothing_that_looks_complete(
    exists: bool, web: WebStore, tmp_path: Path
) -> None:
    folder = tmp_path / "m"
    if exists:
        folder.mkdir()
    half, killed = threading.Event(), threading.Event()

    def wait() -> None:
        # When so many pieces were sent, of the second answer: the first one is only
        # looked at.
        if len(web.asked) == 2:
            pieces.append(1)
            if len(pieces) == 8:
                half.set()
                killed.wait(30)

    pieces: list[int] = []
    web.sending = wait
    url = web.url("/m/model.bin")
    where = folder / staging.PARTIAL if exists else tmp_path / "m.partial"
    part = where / "part" / "model.bin"
    with process(url, folder) as running:
        try:
            assert half.wait(30)
            # Seven were sent; they may lie in a buffer, but for the last ones.
            until(lambda: part.exists() and part.stat().st_size)
        finally:
            running.send_signal(signal.SIGKILL)
    assert not (folder.exists() and names(folder) - {staging.PARTIAL})
    came = part.stat().st_size
    assert came < len(BLOB)
    killed.set()
    web.asked.clear()
    web.sending = lambda: None
    fetch(url, folder)
    assert tree(folder) == {"model.bin": BLOB}
    assert [wanted for _, wanted in web.asked] == ["", f"bytes={came}-"]
    assert names(tmp_path) == {"m"}


@pytest.mark.parametrize("step", [1, 2, 4], ids=["first", "second", "record"])
def test_a_kill_while_files_move_is_made_good(
    step: int, memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "m"
    put(memory, a="A", b="B", c="C")
    fetch("memory://model", folder)
    put(memory, a="other", b="others", d="D")
    memory.rm("/model/c.txt")

    class Killed(BaseException):
        pass

    count, real = 0, Path.replace

    def replace(self: Path, target: Path) -> Path:
        nonlocal count
        count += target.parent == folder
        if count == step:  # of three files, and the record
            raise Killed
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        with pytest.raises(Killed):
            fetch("memory://model", folder)
    assert not (folder / RECORD).exists()
    fetch("memory://model", folder)
    assert tree(folder) == {"a.txt": b"other", "b.txt": b"others", "d.txt": b"D"}
    assert names(folder) == {"a.txt", "b.txt", "d.txt", RECORD}


def test_two_processes_fetch_once(web: WebStore, tmp_path: Path) -> None:
    both_run = threading.Event()
    web.sending = lambda: both_run.wait(30)
    url = web.url("/m/model.bin")
    with process(url, tmp_path / "m") as one, process(url, tmp_path / "m") as two:
        until(lambda: web.asked)
        both_run.set()
        assert (one.wait(30), two.wait(30)) == (0, 0)
    assert tree(tmp_path / "m") == {"model.bin": BLOB}
    # Each looks; one fetches.
    assert len(web.asked) == 3


def test_a_volume_that_is_mounted_twice_is_filled_once(
    web: WebStore, tmp_path: Path
) -> None:
    """By two machines, say: what lies beside the folder they do not share."""
    volume = tmp_path / "volume"
    volume.mkdir()
    mounts = [tmp_path / name / "m" for name in ("one", "two")]
    stopping = threading.Event()
    stopping.set()
    for mount in mounts:
        mount.parent.mkdir()
        mount.symlink_to(volume)
    with staging.locked(mounts[0], threading.Event()), pytest.raises(Stopped):
        fetch(web.url("/m/model.bin"), mounts[1], stopping=stopping)
    assert not web.asked  # it has waited
    fetch(web.url("/m/model.bin"), mounts[1])
    assert tree(volume) == {"model.bin": BLOB}


def test_locks_that_a_file_system_lacks(
    web: WebStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(fd: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuses)
    text = refusal(web.url("/m/model.bin"), tmp_path / "m")
    assert os.strerror(errno.ENOLCK) in text


def test_who_waits_can_be_stopped(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    stopping = threading.Event()
    with staging.locked(folder, threading.Event()):
        stopping.set()
        with pytest.raises(Stopped):
            fetch("memory://model", folder, stopping=stopping)


def test_a_fetch_stops_between_two_pieces(web: WebStore, tmp_path: Path) -> None:
    stopping = threading.Event()
    web.sending = lambda: stopping.set() if len(web.asked) == 2 else None
    with pytest.raises(Stopped):
        fetch(web.url("/m/model.bin"), tmp_path / "m", stopping=stopping)
    assert not (tmp_path / "m").exists()


# --- progress -------------------------------------------------------------------------


def test_log_lines_tell_how_far_it_is(
    web: WebStore,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kserve_lite.server.storage.progress.SHORTEST", 0)
    caplog.set_level(logging.INFO, "kserve_lite")
    fetch(web.url("/m/model.bin?secret"), tmp_path / "m")
    first, *lines, last = [record.getMessage() for record in caplog.records]
    assert first.endswith("/m/model.bin: files: 1, 976.6 KiB")
    assert last.partition("/m/model.bin: ")[2].startswith("files: 1, 976.6 KiB, in ")
    assert len(lines) in range(2, 11)
    assert " % of " not in "".join(lines)
    assert "100 %, 976.6 KiB of 976.6 KiB" in lines[-1]
    assert "secret" not in caplog.text


def test_a_terminal_gets_a_bar(web: WebStore, tmp_path: Path) -> None:
    ours, theirs = os.openpty()
    script = FETCH.replace("Path(sys.argv[2])", "Path(sys.argv[2]), bar=True")
    command = [sys.executable, "-c", script, web.url("/m/model.bin"), "m"]
    subprocess.run(
        command, cwd=tmp_path, env=environment(), stderr=theirs, check=True, timeout=30
    )
    os.close(theirs)
    came = b""
    with suppress(OSError):  # so a terminal ends
        while more := os.read(ours, 100_000):
            came += more
    os.close(ours)
    written = came.decode()
    assert written.startswith("\rfetching the model [")
    assert f"[{'#' * 30}] 100 %, 976.6 KiB of 976.6 KiB" in written
    assert written.endswith("\r\n")


def test_records_hold_no_secrets(web: WebStore, tmp_path: Path) -> None:
    fetch(web.url("/m/model.bin?sig=secret"), tmp_path / "m")
    text = (tmp_path / "m" / RECORD).read_text()
    assert "secret" not in text
    assert json.loads(text)["files"] == {"model.bin": len(BLOB)}
