"""From where a model's files come: storage_uri, and the folder that it leads to.

`uris.py` reads the URI, without the network, while settings are made; `fetching.py`
brings the files, once a start, before models load. In reading order: `uris.py`,
`remotes.py` (what a store tells of a file), `fsspec_store.py` and `http_store.py`,
`faults.py` (what goes wrong, in a line), `staging.py` (where files lie until all are
there), `archives.py`, `progress.py`, `fetching.py`. Nothing here is imported before
something is to be fetched, but this file and `uris.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kserve_lite.server.storage.uris import is_remote

if TYPE_CHECKING:
    from kserve_lite.server.settings import ServerSettings


async def fetch(server: ServerSettings, *, bar: bool = False) -> None:
    """Have the files of storage_uri in model_dir, off the event loop.

    bar: whether to show how far it is where standard error is a terminal.
    Returns at once where they are on this machine already, by the URI's word. Raises
    StartupError; cancelled, it leaves what it has for the next time.
    """
    if is_remote(server.storage_uri):
        from kserve_lite.server.storage.fetching import fetch_off_loop

        await fetch_off_loop(server, bar=bar)
