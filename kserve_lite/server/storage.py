"""STORAGE_URI: from where a model's files come, as a local folder.

Under KServe an init container has fetched the files before the server starts, and the
webhook has set STORAGE_URI to /mnt/models: a folder is all that is understood so far.
What an URI holds beside its scheme is not repeated, since it may be a secret.
"""

from __future__ import annotations

import os
from urllib.parse import unquote

from kserve_lite.errors import SettingsError


def local_folder(uri: str, source: str) -> str:
    """The folder that a storage URI names: a path, or file:///path (RFC 8089).

    source: who said it, as the user knows it: "$STORAGE_URI". Raises SettingsError for
    other schemes, and where there is no such folder.
    """
    scheme, given, folder = uri.partition("://")
    if not given:
        folder = uri
    elif scheme.lower() != "file":
        raise SettingsError(
            f"{source}: {scheme}:// is not supported by this version, which takes a "
            "folder or file:///folder; fetch the model first and give --model_dir "
            "(KServe does, to /mnt/models)"
        )
    else:
        host, slash, path = folder.partition("/")
        if host not in ("", "localhost"):
            raise SettingsError(
                f"{source}: file:// takes a whole path, with three slashes: "
                "file:///mnt/models"
            )
        folder = unquote(slash + path)
    # Path.is_dir() raises where a folder above may not be entered.
    if not os.path.isdir(folder):  # noqa: PTH112
        raise SettingsError(
            f"{source}: there is no folder {folder!r}; name the one that holds the "
            "model's files, or give --model_dir"
        )
    return folder
