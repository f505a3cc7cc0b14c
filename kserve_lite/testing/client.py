"""The test client for tests that are no coroutines: `AsyncClient`, in a thread."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from contextlib import ExitStack, suppress
from functools import partial, wraps
from types import TracebackType
from typing import Any, Concatenate, NoReturn, ParamSpec, TypeVar

from anyio.from_thread import BlockingPortal, start_blocking_portal

from kserve_lite.model import Model
from kserve_lite.testing.async_client import AsyncClient

P = ParamSpec("P")
T = TypeVar("T")


def _plain(
    method: Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Client, P], T]:
    """The method of a `Client` that runs one of `AsyncClient`."""

    @wraps(method)
    def call(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> T:
        portal = self._portal or _not_entered()
        result: T = portal.call(partial(method, self._client, *args, **kwargs))
        return result

    return call


def _iterated(
    method: Callable[Concatenate[AsyncClient, P], AsyncGenerator[T]],
) -> Callable[Concatenate[Client, P], Generator[T]]:
    """The same for a method that gives items."""

    @wraps(method)
    def iterate(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> Generator[T]:
        portal = self._portal or _not_entered()
        items = method(self._client, *args, **kwargs)
        end: Any = object()
        self._streams.add(items)
        try:
            while (item := portal.call(anext, items, end)) is not end:
                yield item
        finally:
            if self._portal is portal:  # else the end of the client has closed them
                self._streams.discard(items)
                portal.call(items.aclose)

    return iterate


def _not_entered() -> NoReturn:
    raise RuntimeError("the client is not entered: use it as `with Client(model)`")


class Client:
    """The same for plain tests: `with Client(model) as client:`.

    Its methods are those of `AsyncClient`, which says what they take and raise, without
    `await`; streams are iterators. They may be called from several threads. Entering it
    where an event loop runs raises RuntimeError: it would be blocked.
    """

    def __init__(self, *models: Model, **settings: Any) -> None:
        self._client = AsyncClient(*models, **settings)
        event_loop = self._client.settings.server.event_loop
        installed = importlib.util.find_spec("uvloop") is not None
        self._use_uvloop = installed and event_loop != "asyncio"
        self._portal: BlockingPortal | None = None
        self._stack = ExitStack()
        self._streams: set[AsyncGenerator[Any]] = set()

    def __enter__(self) -> Client:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            pass
        else:
            raise RuntimeError(
                "Client would block the event loop that runs here: use "
                "`async with AsyncClient(...)`"
            )
        with ExitStack() as stack:
            options = {"use_uvloop": self._use_uvloop}
            portal = stack.enter_context(start_blocking_portal("asyncio", options))
            stack.enter_context(portal.wrap_async_context_manager(self._client))
            stack.callback(self._close, portal)
            self._portal, self._stack = portal, stack.pop_all()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._stack.__exit__(exc_type, exc, tb)

    def _close(self, portal: BlockingPortal) -> None:
        self._portal = None
        # Left to the loop's end they would be closed from within and without at once.
        while self._streams:
            with suppress(RuntimeError):  # another thread reads it
                portal.call(self._streams.pop().aclose)

    request = _plain(AsyncClient.request)
    stream = _iterated(AsyncClient.stream)
    predict = _plain(AsyncClient.predict)
    explain = _plain(AsyncClient.explain)
    infer = _plain(AsyncClient.infer)
    infer_stream = _iterated(AsyncClient.infer_stream)
    generate = _plain(AsyncClient.generate)
    generate_stream = _iterated(AsyncClient.generate_stream)
