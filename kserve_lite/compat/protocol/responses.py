"""InferResponse as code for KServe's SDK sees it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kserve_lite import messages
from kserve_lite.compat.errors import InvalidInput
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
    plain_parameters,
    to_grpc_parameters,
    to_http_parameters,
)
from kserve_lite.compat.protocol.requests import RequestedOutput
from kserve_lite.compat.protocol.tensors import InferOutput, shown


class InferResponse:
    """An answer's tensors, and what goes with them.

    raw_outputs: the raw bytes of the outputs, in their order.
    use_binary_outputs: whether all outputs go raw; over REST `requested_outputs`, where
        there are some, say that of each, and which outputs go.
    """

    def __init__(  # noqa: PLR0917 - KServe's
        self,
        response_id: str | None,
        model_name: str | None,
        infer_outputs: list[InferOutput],
        model_version: str | None = None,
        raw_outputs: Any = None,
        from_grpc: bool | None = False,
        parameters: Mapping[str, Any] | None = None,
        use_binary_outputs: bool | None = False,
        requested_outputs: list[RequestedOutput] | None = None,
    ) -> None:
        self.id = response_id
        self.model_name = model_name
        self.model_version = model_version
        self.outputs = infer_outputs
        self.parameters: Any = parameters
        # On the class it is what makes an answer of a message; KServe has both.
        self.from_grpc = from_grpc  # type: ignore[method-assign,assignment]
        self._use_binary_outputs = bool(use_binary_outputs)
        self._requested_outputs = requested_outputs
        for infer_output, raw in zip(infer_outputs, raw_outputs or (), strict=False):
            infer_output.set_raw(raw)

    @classmethod
    def from_native(
        cls, native: messages.InferResponse, *, from_grpc: bool = False
    ) -> InferResponse:
        """Wrap an answer that was received; its arrays are shared."""
        return cls(
            native.id,
            native.model_name,
            [
                InferOutput.from_native(tensor, from_grpc=from_grpc)
                for tensor in native.outputs
            ],
            native.model_version or ("" if from_grpc else None),
            from_grpc=from_grpc,
            parameters=dict(native.parameters) or None,
        )

    def to_native(self) -> messages.InferResponse:
        """Return the answer as servers have it.

        With the outputs that `requested_outputs` say; what goes binary is the client's
        to say. Raises ValueError, TypeError or InferenceError, in words for the author
        of the model, for outputs that cannot be, InvalidInput for a requested output
        that is not there.
        """
        return messages.InferResponse(
            tuple(output.to_native() for output, _ in self._asked()),
            id=self.id if isinstance(self.id, str) else None,
            model_name=self.model_name,
            model_version=self.model_version or None,
            parameters=plain_parameters(self.parameters),
        )

    def _asked(self) -> list[tuple[InferOutput, bool]]:
        """The outputs that go over REST, each with whether it goes raw."""
        if not self._requested_outputs:
            return [(output, self._use_binary_outputs) for output in self.outputs]
        asked = []
        for requested in self._requested_outputs:
            output = self.get_output_by_name(requested.name)
            if output is None:
                raise InvalidInput(
                    f"Unexpected inference output '{requested.name}' for model "
                    f"'{self.model_name}'"
                )
            asked.append((output, bool(requested.binary_data)))
        return asked

    @classmethod
    def from_grpc(cls, response: Any) -> InferResponse:
        """Make an answer of a ModelInferResponse, of whatever descriptor pool."""
        return cls(
            response.id,
            response.model_name,
            [
                of_message(InferOutput, tensor, tensor.parameters)
                for tensor in response.outputs
            ],
            response.model_version,
            response.raw_output_contents,
            True,
            response.parameters,
        )

    @classmethod
    def from_rest(cls, response: Mapping[str, Any]) -> InferResponse:
        """Make an answer of REST's JSON; raise InvalidInput where it is malformed."""
        return cls._of_document(response, None)

    @classmethod
    def from_bytes(cls, res_bytes: bytes, json_length: int) -> InferResponse:
        """Read a REST body of which `json_length` bytes are JSON, the rest tensors.

        Raises InvalidInput where it is malformed.
        """
        return cls._of_document(*document_of(res_bytes, json_length))

    @classmethod
    def _of_document(
        cls, document: Mapping[str, Any], binary: Attached | None
    ) -> InferResponse:
        return cls(
            member(document, "id", None),
            member(document, "model_name", None),
            [
                of_document(InferOutput, entry, binary, None)
                for entry in entries_of(document, "outputs")
            ],
            member(document, "model_version", None),
            parameters=member(document, "parameters", None),
        )

    def to_rest(self) -> tuple[dict[str, Any] | bytes, int | None]:
        """Return the REST body: a dict and None, or bytes and how many are JSON.

        See `to_native` for what it raises.
        """
        document: dict[str, Any] = {
            "id": self.id,
            "model_name": self.model_name,
            "model_version": self.model_version,
            "outputs": [],
        }
        if self.parameters:
            document["parameters"] = to_http_parameters(self.parameters)
        sent = []
        for output, raw in self._asked():
            tensor = output.to_native()
            sent.append(Sent(tensor, None if raw else flat_list(tensor)))
        return rest_of(document, "outputs", sent)

    def to_grpc(self) -> Any:
        """Return a ModelInferResponse with all outputs; see `to_native`.

        They go raw if `use_binary_outputs` says so or one has to: an array, raw bytes,
        FP16 and BF16.
        """
        from kserve_lite.compat.protocol.grpc.grpc_predict_v2_pb2 import (
            ModelInferResponse,
        )

        message = ModelInferResponse(
            model_name=self.model_name,
            model_version=self.model_version,
            id=self.id,
            parameters=to_grpc_parameters(self.parameters or {}),
        )
        tensors = [output.to_native() for output in self.outputs]
        raw = self._use_binary_outputs or any(
            output.is_raw or output.is_array for output in self.outputs
        )
        write_tensors(message.outputs, message.raw_output_contents, tensors, raw=raw)
        return message

    def get_output_by_name(self, name: str) -> InferOutput | None:
        return next((entry for entry in self.outputs if entry.name == name), None)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, InferResponse)
            and self.model_name == other.model_name
            and self.model_version == other.model_version
            and self.id == other.id
            and self.from_grpc == other.from_grpc
            and self.parameters == other.parameters
            and self.outputs == other.outputs
        )

    __hash__ = None  # type: ignore[assignment]

    def _members(self, outputs: list[Any]) -> dict[str, Any]:
        return {
            "id": self.id,
            "model_name": self.model_name,
            "outputs": outputs,
            "parameters": self.parameters,
            "from_grpc": self.from_grpc,
        }

    def to_dict(self) -> dict[str, Any]:
        return self._members([output.to_dict() for output in self.outputs])

    def __repr__(self) -> str:
        return shown(self._members(self.outputs))
