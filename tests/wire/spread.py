"""Events as if every message came in pieces: one shape for the tests to look at."""

from __future__ import annotations

from collections.abc import Iterable

from kserve_lite.wire.events import Data, EndOfMessage, Event, Request


def spread(events: Iterable[Event]) -> list[Event]:
    """Take a request that came whole apart into head, body and end."""
    found: list[Event] = []
    for event in events:
        if type(event) is Request and event.body is not None:
            found.append(event._replace(body=None))
            if event.body:
                found.append(Data(event.stream_id, event.body))
            found.append(EndOfMessage(event.stream_id))
        else:
            found.append(event)
    return found
