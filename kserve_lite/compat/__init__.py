"""KServe's SDK on kserve-lite: a program moves by one word in its imports.

    from kserve import Model, ModelServer              # before
    from kserve_lite.compat import Model, ModelServer  # after

The modules have KServe's names, too: `errors`, `logging`, `model`, `model_repository`,
`model_server`, `protocol.infer_type`, `utils.utils` and so on. What is the same, what
is better, and what is not offered and why: docs/migrating-from-kserve.md. Importing
this costs neither numpy nor a client; the clients are imported where they are used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kserve_lite.compat import errors as errors
from kserve_lite.compat import logging as logging

# As in KServe, the modules of these names and not their packages.
from kserve_lite.compat.constants import constants as constants
from kserve_lite.compat.model import Model as Model
from kserve_lite.compat.model_repository import ModelRepository as ModelRepository
from kserve_lite.compat.model_server import ModelServer as ModelServer
from kserve_lite.compat.predictor_config import PredictorConfig as PredictorConfig
from kserve_lite.compat.protocol.infer_type import InferInput as InferInput
from kserve_lite.compat.protocol.infer_type import InferOutput as InferOutput
from kserve_lite.compat.protocol.infer_type import InferRequest as InferRequest
from kserve_lite.compat.protocol.infer_type import InferResponse as InferResponse
from kserve_lite.compat.protocol.infer_type import RequestedOutput as RequestedOutput
from kserve_lite.compat.utils import utils as utils

if TYPE_CHECKING:
    from kserve_lite.compat.inference_client import (
        InferenceGRPCClient as InferenceGRPCClient,
    )
    from kserve_lite.compat.inference_client import (
        InferenceRESTClient as InferenceRESTClient,
    )
    from kserve_lite.compat.inference_client import RESTConfig as RESTConfig

_CLIENTS = ("InferenceGRPCClient", "InferenceRESTClient", "RESTConfig")
# KServe's client of Kubernetes, which its package brings along.
_OF_KUBERNETES = ("Api", "Configuration", "KServeClient", "Knative", "V1", "OpenApi")


def __getattr__(name: str) -> Any:
    if name in _CLIENTS:
        clients = importlib.import_module("kserve_lite.compat.inference_client")
        return getattr(clients, name)
    if name.startswith(_OF_KUBERNETES):
        # No AttributeError: of that, `from ... import` would not tell the words.
        raise ImportError(
            f"kserve_lite.compat has no {name!r}: the client of Kubernetes is "
            "KServe's own; pip install kserve, and import it from there"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
