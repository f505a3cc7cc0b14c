"""One file from a web server: Range (RFC 9110 section 14), If-Range, and checksums.

The standard library, so that it works without further packages, streams, and keeps
memory bounded where a server ignores Range. Credentials (the URL's userinfo, and
KServe's variable `<host>-headers`) go to the host that they are meant for, and to no
other that it redirects to.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Generator
from contextlib import closing
from http import HTTPStatus
from typing import IO, Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from kserve_lite.errors import StartupError
from kserve_lite.server.storage.remotes import CHUNK, Changed, Remote
from kserve_lite.server.storage.uris import Source
from kserve_lite.version import __version__

# Seconds without a byte.
TIMEOUT = 30

# Where the certificates of authorities may be said to be, beside SSL_CERT_FILE.
_AUTHORITIES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")

# What a URL has as it is, beside letters and digits (RFC 3986 2.2); % is of what is
# quoted already.
_SAID = "/?:@!$&'()*+,;=-._~%"


class HttpStore:
    """A web server that has one file. Raises StartupError for unusable variables."""

    def __init__(self, source: Source) -> None:
        self._source = source
        parts = urlsplit(source.uri)
        host = parts.netloc.rpartition("@")[2]
        # As browsers do it: a space or an umlaut is not said on the wire.
        path, query = (quote(part, _SAID) for part in parts[2:4])
        self._url = urlunsplit((parts.scheme, host, path, query, ""))
        self._headers = {
            "User-Agent": f"kserve-lite/{__version__}",
            # What is stored is wanted, to the byte.
            "Accept-Encoding": "identity",
        }
        private = _headers_for(parts.hostname or "")
        if parts.username:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            word = base64.b64encode(pair.encode()).decode()
            private.setdefault("Authorization", f"Basic {word}")
        self._private = private
        opener = urllib.request.build_opener(_Redirects())
        if parts.scheme == "https":  # making it takes long
            secure = urllib.request.HTTPSHandler(context=_context())
            opener = urllib.request.build_opener(_Redirects(), secure)
        self._open = opener.open

    def files(self) -> list[Remote]:
        """The one file, under the last segment of the URL's path."""
        with closing(self._get({})) as answer:
            length = answer.headers.get("Content-Length", "")
            size = int(length) if re.fullmatch(r"\d{1,18}", length) else None
            path = self._source.path
            return [
                Remote(
                    path.rpartition("/")[2],
                    path,
                    size,
                    _tag(answer.headers),
                    *_checksum(answer.headers),
                )
            ]

    def read(self, remote: Remote, offset: int) -> tuple[int, Generator[bytes]]:
        """Give the file's bytes: from 0 on where the server has no ranges."""
        # A weak validator says nothing of bytes (RFC 9110 section 13.1.5).
        wanted = {}
        if offset and remote.tag and not remote.tag.startswith("W/"):
            wanted = {"Range": f"bytes={offset}-", "If-Range": remote.tag}
        try:
            answer = self._get(wanted)
        except urllib.error.HTTPError as error:
            if error.code != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not wanted:
                raise
            # Nothing is behind what has come, which was not known to be all: without
            # this it would be asked for in vain at every start.
            answer = self._get({})
        found = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
        is_part = answer.status == 206
        # A part may do without a Last-Modified, and If-Range has seen to it.
        tag = _tag(answer.headers) or (remote.tag if is_part else "")
        if tag != remote.tag or (
            is_part and (found is None or int(found[1]) != offset)
        ):
            answer.close()
            raise Changed
        return offset if is_part else 0, _chunks(answer)

    def vouches(self, remote: Remote) -> bool:
        return True

    def _get(self, headers: dict[str, str]) -> Any:
        request = urllib.request.Request(  # noqa: S310 - the scheme is http or https
            self._url, headers=self._headers | headers
        )
        for name, value in self._private.items():
            # Such a header does not go along where the answer leads elsewhere ...
            request.add_unredirected_header(name, value)
        try:
            return self._open(request, timeout=TIMEOUT)
        except urllib.error.HTTPError as error:
            error.close()  # it is an answer, too
            raise


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows to http and https only, and never from https to http."""

    def redirect_request(  # noqa: PLR0917 - as the class above has it
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        # Now: urllib would read the body first, which may have no end.
        fp.close()
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        if new.scheme not in (old.scheme, "https"):
            raise StartupError(
                f"storage_uri: {old.hostname} leads from {old.scheme} to {new.scheme}: "
                "give the URL where the file is"
            )
        followed = super().redirect_request(req, fp, code, msg, headers, newurl)
        same = (old.scheme, old.netloc) == (new.scheme, new.netloc)
        if followed is not None and same:  # ... but does where it is the same host
            for name, value in req.unredirected_hdrs.items():
                if name != "Host":
                    followed.add_unredirected_header(name, value)
        return followed


def _chunks(answer: http.client.HTTPResponse) -> Generator[bytes]:
    # Not read(CHUNK): what came before a connection broke would be lost with it.
    with closing(answer):
        while chunk := answer.read1(CHUNK):
            yield chunk
        left = answer.length
    if left:
        raise http.client.IncompleteRead(b"", left)


def _headers_for(host: str) -> dict[str, str]:
    text = os.environ.get(f"{host}-headers", "")
    try:
        found = json.loads(text or "{}")
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise StartupError(f"${host}-headers must be a JSON object of headers")
    return {str(name): str(value) for name, value in found.items()}


def _context() -> ssl.SSLContext:
    context = ssl.create_default_context()  # which reads SSL_CERT_FILE
    for variable in _AUTHORITIES:
        file = os.environ.get(variable)
        if file:
            try:
                context.load_verify_locations(file)
            except (OSError, ssl.SSLError) as error:
                raise StartupError(
                    f"${variable} names no file with certificates: {error.strerror}"
                ) from error
    return context


def _tag(headers: http.client.HTTPMessage) -> str:
    return headers.get("ETag") or headers.get("Last-Modified") or ""


def _checksum(headers: http.client.HTTPMessage) -> tuple[str, str]:
    """What is told of the whole: RFC 9530, RFC 3230, RFC 1864, Google's header."""
    told: dict[str, str] = {}
    if headers.get("Content-MD5"):
        told["md5"] = headers["Content-MD5"]
    for header in ("x-goog-hash", "Digest", "Repr-Digest"):
        for item in ",".join(headers.get_all(header, [])).split(","):
            name, _, value = item.strip().partition("=")
            told[name.lower().replace("sha-256", "sha256")] = value.strip(":")
    for algorithm, length in (("sha256", 32), ("md5", 16), ("crc32c", 4)):
        try:
            found = base64.b64decode(told.get(algorithm, ""), validate=True)
        except ValueError:
            continue
        if len(found) == length:
            return algorithm, found.hex()
    return "", ""
