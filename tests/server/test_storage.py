"""STORAGE_URI: which folder it gives, what beats it, and what is not understood."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kserve_lite import SettingsError, StartupError
from kserve_lite.server.settings import make_settings
from kserve_lite.server.storage import uris
from kserve_lite.server.storage.faults import Fault, fault_of
from kserve_lite.server.storage.fetching import fetch_files
from kserve_lite.server.storage.fsspec_store import _checksum, _filesystem
from kserve_lite.server.storage.uris import local_folder, patterns, source_of
from tests.server.process import App

READS = """
from kserve_lite import Model, run

model = Model("m")

@model.load
def load():
    return model.path("words.txt").read_text()

@model.predict
def predict(payload, state):
    return {"predictions": [state]}

if __name__ == "__main__":
    run(model, model_dir="of-the-program")
"""


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache, and a /mnt/models that is not there."""
    monkeypatch.setattr(uris, "MOUNTED", str(tmp_path / "mounted"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def folder_of(environment: str = "", argument: str = "", flag: str = "") -> str:
    return make_settings(
        {"model_dir": argument} if argument else {},
        environment={"STORAGE_URI": environment},
        flags={"model_dir": flag} if flag else {},
    ).server.model_dir


@pytest.mark.parametrize("form", ["{}", "file://{}", "file://localhost{}", "FILE://{}"])
def test_a_folder_is_the_models_folder(form: str, tmp_path: Path) -> None:
    assert folder_of(form.format(tmp_path)) == str(tmp_path)


def test_a_file_url_is_decoded(tmp_path: Path) -> None:
    folder = tmp_path / "two words 100%"
    folder.mkdir()
    assert folder_of(folder.as_uri()) == str(folder)
    assert "%20" in folder.as_uri()


def test_a_relative_folder_is_relative_to_where_the_server_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    assert folder_of("models") == "models"


def test_the_stronger_source_gives_the_folder(tmp_path: Path) -> None:
    uri = str(tmp_path)
    assert folder_of() == "/mnt/models"
    assert folder_of(uri, argument="here") == uri
    assert folder_of(uri, argument="here", flag="there") == "there"
    assert folder_of(uri, flag="there") == "there"
    both = {"storage_uri": uri, "model_dir": "here"}
    assert make_settings(both).server.model_dir == "here"
    assert make_settings(flags=both).server.model_dir == "here"
    beaten = make_settings(both, environment={"STORAGE_URI": uri})
    assert beaten.server.model_dir == uri
    assert beaten.given == {"storage_uri", "model_dir"}


def test_what_is_elsewhere_goes_where_model_dir_says(tmp_path: Path) -> None:
    assert folder_of("s3://bucket/model", flag="there") == "there"
    cached = folder_of("s3://bucket/model", argument="here")
    assert Path(cached).parent == tmp_path / "cache" / "kserve-lite"
    assert not Path(cached).parent.exists()


def test_the_cache_has_a_folder_for_each_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cached(**environment: str) -> str:
        settings = make_settings(environment=environment)
        return settings.server.model_dir

    first = cached(STORAGE_URI="s3://bucket/My Model!/")
    assert Path(first).name.startswith("My-Model-")
    others = [
        cached(STORAGE_URI="s3://bucket2/My Model!/"),
        cached(STORAGE_URI="s3://bucket/My Model!/", STORAGE_ALLOW_PATTERNS="*.bin"),
        cached(STORAGE_URI="s3://bucket/My Model!/", STORAGE_IGNORE_PATTERNS="*.bin"),
    ]
    assert len({first, *others}) == 4
    assert cached(STORAGE_URI="s3://bucket/My Model!/") == first
    for uri in (
        "https://host/m.bin?sig=secret",
        "s3://b/m?sig=secret",
        "ftp://u:secret@h",
    ):
        assert "secret" not in cached(STORAGE_URI=uri)
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cached(STORAGE_URI="s3://b/m").startswith(f"{tmp_path}/home/.cache/")


def test_what_kserve_has_fetched_is_taken(tmp_path: Path) -> None:
    mounted = tmp_path / "mounted"
    (mounted / "lost+found").mkdir(parents=True)
    assert folder_of("s3://bucket/model") != str(mounted)
    with pytest.raises(SettingsError, match="pvc:// is mounted by KServe"):
        folder_of("pvc://claim/model")
    (mounted / "weights").touch()
    assert folder_of("pvc://claim/model") == str(mounted)
    assert folder_of("s3://bucket/model") == str(mounted)
    assert folder_of("s3://bucket/model", flag="there") == "there"


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("oci://secret/image", "oci:// is not supported"),
        ("hdfs://secret/model", "hdfs:// is not supported"),
        ("modelscope://secret/model", "modelscope:// is not supported"),
        ("git+https://host/secret", "clone the repository"),
        ("https://host/secret.git", "clone the repository"),
        ("https://a.file.core.windows.net/secret/m", "file shares are not supported"),
        ("https:///secret", "followed by a host"),
        ("https://host:secret/m.zip", "followed by a host"),
        ("https://host/secret/", "names no file"),
        ("s3://", "says no place"),
        ("s3://key:secret@bucket/m", "bucket's name only"),
        ("gs://secret@bucket/m", "bucket's name only"),
        ("abfs://container:secret@account/m", "container@account"),
        ("hf://secret", "an owner and a model"),
        ("s3://bucket/se\ncret", "control characters"),
        ("file://models/here", "three slashes"),
    ],
)
def test_other_uris_are_refused(uri: str, words: str) -> None:
    for model_dir in ("", "there"):
        if model_dir and uri.startswith("file:"):
            continue  # the folder counts, and nothing would be fetched
        with pytest.raises(SettingsError, match=words) as caught:
            folder_of(uri, flag=model_dir)
        assert str(caught.value).startswith("$STORAGE_URI: ")
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "folder",
    ["", "/not/there", "file:///not/there", __file__, "/no\0where", "/a" * 9**4],
)
def test_folders_that_are_not_there_are_refused(folder: str) -> None:
    with pytest.raises(SettingsError, match=r"there is no folder.*--model_dir"):
        local_folder(folder, "$STORAGE_URI")


@pytest.mark.parametrize(
    ("uri", "scheme", "path", "host"),
    [
        ("s3://bucket/a/b/", "s3", "bucket/a/b", ""),
        ("S3A://bucket", "s3", "bucket", ""),
        ("gcs://bucket/a", "gs", "bucket/a", ""),
        ("hf://owner/model", "hf", "owner/model", ""),
        ("hf://owner/model:v1", "hf", "owner/model@v1", ""),
        ("hf://owner/model@v1/sub", "hf", "owner/model@v1/sub", ""),
        ("az://box/a", "abfs", "box/a", ""),
        (
            "abfss://box@acc.dfs.core.windows.net/a",
            "abfs",
            "box/a",
            "acc.dfs.core.windows.net",
        ),
        (
            "https://acc.blob.core.windows.net/box/a%20b",
            "abfs",
            "box/a b",
            "acc.blob.core.windows.net",
        ),
        (
            "https://acc.z12.blob.storage.azure.net/box",
            "abfs",
            "box",
            "acc.z12.blob.storage.azure.net",
        ),
        (
            "https://acc.blob.core.windows.net/box/a.zip?sig=s",
            "http",
            "box/a.zip",
            "",
        ),
        ("http://u:p@host:80/a/m%201.zip?x=1", "http", "a/m 1.zip", ""),
        # Not Azure's, nor anybody's repository.
        ("https://x.blob.core.windows.net.evil/a", "http", "a", ""),
        ("https://x.github.io/m.zip", "http", "m.zip", ""),
    ],
)
def test_uris_are_read(uri: str, scheme: str, path: str, host: str) -> None:
    source = source_of(uri)
    assert (source.scheme, source.path, source.host) == (scheme, path, host)
    assert "u:p" not in source.shown
    assert "?" not in source.shown


def test_patterns_are_lists() -> None:
    assert patterns(" *.bin, a/* ,") == ("*.bin", "a/*")
    assert patterns('["a,b", "c"]') == ("a,b", "c")
    assert patterns("") == ()
    for wrong in ("[", "[1]"):
        with pytest.raises(SettingsError, match=r"^\$STORAGE_ALLOW_PATTERNS must be"):
            make_settings(
                {"storage_uri": "s3://b/m"},
                environment={"STORAGE_ALLOW_PATTERNS": wrong},
            )


def test_errors_say_who_gave_it() -> None:
    with pytest.raises(SettingsError, match=r"^--storage_uri: oci://"):
        make_settings(flags={"storage_uri": "oci://b/m"})
    with pytest.raises(SettingsError, match=r"^storage_uri: oci://"):
        make_settings({"storage_uri": "oci://b/m"})


def test_a_process_loads_from_where_kserve_says(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(READS)
    models = tmp_path / "models"
    models.mkdir()
    (models / "words.txt").write_text("found")
    with App("app.py", cwd=tmp_path, PORT="0", STORAGE_URI=str(models)) as app:
        answer = urllib.request.urlopen(
            f"{app.url}/v1/models/m:predict", b'{"instances": [1]}', timeout=30
        )
        assert json.load(answer) == {"predictions": ["found"]}
        assert app.stop().status == 0


# --- stores that cannot be reached from here ------------------------------------------


def options(uri: str, monkeypatch: pytest.MonkeyPatch, **variables: str) -> Any:
    """The file system that an URI gives with these variables, of all that count."""
    for name in (
        "AZURE_STORAGE_ACCOUNT_NAME",
        "AZURE_STORAGE_ACCESS_KEY",
        "AWS_ENDPOINT_URL",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # it looks for no host
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return _filesystem(source_of(uri))[0]


def test_azure_takes_kserves_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "https://acc.blob.core.windows.net/box/model"
    public = options(url, monkeypatch)
    assert (public.account_name, public.anon) == ("acc", True)
    keyed = options(url, monkeypatch, AZURE_STORAGE_ACCESS_KEY="a2V5")
    assert (keyed.account_key, keyed.anon) == ("a2V5", False)
    with pytest.raises(StartupError, match="the account is not said"):
        options("az://box/model", monkeypatch)
    named = options("az://box/model", monkeypatch, AZURE_STORAGE_ACCOUNT_NAME="acc")
    assert named.account_name == "acc"


def test_s3_takes_kserves_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    minio = options(
        "s3://bucket/model",
        monkeypatch,
        S3_ENDPOINT="minio:9000",
        S3_USE_HTTPS="0",
        S3_VERIFY_SSL="0",
        awsAnonymousCredential="True",
        S3_USER_VIRTUAL_BUCKET="true",
    )
    assert minio.endpoint_url == "http://minio:9000"
    assert minio.anon
    assert minio.client_kwargs == {"verify": False}
    assert minio.config_kwargs["s3"] == {"addressing_style": "virtual"}
    other = options("s3://b/m", monkeypatch, AWS_ENDPOINT_URL="https://other")
    assert other.endpoint_url == "https://other"


@pytest.mark.parametrize(
    ("scheme", "info", "want"),
    [
        ("s3", {"ETag": '"0cc175b9c0f1b6a831c399e269772661"'}, "md5 0cc175"),
        ("s3", {"ETag": '"0cc175b9c0f1b6a831c399e269772661-2"'}, " "),
        ("gs", {"md5Hash": "DMF1ucDxtqgxw5niaXcmYQ==", "crc32c": "x"}, "md5 0cc175"),
        ("gs", {"crc32c": "wdBDMA=="}, "crc32c c1d043"),
        (
            "abfs",
            {"content_settings": {"content_md5": bytearray(b"\x0c\xc1\x75")}},
            "md5 0cc175",
        ),
        ("abfs", {"content_settings": {"content_md5": None}}, " "),
        ("hf", {"lfs": {"sha256": "abc"}, "blob_id": "0" * 40}, "sha256 abc"),
        ("hf", {"lfs": None, "blob_id": "1" * 40}, "blob 111111"),
        ("memory", {}, " "),
    ],
)
def test_checksums_are_each_stores_own(
    scheme: str, info: dict[str, Any], want: str
) -> None:
    algorithm, checksum = _checksum(scheme, info)
    assert f"{algorithm} {checksum[:6]}" == want


def test_checksums_are_computed(tmp_path: Path) -> None:
    from kserve_lite.server.storage.fetching import _checksum as computed

    file = tmp_path / "a"
    file.write_bytes(b"a")
    assert computed(file, "md5", 1) == "0cc175b9c0f1b6a831c399e269772661"
    assert computed(file, "crc32c", 1) == "c1d04330"
    # As `printf a | git hash-object --stdin` has it.
    assert computed(file, "blob", 1) == "2e65efe2a145dda7ee51d1741299f848e5bf752e"


def _errors() -> dict[str, tuple[Callable[[], BaseException], Fault]]:
    """What the packages of the stores raise, made as they make it."""
    import httpx
    from azure.core.exceptions import ClientAuthenticationError, ServiceRequestError
    from botocore.exceptions import (  # type: ignore[import-untyped]
        ClientError,
        NoCredentialsError,
    )
    from google.auth.exceptions import DefaultCredentialsError
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    asked = httpx.Request("GET", "https://huggingface.co/secret")

    def hub(kind: Any, status: int) -> Callable[[], BaseException]:
        answer = httpx.Response(status, request=asked)
        return lambda: kind("secret", response=answer)

    def s3(code: str, status: int) -> Callable[[], BaseException]:
        told: Any = {
            "Error": {"Code": code},
            "ResponseMetadata": {"HTTPStatusCode": status},
        }
        return lambda: ClientError(told, "GetObject")

    return {
        "hub, gated": (hub(GatedRepoError, 403), Fault.DENIED),
        "hub, none": (hub(RepositoryNotFoundError, 404), Fault.NOT_FOUND),
        "hub, away": (lambda: httpx.ConnectTimeout("x"), Fault.BUSY),
        "azure, key": (lambda: ClientAuthenticationError("x"), Fault.REFUSED),
        "azure, away": (lambda: ServiceRequestError("x"), Fault.BUSY),
        "gs, none": (DefaultCredentialsError, Fault.CREDENTIALS),
        "s3, none": (NoCredentialsError, Fault.CREDENTIALS),
        "s3, key": (s3("InvalidAccessKeyId", 403), Fault.REFUSED),
        "s3, denied": (s3("AccessDenied", 403), Fault.DENIED),
        "s3, bucket": (s3("NoSuchBucket", 404), Fault.NO_BUCKET),
        "s3, region": (s3("PermanentRedirect", 301), Fault.REGION),
        "s3, busy": (s3("SlowDown", 503), Fault.BUSY),
        "s3, fails": (s3("InternalError", 500), Fault.BUSY),
        "reset": (ConnectionResetError, Fault.BUSY),
        "late": (TimeoutError, Fault.BUSY),
        "else": (lambda: KeyError("x"), Fault.UNKNOWN),
    }


@pytest.mark.parametrize("name", _errors())
def test_errors_of_packages_are_understood(name: str) -> None:
    make, fault = _errors()[name]
    assert fault_of(make()) is fault
    wrapped = OSError("some wrapper's words")
    wrapped.__cause__ = make()
    assert fault_of(wrapped) is fault


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket/model",
        "hf://owner/model",
        "https://acc.blob.core.windows.net/box/model",
        "https://no-such-host.invalid/m.zip",
    ],
)
def test_a_host_that_does_not_exist_is_told(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    def nowhere(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "x")
    with pytest.raises(StartupError, match="there is no such host"):
        fetch_files(source_of(uri), tmp_path / "m")
