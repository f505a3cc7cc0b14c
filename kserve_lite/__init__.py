"""Serve a Python function with the KServe V1 and V2 APIs.

The public surface. Importing it costs neither numpy nor torch: both are imported where
a model uses them.
"""

from __future__ import annotations

from kserve_lite.errors import DeadlineExceeded as DeadlineExceeded
from kserve_lite.errors import InferenceError as InferenceError
from kserve_lite.errors import InferenceFault as InferenceFault
from kserve_lite.errors import InvalidInput as InvalidInput
from kserve_lite.errors import KServeLiteError as KServeLiteError
from kserve_lite.errors import ModelDefinitionError as ModelDefinitionError
from kserve_lite.errors import ModelNotFound as ModelNotFound
from kserve_lite.errors import ModelNotReady as ModelNotReady
from kserve_lite.errors import Overloaded as Overloaded
from kserve_lite.errors import ServerNotReady as ServerNotReady
from kserve_lite.errors import SettingsError as SettingsError
from kserve_lite.errors import StartupError as StartupError
from kserve_lite.errors import Unsupported as Unsupported
from kserve_lite.errors import UnsupportedProtocol as UnsupportedProtocol
from kserve_lite.messages import Context as Context
from kserve_lite.messages import InferRequest as InferRequest
from kserve_lite.messages import InferResponse as InferResponse
from kserve_lite.messages import RequestedOutput as RequestedOutput
from kserve_lite.model import Model as Model
from kserve_lite.server.asgi import asgi as asgi
from kserve_lite.server.lifecycle import Server as Server
from kserve_lite.server.lifecycle import serve as serve
from kserve_lite.server.run import run as run
from kserve_lite.tensors import Tensor as Tensor
from kserve_lite.tensors import TensorSpec as TensorSpec
from kserve_lite.version import __version__ as __version__
