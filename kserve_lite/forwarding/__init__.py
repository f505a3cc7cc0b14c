"""Forwarding: another server's answer in the place of a handler's.

A transformer's models have no predict handler: `--predictor_host` says who predicts for
them, `--explainer_host` who explains. `models.py` gives them handlers that ask an
`Upstream`. Nothing here listens, and no route knows of it. The names below are imported
when they are asked for: a server that forwards nothing does not pay for them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kserve_lite.forwarding.models import Forwarding as Forwarding
    from kserve_lite.forwarding.settings import ForwardingSettings as ForwardingSettings
    from kserve_lite.forwarding.upstream import Upstream as Upstream

_PLACES = {
    "Forwarding": "models",
    "ForwardingSettings": "settings",
    "Upstream": "upstream",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
