"""The JSON Schemas (2020-12) of every body of the REST API, for `openapi.py`.

The rows of `routes.ROUTES` name them. They follow the Open Inference Protocol
(github.com/kserve/open-inference-protocol), the extensions of Triton Inference Server
for statistics, model configuration, repository and generate, and KServe's V1. They
describe, and nothing here checks a request: the codecs do, and they take a little more,
datatypes in lower case say.
"""

from __future__ import annotations

from typing import Any

from kserve_lite.tensors import DATATYPES

Schema = dict[str, Any]


def reference(name: str) -> Schema:
    """A reference to the component schema `name`."""
    return {"$ref": f"#/components/schemas/{name}"}


def _object(*required: str, **properties: Schema) -> Schema:
    schema: Schema = {"type": "object"}
    if required:
        schema["required"] = list(required)
    if properties:
        schema["properties"] = properties
    return schema


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _said(description: str, schema: Schema) -> Schema:
    return {"description": description, **schema}


_TEXT: Schema = {"type": "string"}
_FLAG: Schema = {"type": "boolean"}
_TRUE: Schema = {"const": True}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_SHAPE = _list(_COUNT)
_DECLARED_SHAPE = _said(
    "-1 stands for any size.", _list({"type": "integer", "minimum": -1})
)
_ID = _said("The client's own; the answer repeats it.", _TEXT)
_PARAMETERS = reference("Parameters")
_PARTS = ("compute_input", "compute_infer", "compute_output")

_ASKED_OF_THE_SERVER: dict[str, Schema] = {
    "Error": _object("error", error=_said("What went wrong.", _TEXT)),
    "OpenApi": _said("A document such as this one.", _object("openapi")),
    "Metrics": _said("Prometheus text; OpenMetrics where that is accepted.", _TEXT),
    "Alive": _object("status", status={"const": "alive"}),
    "Live": _object("live", live=_TRUE),
    "Ready": _object("ready", ready=_TRUE),
    "ServerMetadata": _object(
        "name",
        "version",
        "extensions",
        name=_TEXT,
        version=_TEXT,
        extensions=_said("Extensions of the protocol that are served.", _list(_TEXT)),
    ),
    "ModelNames": _object("models", models=_list(_TEXT)),
}

_ASKED_OF_A_MODEL: dict[str, Schema] = {
    "ModelReady": _object("name", "ready", name=_TEXT, ready=_TRUE),
    "ModelMetadata": _object(
        "name",
        "platform",
        "inputs",
        "outputs",
        name=_TEXT,
        versions=_said("Oldest first; empty without versions.", _list(_TEXT)),
        platform=_TEXT,
        inputs=_list(reference("TensorMetadata")),
        outputs=_list(reference("TensorMetadata")),
    ),
    "TensorMetadata": _object(
        "name",
        "datatype",
        "shape",
        name=_TEXT,
        datatype=reference("Datatype"),
        shape=_DECLARED_SHAPE,
    ),
    "Datatype": {"enum": list(DATATYPES)},
    "ModelConfig": _object(
        "name",
        "platform",
        "backend",
        "max_batch_size",
        "input",
        "output",
        name=_TEXT,
        platform=_TEXT,
        backend=_TEXT,
        max_batch_size=_COUNT,
        input=_list(reference("TensorConfig")),
        output=_list(reference("TensorConfig")),
        dynamic_batching=_said(
            "Rows of several requests are put together.",
            _object(
                "max_queue_delay_microseconds", max_queue_delay_microseconds=_COUNT
            ),
        ),
        model_transaction_policy=_object(
            "decoupled",
            decoupled=_said("Whether a request may have several answers.", _FLAG),
        ),
    ),
    "TensorConfig": _object(
        "name",
        "data_type",
        "dims",
        name=_TEXT,
        data_type={
            "enum": [f"TYPE_{'STRING' if n == 'BYTES' else n}" for n in DATATYPES]
        },
        dims=_DECLARED_SHAPE,
        optional=_FLAG,
    ),
    "Statistics": _object(
        "model_stats", model_stats=_list(reference("ModelStatistics"))
    ),
    "ModelStatistics": _object(
        "name",
        "version",
        "last_inference",
        "inference_count",
        "execution_count",
        "inference_stats",
        "batch_stats",
        name=_TEXT,
        version=_TEXT,
        last_inference=_said("In ms since 1970; 0: none yet.", _COUNT),
        inference_count=_COUNT,
        execution_count=_COUNT,
        inference_stats=_object(
            "success",
            "fail",
            "queue",
            *_PARTS,
            **dict.fromkeys(
                ("success", "fail", "queue", *_PARTS, "cache_hit", "cache_miss"),
                reference("Duration"),
            ),
        ),
        batch_stats=_list(
            _object(
                "batch_size",
                *_PARTS,
                batch_size=_COUNT,
                **dict.fromkeys(_PARTS, reference("Duration")),
            )
        ),
    ),
    "Duration": _said(
        "How often, and how many nanoseconds in all.",
        _object("count", "ns", count=_COUNT, ns=_COUNT),
    ),
}

_PREDICTION: dict[str, Schema] = {
    "V1Request": {
        "description": (
            "Rows (instances) or columns (inputs) for a model that takes tensors; any "
            "JSON for one that takes JSON."
        ),
        "properties": {"instances": {"type": "array"}, "inputs": {}},
    },
    "V1Answer": {
        "description": "What the model answers; of tensors, their rows.",
        "properties": {"predictions": {}, "explanations": {}},
    },
    "InferRequest": _object(
        "inputs",
        id=_ID,
        parameters=_PARAMETERS,
        inputs=_list(reference("InferInput")),
        outputs=_said(
            "The outputs that are wanted, in order; none: every one.",
            _list(_object("name", name=_TEXT, parameters=_PARAMETERS)),
        ),
    ),
    "InferInput": _said(
        "With data, or, where its bytes follow the JSON, with binary_data_size among "
        "its parameters.",
        _object(
            "name",
            "shape",
            "datatype",
            name=_TEXT,
            shape=_SHAPE,
            datatype=reference("Datatype"),
            parameters=_PARAMETERS,
            data=_said("In row-major order, flat or nested.", _list({})),
        ),
    ),
    "InferResponse": _object(
        "model_name",
        "outputs",
        model_name=_TEXT,
        model_version=_TEXT,
        id=_TEXT,
        parameters=_PARAMETERS,
        outputs=_list(reference("InferOutput")),
    ),
    "InferOutput": _said(
        "With data, or, where its bytes follow the JSON, with binary_data_size among "
        "its parameters.",
        _object(
            "name",
            "shape",
            "datatype",
            name=_TEXT,
            shape=_SHAPE,
            datatype=reference("Datatype"),
            parameters=_PARAMETERS,
            data=_said("In row-major order.", _list({})),
        ),
    ),
    "Parameters": {
        "type": "object",
        "additionalProperties": {"type": ["string", "number", "boolean"]},
    },
    "GenerateRequest": _said(
        "A member for each input, by its name.",
        _object(id=_ID, parameters={"type": "object"}),
    ),
    "GenerateResponse": _said(
        "A member for each output, by its name, and these.",
        _object("model_name", model_name=_TEXT, model_version=_TEXT, id=_TEXT),
    ),
}

_REPOSITORY: dict[str, Schema] = {
    "IndexRequest": _object(ready=_said("Only models that are ready.", _FLAG)),
    "Index": _list(
        _object(
            "name",
            "state",
            name=_TEXT,
            version=_TEXT,
            state={"enum": ["UNKNOWN", "READY", "UNAVAILABLE", "LOADING", "UNLOADING"]},
            reason=_said("Why it is not ready.", _TEXT),
        )
    ),
    "ModelLoad": _object("name", "load", name=_TEXT, load=_TRUE),
    "ModelUnload": _object("name", "unload", name=_TEXT, unload=_TRUE),
}

SCHEMAS: dict[str, Schema] = (
    _ASKED_OF_THE_SERVER | _ASKED_OF_A_MODEL | _PREDICTION | _REPOSITORY
)
