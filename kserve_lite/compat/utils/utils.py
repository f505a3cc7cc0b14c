"""`kserve.utils.utils`, as far as code for models, servers and clients uses it.

Its helpers for Kubernetes are in the package `kserve`.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kserve_lite.compat.constants.constants import PredictorProtocol
from kserve_lite.compat.errors import InferenceError, InvalidInput
from kserve_lite.compat.protocol.infer_type import (
    InferOutput,
    InferRequest,
    InferResponse,
    to_http_parameters,
)
from kserve_lite.compat.utils.frames import is_frame, pandas
from kserve_lite.compat.utils.numpy_codec import from_np_dtype
from kserve_lite.dispatch.settings import cpu_limit
from kserve_lite.tensors import as_numpy, is_array

if TYPE_CHECKING:
    import numpy as np


def generate_uuid() -> str:
    """Return a random UUID as text."""
    return str(uuid.uuid4())


def get_predict_input(
    payload: dict[str, Any] | InferRequest, columns: list[str] | None = None
) -> Any:
    """Return what a request asks about: an array, a data frame or a list of str.

    Of V1's JSON, `inputs` or else `instances`: a data frame of objects, its columns as
    `columns` says, the list itself of strings, an array of all else. Of V2 the first
    input, text as a list; all of them as columns of a data frame where the parameter
    `content_type` is "pd". Raises InvalidInput for what is none of these, ImportError
    where a data frame is asked for without pandas.
    """
    if isinstance(payload, dict):
        return _of_json(payload, columns)
    if not isinstance(payload, InferRequest):
        raise _unsupported(payload)
    parameters = to_http_parameters(payload.parameters or {})
    if parameters.get("content_type") == "pd":
        return payload.as_dataframe()
    if not payload.inputs:
        raise InvalidInput("The request has no inputs.")
    first = payload.inputs[0]
    if first.datatype == "BYTES":
        data = first.data
        if isinstance(data, list) and data and isinstance(data[0], str):
            return data
    return first.as_numpy()


def _of_json(payload: dict[str, Any], columns: list[str] | None) -> Any:
    import numpy as np

    instances = payload["inputs"] if "inputs" in payload else payload.get("instances")
    if not isinstance(instances, list):
        raise InvalidInput('The request must have "instances" or "inputs", a list.')
    first = instances[0] if instances else None
    if isinstance(first, str):
        return instances
    if isinstance(first, dict) or (
        isinstance(first, list) and first and isinstance(first[0], dict)
    ):
        return _frame(instances, columns)
    try:
        return np.array(instances)
    except ValueError:
        raise InvalidInput("The rows of the request differ in length.") from None


def _frame(instances: list[Any], columns: list[str] | None) -> Any:
    pd = pandas()
    frames = []
    for instance in instances:
        # One row, of which every value is one number or word, or some rows by column.
        is_row = isinstance(instance, dict) and not any(
            isinstance(value, list) for value in instance.values()
        )
        try:
            frame = pd.DataFrame([instance] if is_row else instance, columns=columns)
        except (ValueError, TypeError, AttributeError):
            raise InvalidInput("The rows of the request make no table.") from None
        frames.append(frame)
    return pd.concat(frames, axis=0)


def get_predict_response(
    payload: dict[str, Any] | InferRequest, result: Any, model_name: str
) -> dict[str, Any] | InferResponse:
    """Return a result as the protocol of its request has it.

    result: an array (numpy's or torch's), a list or a data frame. V1: `predictions`,
    a data frame as rows by column. V2: the output "output-0", a data frame as an output
    for each column; with the request's id, or a new one. Raises InvalidInput for
    payloads of another kind, InferenceError for arrays that no datatype fits.
    """
    if isinstance(payload, dict):
        if is_frame(result):
            result = result.to_dict(orient="records")
        elif is_array(result):
            result = as_numpy(result).tolist()
        return {"predictions": result}
    if not isinstance(payload, InferRequest):
        raise _unsupported(payload)
    binary = payload.use_binary_outputs
    if is_frame(result):
        outputs = [
            _output(str(column), result[column].to_numpy(), binary)
            for column in result.columns
        ]
    else:
        outputs = [_output("output-0", _array(result), binary)]
    return InferResponse(
        payload.id or generate_uuid(),
        model_name,
        outputs,
        use_binary_outputs=binary,
        requested_outputs=payload.request_outputs,
    )


def _array(result: Any) -> np.ndarray:
    import numpy as np

    if is_array(result):
        return as_numpy(result)
    if isinstance(result, list) and result and isinstance(result[0], str):
        return np.array(result, np.object_)
    return np.array(result)


def _output(name: str, array: np.ndarray, binary: bool) -> InferOutput:
    datatype = from_np_dtype(array.dtype)
    if datatype is None:
        raise InferenceError(f"'{name}': no datatype fits an array of {array.dtype}.")
    output = InferOutput(name, list(array.shape), datatype)
    output.set_data_from_numpy(array, binary_data=binary)
    return output


def _unsupported(payload: object) -> InvalidInput:
    return InvalidInput(f"A payload cannot be a {type(payload).__name__}.")


def to_headers(context: Any) -> dict[str, str]:
    """Return the metadata of a gRPC call as headers, the last of each name.

    context: grpcio's ServicerContext.
    """
    metadata = list(context.invocation_metadata() or ())
    if hasattr(context, "trailing_metadata"):
        metadata += context.trailing_metadata() or ()
    return dict(metadata)


_STRUCTURED = ("time", "type", "source", "id", "specversion", "data")


def is_structured_cloudevent(body: Mapping[str, Any]) -> bool:
    """Whether V1's JSON is a CloudEvent with the payload inside."""
    return all(name in body for name in _STRUCTURED)


def create_response_cloudevent(
    model_name: str,
    response: Any,
    req_attributes: Mapping[str, Any],
    binary_event: bool = False,
) -> tuple[dict[str, str], bytes]:
    """Return the headers and body of an answer as a CloudEvent.

    Its type is $CE_TYPE or "io.kserve.inference.response", its source $CE_SOURCE or
    "io.kserve.inference." and the model's name; with $CE_MERGE "true" it also has the
    request's other attributes. Servers do this by themselves. Raises ImportError
    without the package cloudevents.
    """
    try:
        from cloudevents.conversion import to_binary, to_structured
        from cloudevents.http import CloudEvent
    except ImportError as error:
        raise ImportError(
            "CloudEvents need a package that is not installed: pip install cloudevents"
        ) from error
    attributes: dict[str, Any] = {}
    if os.environ.get("CE_MERGE", "").lower() == "true":
        dropped = {"id", "time", *(("datacontenttype",) if binary_event else ())}
        attributes = {k: v for k, v in req_attributes.items() if k not in dropped}
    attributes["type"] = os.environ.get("CE_TYPE", "io.kserve.inference.response")
    attributes["source"] = os.environ.get(
        "CE_SOURCE", f"io.kserve.inference.{model_name}"
    )
    write = to_binary if binary_event else to_structured
    headers, body = write(CloudEvent(attributes, response))
    return headers, body


def cpu_count() -> int:
    """How many processors this process may use: affinity and cgroup limits count."""
    return cpu_limit()


_TRUTH = {
    **dict.fromkeys(("y", "yes", "t", "true", "on", "1"), True),
    **dict.fromkeys(("n", "no", "f", "false", "off", "0"), False),
}


def strtobool(val: str) -> bool:
    """Read a flag's yes or no, in any case; raise ValueError for other words."""
    try:
        return _TRUTH[val.lower()]
    except KeyError:
        raise ValueError(f"{val!r} is neither yes nor no") from None


def is_v1(protocol: str | PredictorProtocol) -> bool:
    return _is(protocol, PredictorProtocol.REST_V1)


def is_v2(protocol: str | PredictorProtocol) -> bool:
    return _is(protocol, PredictorProtocol.REST_V2)


def _is(protocol: str | PredictorProtocol, wanted: PredictorProtocol) -> bool:
    if isinstance(protocol, str):
        return protocol.lower() == wanted.value
    return protocol is wanted
