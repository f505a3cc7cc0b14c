"""Archives: unpacked where they are one file, and refused where they mean harm."""

from __future__ import annotations

import io
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kserve_lite import StartupError
from kserve_lite.server.storage import archives
from kserve_lite.server.storage.staging import RECORD
from tests.server.test_storage_fetching import fetch, names, tree
from tests.server.webstore import WebStore

FILES = {"config.json": b"{}", "deep/er/weights.bin": bytes(range(256)) * 100}


@pytest.fixture
def web() -> Iterator[WebStore]:
    with WebStore({}) as store:
        yield store


def packed(name: str, *members: Any) -> bytes:
    """An archive: of (name, content) pairs, TarInfos and ZipInfos."""
    made = io.BytesIO()
    if name.endswith(".zip"):
        with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as opened:
            for member, content in members:
                opened.writestr(member, content)
        return made.getvalue()
    mode: Any = {"tgz": "w:gz", "gz": "w:gz", "bz2": "w:bz2", "xz": "w:xz"}.get(
        name.rpartition(".")[2], "w"
    )
    with tarfile.open(fileobj=made, mode=mode) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))
    return made.getvalue()


def tar_member(name: str, **fields: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def zip_member(name: str, mode: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return info


def refusal(web: WebStore, content: bytes, name: str, tmp_path: Path) -> str:
    web.files[f"/{name}"] = content
    with pytest.raises(StartupError) as caught:
        fetch(web.url(f"/{name}"), tmp_path / "m")
    # Not the folder, nor what lies beside it: it is a tree without what it refuses.
    assert names(tmp_path) == {"m.partial"}
    whole = tmp_path / "m.partial" / "whole"
    assert tree(whole) == {name: content}
    return str(caught.value)


@pytest.mark.parametrize(
    "name", ["m.zip", "m.tar", "m.tar.gz", "m.tgz", "m.tar.bz2", "m.tar.xz", "M.ZIP"]
)
def test_archives_are_unpacked(name: str, web: WebStore, tmp_path: Path) -> None:
    web.files[f"/{name}"] = packed(name.lower(), *FILES.items())
    for _ in range(2):
        fetch(web.url(f"/{name}"), tmp_path / "m")
        assert tree(tmp_path / "m") == FILES
    assert names(tmp_path) == {"m"}
    assert len(web.asked) == 3  # looked at, fetched, looked at


def test_a_new_archive_takes_the_place_of_the_old(
    web: WebStore, tmp_path: Path
) -> None:
    web.files["/m.zip"] = packed("m.zip", ("a", b"A"), ("same", b"S"))
    fetch(web.url("/m.zip"), tmp_path / "m")
    web.files["/m.zip"] = packed("m.zip", ("b", b"B"), ("same", b"S"))
    fetch(web.url("/m.zip"), tmp_path / "m")
    assert tree(tmp_path / "m") == {"b": b"B", "same": b"S"}


def test_modes_are_plain(web: WebStore, tmp_path: Path) -> None:
    program = tar_member("./bin/tool", mode=0o6777)
    folders = [
        tar_member("./", type=tarfile.DIRTYPE, mode=0),
        tar_member("./empty", type=tarfile.DIRTYPE, mode=0),
    ]
    web.files["/m.tar"] = packed("m.tar", *folders, program, ("./data", b"d"))
    fetch(web.url("/m.tar"), tmp_path / "m")
    assert (tmp_path / "m" / "empty").is_dir()
    assert (tmp_path / "m" / "empty").stat().st_mode & 0o700 == 0o700
    assert stat.S_IMODE((tmp_path / "m" / "bin" / "tool").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "m" / "data").stat().st_mode) == 0o644


def test_an_archive_among_other_files_stays_one(tmp_path: Path) -> None:
    content = packed("m.zip", ("a", b"A"))
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "m.zip").write_bytes(content)
    (tmp_path / "store" / "readme").write_bytes(b"R")
    uri = f"local://{tmp_path}/store"
    fetch(uri, tmp_path / "m")
    assert tree(tmp_path / "m") == {"m.zip": content, "readme": b"R"}
    fetch(f"{uri}/m.zip", tmp_path / "n")
    assert tree(tmp_path / "n") == {"a": b"A"}


@pytest.mark.parametrize(
    "name", ["../out", "/etc/out", "a/../../out", "a\\..\\out", "a//b", ".."]
)
@pytest.mark.parametrize("kind", ["m.zip", "m.tar.gz"])
def test_names_that_lead_out_are_refused(
    kind: str, name: str, web: WebStore, tmp_path: Path
) -> None:
    content = packed(kind, ("fine", b"F"), (name, b"x"))
    text = refusal(web, content, kind, tmp_path)
    assert "holds the name" in text


def test_names_of_our_own_are_refused(web: WebStore, tmp_path: Path) -> None:
    content = packed("m.zip", (RECORD, b"{}"))
    assert "are for this server" in refusal(web, content, "m.zip", tmp_path)


@pytest.mark.parametrize(
    "kind",
    [
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.CHRTYPE,
        tarfile.BLKTYPE,
        tarfile.FIFOTYPE,
    ],
)
def test_links_and_devices_are_refused(
    kind: bytes, web: WebStore, tmp_path: Path
) -> None:
    link = tar_member("link", type=kind, linkname="../../out")
    content = packed("m.tar", ("fine", b"F"), link, ("link/x", b"x"))
    assert "links, devices" in refusal(web, content, "m.tar", tmp_path)


def test_links_in_a_zip_are_refused(web: WebStore, tmp_path: Path) -> None:
    link = zip_member("link", stat.S_IFLNK | 0o777)
    content = packed("m.zip", (link, b"../out"), ("link/x", b"x"))
    assert "links or devices" in refusal(web, content, "m.zip", tmp_path)


@pytest.mark.parametrize("kind", ["m.zip", "m.tgz"])
def test_bombs_are_refused(
    kind: str, web: WebStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "LEAST_TOTAL", 1_000_000)
    content = packed(kind, *((f"z{n}", bytes(1_000_000)) for n in range(4)))
    text = refusal(web, content, kind, tmp_path)
    assert "it would grow beyond 1000000 bytes" in text
    written = tree(tmp_path / "m.partial" / "unpacked")
    assert sum(map(len, written.values())) <= 1_000_000


@pytest.mark.parametrize("kind", ["m.zip", "m.tgz"])
def test_too_many_members_are_refused(
    kind: str, web: WebStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "MOST_MEMBERS", 3)
    content = packed(kind, *((str(n), b"") for n in range(4)))
    assert "more than 3 members" in refusal(web, content, kind, tmp_path)


@pytest.mark.parametrize("kind", ["m.zip", "m.tgz"])
def test_folders_that_only_names_say_count(
    kind: str, web: WebStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "MOST_MEMBERS", 10)
    content = packed(kind, ("a/b/c/d/e/f/g/h/i/j/k", b""))
    assert "more than 10 members" in refusal(web, content, kind, tmp_path)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_methods_that_unpack_without_bound_are_refused(
    method: int, web: WebStore, tmp_path: Path
) -> None:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", method) as opened:
        opened.writestr("a", b"A")
    text = refusal(web, made.getvalue(), "m.zip", tmp_path)
    assert "another method than deflate" in text


def test_a_header_without_end_is_refused(web: WebStore, tmp_path: Path) -> None:
    size = archives.MOST_HEADER + 512
    long = tar_member("././@LongLink", type=tarfile.GNUTYPE_LONGNAME, size=size)
    header = long.tobuf(tarfile.GNU_FORMAT)
    content = header + b"n" * size + packed("m.tar", ("x", b"x"))
    assert "too long" in refusal(web, content, "m.tar", tmp_path)


def test_a_lie_about_the_size_is_found(web: WebStore, tmp_path: Path) -> None:
    honest = packed("m.zip", ("a", bytes(100_000)))
    # In the central directory, which is what is believed.
    at = honest.index(b"PK\x01\x02") + 24
    lie = honest[:at] + (10).to_bytes(4, "little") + honest[at + 4 :]
    assert "m.zip" in refusal(web, lie, "m.zip", tmp_path)


def test_one_name_twice_is_refused(web: WebStore, tmp_path: Path) -> None:
    content = packed("m.tar", ("a", b"A"), ("./a", b"B"))
    assert "one name twice" in refusal(web, content, "m.tar", tmp_path)


@pytest.mark.parametrize("kind", ["m.zip", "m.tar", "m.tgz", "m.tar.bz2", "m.tar.xz"])
def test_what_is_none_or_is_cut_is_told(
    kind: str, web: WebStore, tmp_path: Path
) -> None:
    whole = packed(kind, *FILES.items())
    for content in (b"<html>Sign in</html>" * 100, whole[: len(whole) // 2]):
        assert f"the archive {kind} cannot be read" in refusal(
            web, content, kind, tmp_path
        )


def test_a_full_disk_is_told(
    web: WebStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=20_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    content = packed("m.tgz", ("a", bytes(25_000)))
    text = refusal(web, content, "m.tgz", tmp_path)
    assert "not enough room on the disk to unpack m.tgz: 20000 bytes are free" in text
