"""Stores by way of fsspec: s3, gs, Azure's blobs, the Hugging Face hub, and the rest.

One code path for all; what differs is in `_OPTIONS`, how a connection is made from the
environment, and in `_checksum`, what each tells of a file's content. Credentials come
from where each store's own tools take them, and KServe's variables are known.
"""

from __future__ import annotations

import base64
import os
import re
import socket
import urllib.request
from collections.abc import Callable, Generator, Mapping
from contextlib import suppress
from typing import Any

from kserve_lite.errors import StartupError
from kserve_lite.server.storage.remotes import CHUNK, Changed, Missing, Remote
from kserve_lite.server.storage.uris import Source, digest

# Seconds to connect, and between two reads.
CONNECT_TIMEOUT = 15
READ_TIMEOUT = 30

# What tells that a file has changed, the first that there is; else all that is told.
_TAGS = ("ETag", "etag", "blob_id", "generation", "sha")


class FsspecStore:
    """The files under an URI. Raises StartupError where fsspec has no way to them.

    Its connections are closed when nobody has it any more: fsspec sees to that.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._fs, self._path = _filesystem(source)

    def files(self) -> list[Remote]:
        """All files under the URI, a prefix ending at a slash; or the one of that name.

        Raises Missing.
        """
        source, fs = self._source, self._fs
        try:
            found = fs.find(self._path, detail=True)
        except FileNotFoundError as error:
            raise self._missing() from error
        if not isinstance(found, dict):  # adlfs, for one blob
            found = {name: fs.info(name) for name in found}
        root = fs._strip_protocol(self._path).rstrip("/")  # noqa: SLF001 - no other way
        if source.scheme == "hf":
            root = fs.resolve_path(self._path).unresolve()
        remotes = []
        for path, info in found.items():
            if info.get("type", "file") != "file" or path.endswith("/"):
                continue
            if path == root:
                name = root.rpartition("/")[2]
            elif path.startswith(f"{root}/"):
                name = path[len(root) + 1 :]
            else:  # `model2/` where `model` was asked for
                continue
            algorithm, checksum = _checksum(source.scheme, info)
            remotes.append(
                Remote(name, path, info.get("size"), _tag(info), algorithm, checksum)
            )
        if not remotes:
            raise self._missing()
        return remotes

    def _missing(self) -> Missing:
        bucket = self._source.path.partition("/")[0]
        exists = True
        if self._source.scheme in ("s3", "gs", "abfs"):
            # It may not be allowed to look: then it says nothing.
            with suppress(Exception):
                exists = self._fs.exists(bucket)
        return Missing("" if exists else f"there is no bucket or container {bucket!r}")

    def read(self, remote: Remote, offset: int) -> tuple[int, Generator[bytes]]:
        """Give a file's bytes from an offset on."""
        return offset, self._chunks(remote, offset)

    def _chunks(self, remote: Remote, offset: int) -> Generator[bytes]:
        # Not cat_file(): with open() s3fs asks for the version that was listed.
        options = {"block_size": CHUNK, "cache_type": "none"}
        if self._source.scheme not in _OPTIONS:
            options = {}
        try:
            with self._fs.open(remote.path, "rb", **options) as file:
                file.seek(offset)
                while chunk := file.read(CHUNK):
                    yield chunk
        except OSError as error:
            if type(error).__name__ == "FileExpired":
                raise Changed from error
            raise

    def vouches(self, remote: Remote) -> bool:
        """Not where S3 has encrypted it with a key of KMS: the ETag is none of it."""
        if self._source.scheme != "s3":
            return True
        bucket, _, key = remote.path.partition("/")
        head = self._fs.call_s3("head_object", Bucket=bucket, Key=key)
        encryption = str(head.get("ServerSideEncryption", ""))
        return not (encryption.startswith("aws:") or "SSECustomerAlgorithm" in head)


def _filesystem(source: Source) -> tuple[Any, str]:
    """What fsspec has for an URI, and how it calls what the URI names."""
    missing = (
        f"storage_uri {source.shown}: what fetches it is not installed: "
        "pip install 'kserve-lite[storage]'"
    )
    try:
        import fsspec  # type: ignore[import-untyped]
    except ImportError:
        raise StartupError(missing) from None
    protocol = {"gs": "gcs"}.get(source.scheme, source.scheme)
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        if source.scheme in _OPTIONS:
            raise StartupError(missing) from error
        raise StartupError(
            f"storage_uri {source.shown}: fsspec needs another package for it: {error}"
        ) from error
    except ValueError:
        raise StartupError(
            f"storage_uri: {source.scheme}:// is unknown; known are s3, gs, hf, https, "
            "az, abfs, file, and what fsspec knows; or fetch the model and give "
            "--model_dir"
        ) from None
    common = {"skip_instance_cache": True, "use_listings_cache": False}
    make = _OPTIONS.get(source.scheme)
    if make is None:
        filesystem, path = fsspec.url_to_fs(source.uri, **common)
        return filesystem, path
    options = common | make(source, os.environ)
    filesystem = fsspec.filesystem(protocol, **options)
    if source.scheme == "s3":
        filesystem.retries = 1  # who asks tries again, and tells
    return filesystem, source.path


# --- connections ----------------------------------------------------------------------


def _s3(source: Source, environment: Mapping[str, str]) -> dict[str, Any]:
    """Beside these variables botocore reads its own: AWS_ENDPOINT_URL, keys, region."""
    endpoint = environment.get("AWS_ENDPOINT_URL_S3") or environment.get(
        "AWS_ENDPOINT_URL"
    )
    if not endpoint and environment.get("S3_ENDPOINT"):
        secure = _is_on(environment.get("S3_USE_HTTPS", "1"))
        endpoint = f"http{'s' if secure else ''}://{environment['S3_ENDPOINT']}"
    config: dict[str, Any] = {
        "connect_timeout": CONNECT_TIMEOUT,
        "read_timeout": READ_TIMEOUT,
        "retries": {"total_max_attempts": 1},
    }
    if _is_on(environment.get("S3_USER_VIRTUAL_BUCKET", "")):
        config["s3"] = {"addressing_style": "virtual"}
    client: dict[str, Any] = {}
    if not _is_on(environment.get("S3_VERIFY_SSL", "1")):
        client["verify"] = False
    return {
        "anon": _is_on(environment.get("awsAnonymousCredential", "")),
        "endpoint_url": endpoint or None,
        "client_kwargs": client,
        "config_kwargs": config,
    }


def _gs(source: Source, environment: Mapping[str, str]) -> dict[str, Any]:
    """What google-auth finds, and else nothing: gcsfs is then anonymous."""
    return {"timeout": READ_TIMEOUT}


def _azure(source: Source, environment: Mapping[str, str]) -> dict[str, Any]:
    """KServe's variables and Azure's; anonymous where there is none of them.

    adlfs reads AZURE_STORAGE_* itself.
    """
    options: dict[str, Any] = {}
    told = ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_CONNECTION_STRING")
    if not source.host and not any(environment.get(name) for name in told):
        raise StartupError(
            f"storage_uri {source.shown}: the account is not said: set "
            "AZURE_STORAGE_ACCOUNT_NAME, or give https://ACCOUNT.blob.core.windows.net/"
            "container/folder"
        )
    if source.host and not urllib.request.getproxies():
        # adlfs would try for minutes.
        socket.getaddrinfo(source.host, 443)
    if source.host:
        options["account_name"] = source.host.partition(".")[0]
    if source.host and not re.search(r"\.(core\.windows\.net)$", source.host):
        options["account_host"] = source.host
    key = environment.get("AZURE_STORAGE_ACCESS_KEY")
    if key:
        options["account_key"] = key
    for name in ("tenant_id", "client_id", "client_secret"):
        for prefix in ("AZ_", "AZURE_"):
            value = environment.get(prefix + name.upper())
            if value:
                options.setdefault(name, value)
    if not {"client_id", "client_secret", "tenant_id"} <= options.keys():
        # Two of three are of no use, and are those of a workload's identity.
        for name in ("tenant_id", "client_id", "client_secret"):
            options.pop(name, None)
    says = [name for name in environment if name.startswith(("AZURE_", "AZ_"))]
    is_anonymous = {*says} <= {"AZURE_STORAGE_ACCOUNT_NAME"}
    return options | {"anon": is_anonymous}


def _hf(source: Source, environment: Mapping[str, str]) -> dict[str, Any]:
    """HF_TOKEN and HF_ENDPOINT are the library's own to read."""
    return {}


_OPTIONS: dict[str, Callable[[Source, Mapping[str, str]], dict[str, Any]]] = {
    "s3": _s3,
    "gs": _gs,
    "abfs": _azure,
    "hf": _hf,
}


def _is_on(text: str) -> bool:
    return text.strip().lower() in ("1", "true", "yes", "on", "y", "t")


# --- what is told of a file -----------------------------------------------------------


def _tag(info: Mapping[str, Any]) -> str:
    for key in _TAGS:
        if info.get(key):
            return str(info[key]).strip('"')
    return digest(repr(sorted((str(k), str(v)) for k, v in info.items())))


def _checksum(scheme: str, info: Mapping[str, Any]) -> tuple[str, str]:
    """What a store tells of a file's content: algorithm and value, or "" both."""
    if scheme == "s3":
        # That of parts that were sent one by one is "...-7", and none of the whole.
        etag = str(info.get("ETag", "")).strip('"').lower()
        return ("md5", etag) if re.fullmatch(r"[0-9a-f]{32}", etag) else ("", "")
    if scheme == "gs":
        for algorithm, key in (("md5", "md5Hash"), ("crc32c", "crc32c")):
            if info.get(key):
                return algorithm, base64.b64decode(info[key]).hex()
    if scheme == "abfs":
        md5 = (info.get("content_settings") or {}).get("content_md5")
        return ("md5", bytes(md5).hex()) if md5 else ("", "")
    if scheme == "hf":
        # A large file is kept elsewhere, and what Git has is a note of it.
        if info.get("lfs"):
            return "sha256", str(info["lfs"]["sha256"])
        if re.fullmatch(r"[0-9a-f]{40}", str(info.get("blob_id", ""))):
            return "blob", str(info["blob_id"])
    return "", ""
