"""What a storage URI says, and which folder of this machine it leads to.

Read while settings are made: no network, and no package of a store, is needed here.
An URI may hold secrets: userinfo, and the query of a presigned one. Neither is repeated
in an error, nor in a log line; and of an URI that is not understood only the scheme.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from kserve_lite.errors import SettingsError

# Where KServe's init container puts files, and its webhook mounts a pvc://.
MOUNTED = "/mnt/models"

# Schemes of KServe that are not for this, and what to do instead.
UNSUPPORTED = {
    "oci": "KServe itself mounts it (modelcar), to /mnt/models: give --model_dir",
    "hdfs": "fetch the model first and give --model_dir",
    "webhdfs": "fetch the model first and give --model_dir",
    "modelscope": "fetch the model first and give --model_dir",
    "git": "clone the repository first and give --model_dir",
}
# Names of one thing.
_SAME = {"s3a": "s3", "s3n": "s3", "gcs": "gs", "abfss": "abfs", "az": "abfs"}

_AZURE = re.compile(
    r"([a-z0-9]{3,24})\.(?:(?:z\d+\.)?blob\.storage\.azure\.net|blob\.core\.windows\.net)"
)
_AZURE_FILES = re.compile(r".*\.file\.(core\.windows|storage\.azure)\.net")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


@dataclass(frozen=True, slots=True)
class Source:
    """Where files are.

    scheme: s3, gs, abfs, hf, http (https too), or another that fsspec may know. uri: as
    it was given. path: what fsspec takes without the scheme. host: of an Azure account,
    if it is said. shown: what people may read.
    """

    scheme: str
    uri: str
    path: str
    shown: str
    host: str = ""


def is_remote(uri: str) -> bool:
    """Whether files of an URI have to be fetched."""
    found = _SCHEME.match(uri)
    return found is not None and found[1].lower() not in ("file", "pvc")


def source_of(uri: str, origin: str = "storage_uri") -> Source:
    """Read a remote URI.

    origin: who said it, as the user knows it: "$STORAGE_URI". Raises SettingsError.
    """
    found = _SCHEME.match(uri)
    given = found[1].lower() if found else ""
    rest = uri[len(given) + 3 :]
    scheme = _SAME.get(given.removeprefix("git+") if given == "git+https" else given)
    scheme = scheme or given
    if scheme in UNSUPPORTED or given.startswith("git+"):
        why = UNSUPPORTED.get(scheme, UNSUPPORTED["git"])
        raise SettingsError(f"{origin}: {given}:// is not supported; {why}")
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in uri):
        raise SettingsError(f"{origin}: a {given}:// URI has no control characters")
    if scheme in ("http", "https"):
        return _web(uri, origin)
    path = rest.rstrip("/")
    bucket, _, below = path.partition("/")
    if not (bucket if scheme in ("s3", "gs", "abfs", "hf") else path):
        raise SettingsError(f"{origin}: {given}:// says no place: {_FORMS}")
    shown = f"{given}://{path.partition('?')[0]}"
    host = ""
    if scheme in ("s3", "gs") and ("@" in bucket or ":" in bucket):
        raise SettingsError(
            f"{origin}: {given}:// is followed by a bucket's name only; credentials "
            "come from the environment"
        )
    if scheme == "abfs" and "@" in bucket:
        container, _, host = bucket.partition("@")
        if ":" in container:
            raise SettingsError(
                f"{origin}: {given}:// takes container@account...; credentials come "
                "from the environment"
            )
        path = f"{container}/{below}".rstrip("/")
    if scheme == "hf" and not below:
        raise SettingsError(f"{origin}: hf:// takes an owner and a model: {_FORMS}")
    if scheme == "hf":
        # KServe's way to name a revision is a colon, the hub's an @.
        owner, name, *inside = path.split("/")
        path = "/".join((owner, name.replace(":", "@", 1), *inside))
    if scheme not in ("s3", "gs", "abfs", "hf"):
        shown = f"{given}://{path.rpartition('@')[2]}".partition("?")[0]
    return Source(scheme, uri, path, shown, host)


_FORMS = "s3://bucket/folder, gs://bucket/folder, hf://owner/model, https://host/model.tar.gz"


def _web(uri: str, origin: str) -> Source:
    try:
        parts = urlsplit(uri)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        host, port, parts = "", None, urlsplit("")
    if not host:
        raise SettingsError(f"{origin}: https:// is to be followed by a host")
    if _AZURE_FILES.fullmatch(host):
        raise SettingsError(
            f"{origin}: Azure file shares are not supported; mount the share and give "
            "--model_dir"
        )
    if parts.path.endswith(".git"):
        raise SettingsError(f"{origin}: git is not supported; {UNSUPPORTED['git']}")
    shown = f"{parts.scheme}://{host}{f':{port}' if port else ''}{parts.path}"
    path = unquote(parts.path).strip("/")
    # With a query it is one blob's presigned URL, and so a file as any other.
    if _AZURE.fullmatch(host) and not parts.query:
        if not path:
            raise SettingsError(f"{origin}: the URL names no container")
        return Source("abfs", uri, path, shown, host)
    if not path or parts.path.endswith("/"):
        raise SettingsError(
            f"{origin}: the URL names no file; https:// fetches one file, or an archive"
        )
    return Source("http", uri, path, shown)


def folder_for(uri: str, origin: str, allow: str = "", ignore: str = "") -> str:
    """The folder of this machine that a storage URI leads to.

    The one that it names; for what is elsewhere /mnt/models, where that is filled, or
    one in the user's cache, which `fetching.py` fills. Raises SettingsError.
    """
    found = _SCHEME.match(uri)
    scheme = found[1].lower() if found else ""
    if scheme == "pvc":
        if is_filled(MOUNTED):
            return MOUNTED
        raise SettingsError(
            f"{origin}: pvc:// is mounted by KServe, to {MOUNTED}, and there is "
            "nothing: give --model_dir with the folder where the volume is"
        )
    if not is_remote(uri):
        return local_folder(uri, origin)
    source = source_of(uri, origin)
    if is_filled(MOUNTED):
        return MOUNTED
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):  # noqa: PTH117 - the specification: else ignore it
        cache = os.path.expanduser("~/.cache")  # noqa: PTH111 - Path.home() raises
    if not os.path.isabs(cache):  # noqa: PTH117
        raise SettingsError(
            f"{origin}: there is no home folder to keep the model in: give --model_dir"
        )
    last = source.shown.rstrip("/").rpartition("/")[2]  # its path may hold secrets
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", last)[:40].strip("-.") or "model"
    key = digest(json.dumps([uri, patterns(allow), patterns(ignore)]))
    return str(Path(cache, "kserve-lite", f"{readable}-{key[:16]}"))


def local_folder(uri: str, origin: str) -> str:
    """The folder that a path or file:///path (RFC 8089) names.

    Raises SettingsError where there is no such folder.
    """
    folder = uri
    if uri[:7].lower() == "file://":
        host, slash, path = uri[7:].partition("/")
        if host not in ("", "localhost"):
            raise SettingsError(
                f"{origin}: file:// takes a whole path, with three slashes: "
                "file:///mnt/models"
            )
        folder = unquote(slash + path)
    # Path.is_dir() raises where a folder above may not be entered.
    if not os.path.isdir(folder):  # noqa: PTH112
        raise SettingsError(
            f"{origin}: there is no folder {folder!r}; name the one that holds the "
            "model's files, or give --model_dir"
        )
    return folder


def is_filled(folder: str) -> bool:
    """Whether a folder holds anything but what a fresh volume has."""
    try:
        return bool({*os.listdir(folder)} - {"lost+found"})  # noqa: PTH208
    except OSError:
        return False


def patterns(text: str, origin: str = "") -> tuple[str, ...]:
    """Patterns as KServe's variables have them: a JSON list, or with commas between.

    Raises SettingsError.
    """
    if not text.lstrip().startswith("["):
        return tuple(part.strip() for part in text.split(",") if part.strip())
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(p, str) for p in found):
        raise SettingsError(
            f"{origin} must be patterns with commas between, or a JSON list of them"
        )
    return tuple(found)


def digest(text: str) -> str:
    """What stands for a text that may be secret."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
