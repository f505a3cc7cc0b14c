"""The constants of KServe's SDK that code for models, servers and clients imports.

Those of its Kubernetes client (groups, kinds, credentials) are not here: a program that
talks to a cluster has `kserve` installed beside kserve-lite.
"""

from __future__ import annotations

import enum
import os
from typing import Any


class PredictorProtocol(enum.Enum):
    """What a client, or a transformer to its predictor, speaks."""

    REST_V1 = "v1"
    REST_V2 = "v2"
    GRPC_V2 = "grpc-v2"


class ModelType(enum.Enum):
    """What a deployed model is for."""

    EXPLAINER = 1
    PREDICTOR = 2


KSERVE_LOGLEVEL = os.environ.get("KSERVE_LOGLEVEL", "INFO").upper()
KSERVE_MODEL_SERVER_NAME = "kserve"

V1_ROUTE_PREFIX = "/v1"
V2_ROUTE_PREFIX = "/v2"
EXPLAINER_BASE_URL_FORMAT = "{0}://{1}"
INFERENCE_CONTENT_LENGTH_HEADER = "inference-header-content-length"

DEFAULT_HTTP_PORT = 8080
DEFAULT_HTTPS_PORT = 8443
DEFAULT_GRPC_PORT = 8081
MAX_GRPC_MESSAGE_LENGTH = 8 * 1024 * 1024

KSERVE_TLS_CERT_FILE_ENV = "KSERVE_TLS_CERT_FILE"
KSERVE_TLS_KEY_FILE_ENV = "KSERVE_TLS_KEY_FILE"


def __getattr__(name: str) -> Any:
    if name == "GRPC_CONTENT_DATATYPE_MAPPINGS":  # its table imports protobuf
        from kserve_lite.codecs.proto.contents import CONTENTS

        return {datatype: contents.field for datatype, contents in CONTENTS.items()}
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
