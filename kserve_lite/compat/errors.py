"""The errors of KServe's SDK: same names, same constructors, same built-in bases.

Each is also the fault of `kserve_lite.errors` that says the same, so that a model may
raise it and the client gets the status that belongs to it, over REST and gRPC alike.
What a model catches must be what these modules raise: `translated` turns the faults of
the codecs into these. KServe's FastAPI handlers of errors have no counterpart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from kserve_lite import errors


class InferenceError(errors.InferenceError, RuntimeError):
    """The model failed and says so in words meant for the client (500, INTERNAL).

    `reason` is what the client reads, so it begins with the status in brackets where
    one is given. debug_details: for the one who catches it; never sent.
    """

    def __init__(
        self, reason: Any, status: Any = None, debug_details: Any = None
    ) -> None:
        super().__init__(str(reason), None if status is None else str(status))
        self.status = status
        self.debug_details = debug_details


class InvalidInput(errors.InvalidInput, ValueError):
    """The request cannot be answered as it is (400, INVALID_ARGUMENT)."""

    def __init__(self, reason: Any) -> None:
        super().__init__(str(reason))


class ModelNotFound(errors.ModelNotFound):
    """No model of that name (404, NOT_FOUND)."""

    def __init__(self, model_name: str | None = None) -> None:
        super().__init__(str(model_name))


class ModelNotReady(errors.ModelNotReady, RuntimeError):
    """The model exists and cannot answer now (503, UNAVAILABLE)."""

    def __init__(self, model_name: str, detail: str | None = None) -> None:
        super().__init__(model_name, detail or "")
        self.error_msg = self.reason


class ServerNotReady(errors.ServerNotReady, RuntimeError):
    """The server cannot answer now (503, UNAVAILABLE)."""

    def __init__(self, detail: str | None = None) -> None:
        super().__init__(detail or "")
        self.error_msg = self.reason


class ServerNotLive(errors.InferenceFault, RuntimeError):
    """The server is about to be replaced (503, UNAVAILABLE)."""

    kind = errors.Kind.NOT_READY

    def __init__(self, detail: str | None = None) -> None:
        text = "Server is not live."
        super().__init__(f"{text} {detail}" if detail else text)
        self.error_msg = self.reason


class UnsupportedProtocol(errors.UnsupportedProtocol):
    """The protocol version is not offered (501, UNIMPLEMENTED)."""

    def __init__(self, protocol_version: str | None = None) -> None:
        super().__init__(str(protocol_version))


class WorkersShouldBeLessThanMaxWorkersError(errors.SettingsError):
    """More workers are asked for than there may be."""

    def __init__(self, max_workers: int | None = None) -> None:
        self.reason = f"Workers cannot be greater than {max_workers}"
        super().__init__(self.reason)


class ModelMissingError(errors.KServeLiteError):
    """There is no model at a path. It is told to the log, never to a client."""

    def __init__(self, path: Any) -> None:
        super().__init__(str(path))
        self.path = path


class NoModelReady(errors.StartupError, RuntimeError):
    """None of the models that a server was to start with is ready."""

    def __init__(self, models: Sequence[Any], detail: str | None = None) -> None:
        names = [model.name for model in models]
        if len(names) == 1:
            text = f"Model with name {names[0]} is not ready."
        else:
            text = f"Models with names {','.join(names)} are not ready."
        self.error_msg = f"{text} {detail}" if detail else text
        super().__init__(self.error_msg)
        self.models = models
        self.detail = detail


@contextmanager
def translated() -> Iterator[None]:
    """Raise a codec's InvalidInput as the one that code for KServe's SDK catches."""
    try:
        yield
    except errors.InvalidInput as fault:
        raise InvalidInput(fault.reason) from None
