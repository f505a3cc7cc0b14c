"""What can go wrong, sorted by whose fault it is and what the caller does next.

Every error that may reach a client is an `InferenceFault` of one `Kind`. This module
knows no HTTP or gRPC status: `rest/` and `rpc/` each hold one table from kind to
status. The message of an `InferenceFault` is written for the client and is sent as it
stands, so it never quotes a request body or another exception.

Errors that only the person who writes or starts a model can meet are no faults
(`ModelDefinitionError`, `SettingsError`, `StartupError`): they end the start.
"""

from __future__ import annotations

import enum


class Kind(enum.Enum):
    """Whose fault an error is, and so what its receiver can do about it."""

    INVALID_INPUT = "the request is wrong: change it"
    NOT_FOUND = "there is no such model or version"
    NOT_READY = "the model or server cannot answer yet, or no longer: try later"
    UNSUPPORTED = "the model or server does not do this"
    FORBIDDEN = "the caller may not do this"
    OVERLOADED = "too much is waiting: try later"
    DEADLINE_EXCEEDED = "the time that the caller gave has passed"
    CANCELLED = "the caller went away"
    MODEL_FAILED = "the model's own code failed"
    INTERNAL = "the server failed: a bug in kserve-lite"


class KServeLiteError(Exception):
    """Base of every exception that kserve-lite raises on purpose."""


class InferenceFault(KServeLiteError):
    """An error with a `kind` and a message that the client is meant to read.

    Handlers may raise any subclass: its message is sent to the client as it is.
    """

    kind: Kind = Kind.INTERNAL

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class InvalidInput(InferenceFault):
    """The request cannot be answered as it is (400, INVALID_ARGUMENT)."""

    kind = Kind.INVALID_INPUT


class ModelNotFound(InferenceFault):
    """No model of that name, or no such version of it (404, NOT_FOUND)."""

    kind = Kind.NOT_FOUND

    def __init__(self, model_name: str, version: str | None = None) -> None:
        if version is None:
            super().__init__(f"Model with name {model_name} does not exist.")
        else:
            super().__init__(f"Model {model_name} has no version {version}.")
        self.model_name = model_name


class ModelNotReady(InferenceFault):
    """The model exists and cannot answer now (503, UNAVAILABLE)."""

    kind = Kind.NOT_READY

    def __init__(self, model_name: str, detail: str = "") -> None:
        text = f"Model with name {model_name} is not ready."
        super().__init__(f"{text} {detail}" if detail else text)
        self.model_name = model_name


class ServerNotReady(InferenceFault):
    """The server cannot answer now (503, UNAVAILABLE)."""

    kind = Kind.NOT_READY

    def __init__(self, detail: str = "") -> None:
        text = "Server is not ready."
        super().__init__(f"{text} {detail}" if detail else text)


class Unsupported(InferenceFault):
    """What was asked for is not offered (501, UNIMPLEMENTED)."""

    kind = Kind.UNSUPPORTED


class UnsupportedProtocol(Unsupported):
    """The protocol version is not offered (501, UNIMPLEMENTED)."""

    def __init__(self, protocol_version: str) -> None:
        super().__init__(f"Unsupported protocol {protocol_version}.")


class Forbidden(InferenceFault):
    """The caller may not do what it asks for (403, PERMISSION_DENIED)."""

    kind = Kind.FORBIDDEN


class Overloaded(InferenceFault):
    """More is waiting than the server may hold (503, UNAVAILABLE)."""

    kind = Kind.OVERLOADED


class DeadlineExceeded(InferenceFault):
    """The caller's deadline has passed (504, DEADLINE_EXCEEDED)."""

    kind = Kind.DEADLINE_EXCEEDED

    def __init__(self) -> None:
        super().__init__("The deadline of the request has passed.")


class InferenceError(InferenceFault):
    """The model failed and says so in words meant for the client (500, INTERNAL)."""

    kind = Kind.MODEL_FAILED

    def __init__(self, reason: str, status: str | None = None) -> None:
        super().__init__(reason if status is None else f"[{status}] {reason}")


class ModelFailed(InferenceFault):
    """A handler raised, or returned what the protocol cannot say (500, INTERNAL).

    The cause stays in the log under `request_id`, which the client gets too.
    """

    kind = Kind.MODEL_FAILED

    def __init__(self, request_id: str, exposed: str | None = None) -> None:
        text = exposed or "The model failed to answer."
        super().__init__(f"{text} The server's log has more under {request_id}.")
        self.request_id = request_id
        self.exposed = exposed


class PredictorFault(InferenceFault):
    """Another server, which was to answer, refused or could not be reached.

    kind: what its answer said.
    """

    def __init__(self, kind: Kind, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


class ModelDefinitionError(KServeLiteError, TypeError):
    """A model was defined in a way that cannot work; raised where it is defined."""


class SettingsError(KServeLiteError, ValueError):
    """A setting, flag or environment variable is unknown or has an unusable value."""


class StartupError(KServeLiteError):
    """The server cannot start: one line that says what happened and what to do."""
