"""InferRequest and RequestedOutput as code for KServe's SDK sees them."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from functools import partial
from typing import Any

from kserve_lite import messages
from kserve_lite.codecs.json_tensors import loads
from kserve_lite.compat.protocol.byte_tensors import decoded
from kserve_lite.compat.protocol.documents import (
    Attached,
    Sent,
    document_of,
    entries_of,
    flat_list,
    member,
    of_document,
    of_message,
    rest_of,
    write_tensors,
)
from kserve_lite.compat.protocol.parameters import (
    message_map,
    plain_parameters,
    to_grpc_parameters,
    to_http_parameters,
)
from kserve_lite.compat.protocol.tensors import InferInput, shown
from kserve_lite.compat.utils.frames import pandas


class RequestedOutput:
    """An output that the client asks for by name."""

    def __init__(self, name: str, parameters: Mapping[str, Any] | None = None) -> None:
        self._name = name
        self.parameters: Any = parameters

    @property
    def name(self) -> str:
        return self._name

    @property
    def binary_data(self) -> bool | None:
        """Whether the client wants it as raw bytes; None: it does not say."""
        return to_http_parameters(self.parameters or {}).get("binary_data")

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, RequestedOutput)
            and self._name == other._name
            and self.parameters == other.parameters
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"RequestedOutput(name={self._name}, parameters={self.parameters})"


class InferRequest:
    """A request's tensors, and what came with them.

    raw_inputs: the raw bytes of the inputs, in their order.
    from_grpc: whether it came over gRPC; its `parameters` are then InferParameter
        messages, those of inputs and outputs plain values, as in KServe's SDK.
    request_outputs: what the client asks for; None: every output.
    """

    def __init__(  # noqa: PLR0917 - KServe's
        self,
        model_name: str,
        infer_inputs: list[InferInput],
        request_id: str | None = None,
        raw_inputs: Any = None,
        from_grpc: bool | None = False,
        parameters: Mapping[str, Any] | None = None,
        request_outputs: list[RequestedOutput] | None = None,
        model_version: str | None = None,
    ) -> None:
        self.id = request_id
        self.model_name = model_name
        self.inputs = infer_inputs
        self.parameters: Any = parameters
        # On the class it is what makes a request of a message; KServe has both.
        self.from_grpc = from_grpc  # type: ignore[method-assign,assignment]
        self.request_outputs = request_outputs
        self.model_version = model_version
        self._use_raw_outputs = bool(raw_inputs)
        for infer_input, raw in zip(infer_inputs, raw_inputs or (), strict=False):
            infer_input.set_raw(raw)

    @property
    def use_binary_outputs(self) -> bool:
        """Whether the answer's tensors go raw: over gRPC if the request's did.

        Over REST if the parameter `binary_data_output` says so.
        """
        if vars(self)["from_grpc"]:
            return self._use_raw_outputs
        return bool((self.parameters or {}).get("binary_data_output", False))

    @classmethod
    def from_native(
        cls,
        native: messages.InferRequest,
        *,
        from_grpc: bool = False,
        raw: bool = False,
    ) -> InferRequest:
        """Wrap a request as a server has it; its arrays are shared.

        raw: whether its tensors came as `raw_input_contents`. Of one that came as JSON
        `data` is what was sent: numbers as they were written, flat or nested.
        """
        empty: dict[str, Any] | None = None if from_grpc else {}
        outputs = [
            RequestedOutput(output.name, dict(output.parameters) or empty)
            for output in native.outputs
        ]
        document = None if native.document is None else _Document(native.document)
        parameters: Any = dict(native.parameters) or None
        if from_grpc:
            parameters = message_map(native.parameters)
        made = cls(
            native.model_name,
            [
                InferInput.from_native(
                    tensor,
                    from_grpc=from_grpc,
                    raw=raw,
                    as_sent=partial(document.data, index) if document else None,
                )
                for index, tensor in enumerate(native.inputs)
            ],
            native.id or ("" if from_grpc else None),
            from_grpc=from_grpc,
            parameters=parameters,
            request_outputs=outputs or None,
            model_version=native.model_version or ("" if from_grpc else None),
        )
        made._use_raw_outputs = raw
        return made

    def to_native(self) -> messages.InferRequest:
        """Return the request as servers have it; raise InvalidInput for bad data."""
        return messages.InferRequest(
            self.model_name,
            tuple(infer_input.to_native() for infer_input in self.inputs),
            id=self.id or None,
            model_version=self.model_version or None,
            parameters=plain_parameters(self.parameters),
            outputs=tuple(
                messages.RequestedOutput(
                    output.name, to_http_parameters(output.parameters or {})
                )
                for output in self.request_outputs or ()
            ),
        )

    @classmethod
    def from_grpc(cls, request: Any) -> InferRequest:
        """Make a request of a ModelInferRequest, of whatever descriptor pool."""
        outputs = [
            RequestedOutput(output.name, to_http_parameters(output.parameters) or None)
            for output in request.outputs
        ]
        return cls(
            request.model_name,
            [
                of_message(
                    InferInput, tensor, to_http_parameters(tensor.parameters) or None
                )
                for tensor in request.inputs
            ],
            request.id,
            request.raw_input_contents,
            True,
            request.parameters,
            outputs or None,
            request.model_version,
        )

    @classmethod
    def from_bytes(
        cls, req_bytes: bytes, json_length: int, model_name: str
    ) -> InferRequest:
        """Read a REST body of which `json_length` bytes are JSON, the rest tensors.

        Raises InvalidInput where it is malformed.
        """
        document, binary = document_of(req_bytes, json_length)
        return cls._of_document(document, model_name, binary, None)

    @classmethod
    def from_inference_request(cls, request: Any, model_name: str) -> InferRequest:
        """Make a request of REST's JSON, as a dict or as an object with its members.

        Raises InvalidInput where it is malformed.
        """
        return cls._of_document(request, model_name, None, {})

    @classmethod
    def _of_document(
        cls, node: Any, model_name: str, binary: Attached | None, default: Any
    ) -> InferRequest:
        outputs = [
            RequestedOutput(
                str(member(output, "name")), member(output, "parameters", default)
            )
            for output in entries_of(node, "outputs", [])
        ]
        return cls(
            model_name,
            [
                of_document(InferInput, entry, binary, default)
                for entry in entries_of(node, "inputs")
            ],
            member(node, "id", None),
            parameters=member(node, "parameters", None),
            request_outputs=outputs or None,
        )

    def to_rest(self) -> tuple[dict[str, Any] | bytes, int | None]:
        """Return the REST body: a dict and None, or bytes and how many are JSON.

        Bytes where a tensor is raw. A request without id gets one. Raises InvalidInput
        for an input without data, or whose data do not fit it.
        """
        document: dict[str, Any] = {
            "id": self.id or str(uuid.uuid4()),
            "model_name": self.model_name,
            "inputs": [],
        }
        if self.request_outputs:
            document["outputs"] = list(map(_requested, self.request_outputs))
        if self.parameters:
            document["parameters"] = to_http_parameters(self.parameters)
        return rest_of(document, "inputs", map(_sent, self.inputs))

    def to_grpc(self) -> Any:
        """Return a ModelInferRequest; its tensors go raw if one has to, see to_rest."""
        from kserve_lite.compat.protocol.grpc.grpc_predict_v2_pb2 import (
            ModelInferRequest,
        )

        message = ModelInferRequest(
            model_name=self.model_name,
            model_version=self.model_version,
            id=self.id,
            parameters=to_grpc_parameters(self.parameters or {}),
        )
        for output in self.request_outputs or ():
            parameters = to_grpc_parameters(output.parameters or {})
            message.outputs.add(name=output.name, parameters=parameters)
        tensors = [infer_input.to_native() for infer_input in self.inputs]
        raw = any(entry.is_raw or entry.is_array for entry in self.inputs)
        write_tensors(message.inputs, message.raw_input_contents, tensors, raw=raw)
        return message

    def as_dataframe(self) -> Any:
        """Return the inputs as columns, their elements as rows; BYTES as text.

        Raises ImportError without pandas.
        """
        pd = pandas()
        columns = []
        for infer_input in self.inputs:
            values = infer_input.to_native().array.reshape(-1).tolist()
            if infer_input.datatype == "BYTES":
                values = list(map(decoded, values))
            columns.append(pd.DataFrame(values, columns=[infer_input.name]))
        return pd.concat(columns, axis=1) if columns else pd.DataFrame()

    def get_input_by_name(self, name: str) -> InferInput | None:
        return next((entry for entry in self.inputs if entry.name == name), None)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, InferRequest)
            and self.model_name == other.model_name
            and self.id == other.id
            and self.from_grpc == other.from_grpc
            and self.parameters == other.parameters
            and self.inputs == other.inputs
            and self.request_outputs == other.request_outputs
        )

    __hash__ = None  # type: ignore[assignment]

    def _members(self, inputs: list[Any]) -> dict[str, Any]:
        return {
            "id": self.id,
            "model_name": self.model_name,
            "inputs": inputs,
            "parameters": self.parameters,
            "from_grpc": self.from_grpc,
        }

    def to_dict(self) -> dict[str, Any]:
        return self._members([infer_input.to_dict() for infer_input in self.inputs])

    def __repr__(self) -> str:
        return shown(self._members(self.inputs))


def _requested(output: RequestedOutput) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": output.name}
    if output.parameters:
        entry["parameters"] = to_http_parameters(output.parameters)
    return entry


class _Document:
    """A request's JSON, read again only for a model that looks at `data`."""

    __slots__ = ("_body", "_inputs")

    def __init__(self, body: bytes | bytearray | memoryview) -> None:
        self._body = body
        self._inputs: list[dict[str, Any]] | None = None

    def data(self, index: int) -> Any:
        """The data of an input as they were sent; None where they came as bytes."""
        if self._inputs is None:
            self._inputs = loads(self._body)["inputs"]
        return self._inputs[index].get("data")

    def __reduce__(self) -> Any:
        """Models copy requests, and send them to other processes; no view can go."""
        return _Document, (bytes(self._body),)


def _sent(infer_input: InferInput) -> Sent:
    tensor = infer_input.to_native()
    if infer_input.is_raw:
        return Sent(tensor, None)
    given = infer_input.as_given
    return Sent(tensor, flat_list(tensor) if given is None else given)
