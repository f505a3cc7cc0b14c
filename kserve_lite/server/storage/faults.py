"""What a store's packages raise, as words for people, and whether to try again.

Every package has its own exceptions; they are known here by name, so that none of them
has to be imported. Messages of theirs are not passed on: they may hold URLs with
secrets.
"""

from __future__ import annotations

import errno
import http.client
import socket
from collections.abc import Iterator
from enum import Enum

from kserve_lite.server.storage.remotes import Changed, Missing


class Fault(Enum):
    """What went wrong, as it is told."""

    CREDENTIALS = (
        "there are no credentials for it: set them in the environment (see "
        "docs/storage.md), or for a public one say so (s3: awsAnonymousCredential=true)"
    )
    REFUSED = "its credentials are refused: they are wrong, or have expired"
    DENIED = "access is denied: give credentials that may list and read it"
    NOT_FOUND = "nothing is found there: check the name"
    NO_BUCKET = "there is no such bucket: check its name, and the endpoint"
    REGION = "the bucket is in another region: set AWS_DEFAULT_REGION"
    INVALID = "the store does not take this name: check it"
    NO_HOST = "there is no such host: check the name, or the endpoint"
    TLS = "its TLS certificate is not trusted: check the host, or SSL_CERT_FILE"
    CHANGED = "it was written while it was fetched: start again"
    CORRUPT = "what comes has another checksum than the store tells"
    BUSY = "the store cannot be reached, or fails"
    UNKNOWN = "it failed"

    @property
    def passes(self) -> bool:
        """Whether it may be well at the next try."""
        return self in (Fault.BUSY, Fault.CORRUPT)


_CODES = {  # of S3
    "AccessDenied": Fault.DENIED,
    "AllAccessDisabled": Fault.DENIED,
    "AuthorizationHeaderMalformed": Fault.REGION,
    "ExpiredToken": Fault.REFUSED,
    "IllegalLocationConstraintException": Fault.REGION,
    "InvalidAccessKeyId": Fault.REFUSED,
    "InvalidBucketName": Fault.INVALID,
    "InvalidToken": Fault.REFUSED,
    "NoSuchBucket": Fault.NO_BUCKET,
    "NoSuchKey": Fault.NOT_FOUND,
    "PermanentRedirect": Fault.REGION,
    "SignatureDoesNotMatch": Fault.REFUSED,
    "SlowDown": Fault.BUSY,
}
_NAMES = {
    "ClientAuthenticationError": Fault.REFUSED,
    "ClientConnectorCertificateError": Fault.TLS,
    "ClientConnectorDNSError": Fault.NO_HOST,
    "CredentialRetrievalError": Fault.CREDENTIALS,
    "CredentialUnavailableError": Fault.CREDENTIALS,
    "DefaultCredentialsError": Fault.CREDENTIALS,
    "EntryNotFoundError": Fault.NOT_FOUND,
    "FileNotFoundError": Fault.NOT_FOUND,
    "GatedRepoError": Fault.DENIED,
    "HFValidationError": Fault.INVALID,
    "InvalidRegionError": Fault.REGION,
    "LocalTokenNotFoundError": Fault.CREDENTIALS,
    "NoCredentialsError": Fault.CREDENTIALS,
    "ParamValidationError": Fault.INVALID,
    "PartialCredentialsError": Fault.CREDENTIALS,
    "PermissionError": Fault.DENIED,
    "ProfileNotFound": Fault.CREDENTIALS,
    "RefreshError": Fault.REFUSED,
    "RepositoryNotFoundError": Fault.NOT_FOUND,
    "ResourceNotFoundError": Fault.NOT_FOUND,
    "RevisionNotFoundError": Fault.NOT_FOUND,
    "SSLCertVerificationError": Fault.TLS,
    "TokenRetrievalError": Fault.CREDENTIALS,
    # Each the root of many, in the packages for requests.
    "ClientError": Fault.BUSY,
    "ConnectionError": Fault.BUSY,
    "HTTPClientError": Fault.BUSY,
    "HTTPException": Fault.BUSY,
    "ServiceRequestError": Fault.BUSY,
    "ServiceResponseError": Fault.BUSY,
    "TimeoutError": Fault.BUSY,
    "TransportError": Fault.BUSY,
}
_STATUSES = {
    400: Fault.INVALID,
    401: Fault.REFUSED,
    403: Fault.DENIED,
    404: Fault.NOT_FOUND,
    410: Fault.NOT_FOUND,
    412: Fault.CHANGED,
    416: Fault.CHANGED,
}
_BUSY = (408, 425, 429)
_ERRNOS = {errno.EBUSY, errno.EREMOTEIO, errno.ENETUNREACH, errno.EHOSTUNREACH}


def fault_of(error: BaseException) -> Fault:
    """What an exception of a store means; of its causes the one that says most."""
    found = [_judge(one) for one in _chain(error)]
    # A cause may tell more than what was made of it: which of the 404s, say.
    known = [fault for fault in found if fault not in (Fault.UNKNOWN, Fault.BUSY)]
    if Fault.NO_HOST in known:
        return Fault.NO_HOST
    if Fault.NO_BUCKET in known:
        return Fault.NO_BUCKET
    if Fault.REFUSED in known:
        return Fault.REFUSED
    if known:
        return known[0]
    return Fault.BUSY if Fault.BUSY in found else Fault.UNKNOWN


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    waiting: list[object] = [error]
    while waiting and len(seen) < 20:
        one = waiting.pop(0)
        if isinstance(one, BaseException) and one not in seen:
            seen.append(one)
            yield one
            # urllib and aiohttp keep the reason where only they look.
            waiting += [getattr(one, n, None) for n in ("reason", "os_error")]
            waiting.append(one.__cause__ or one.__context__)


def _judge(error: BaseException) -> Fault:
    if isinstance(error, Changed):
        return Fault.CHANGED
    if isinstance(error, Missing):
        return Fault.NOT_FOUND
    if isinstance(error, socket.gaierror):
        is_for_now = error.errno == socket.EAI_AGAIN
        return Fault.BUSY if is_for_now else Fault.NO_HOST
    answer = getattr(error, "response", None)
    if isinstance(answer, dict):  # botocore's
        code = str(answer.get("Error", {}).get("Code", ""))
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return _CODES.get(code) or _of_status(status)
    for place in (error, answer):
        for name in ("status", "status_code", "code"):
            fault = _of_status(getattr(place, name, None))
            if fault is not Fault.UNKNOWN:
                return fault
    for kind in type(error).__mro__:
        if kind.__name__ in _NAMES:
            return _NAMES[kind.__name__]
    if isinstance(error, http.client.HTTPException):
        return Fault.BUSY
    if isinstance(error, OSError) and error.errno in _ERRNOS:
        return Fault.BUSY
    return Fault.UNKNOWN


def _of_status(status: object) -> Fault:
    if not isinstance(status, int):
        return Fault.UNKNOWN
    if status in _BUSY or 500 <= status < 600:
        return Fault.BUSY
    return _STATUSES.get(status, Fault.UNKNOWN)
