"""Tests of your own models, over the real protocols and without a port.

    from kserve_lite.testing import Client

    def test_doubles() -> None:
        with Client(model) as client:
            answer = client.predict({"instances": [[1, 2]]})
        assert answer == {"predictions": [[2, 4]]}

`Client` is for plain tests: its models run in an event loop of its own, in a thread.
`AsyncClient` is for `async def` tests: the models run in the test's own loop. Requests
take the server's whole way, from bytes to bytes; the sockets are pairs, not ports.
"""

from __future__ import annotations

from kserve_lite.testing.answers import Inferred as Inferred
from kserve_lite.testing.answers import Refused as Refused
from kserve_lite.testing.answers import Response as Response
from kserve_lite.testing.async_client import AsyncClient as AsyncClient
from kserve_lite.testing.client import Client as Client
