"""What the server and its models are, in the words of V2, for REST and gRPC alike.

Each document is plain JSON; it is also what protobuf's JSON mapping makes of the
message of the same name, so gRPC writes it by that mapping. The Open Inference
Protocol's metadata, and of Triton's extensions the model configuration, as far as its
clients read it.
"""

from __future__ import annotations

from typing import Any

from kserve_lite.dispatch.dataplane import DataPlane
from kserve_lite.handlers import AUTO, Call, Stage
from kserve_lite.model import Model
from kserve_lite.tensors import TensorSpec
from kserve_lite.version import __version__

# As Triton names them, and the last as KServe's SDK does.
EXTENSIONS = (
    "binary_tensor_data",
    "generate",
    "model_configuration",
    "model_repository",
    "parameters",
    "statistics",
    "model_repository_extension",
)


def server_metadata() -> dict[str, Any]:
    return {
        "name": "kserve-lite",
        "version": __version__,
        "extensions": list(EXTENSIONS),
    }


def model_metadata(model: Model, versions: list[str]) -> dict[str, Any]:
    """A model's inputs and outputs. versions: those of its name, oldest first."""
    return {
        "name": model.name,
        "versions": versions,
        "platform": "python",
        "inputs": [_tensor(spec) for spec in model.inputs],
        "outputs": [_tensor(spec) for spec in model.outputs],
    }


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}


def statistics(
    dataplane: DataPlane, name: str | None = None, version: str | None = None
) -> dict[str, Any]:
    """What models have done so far. name: None for all; version: None for all of it.

    Raises ModelNotFound.
    """
    if name is not None:
        named = dataplane.get(name, version)
    models = [
        model
        for known in ([name] if name is not None else dataplane.names())
        for model in dataplane.registry.of_name(known)
    ]
    if version is not None:
        models = [named]
    return {
        "model_stats": [dataplane.statistics_of(model).document() for model in models]
    }


# What `max_batch_size` says where rows may come in any number: the largest int32.
ANY_NUMBER = 2**31 - 1


def model_config(model: Model) -> dict[str, Any]:
    """Triton's model configuration, as far as its clients read it.

    A model whose declared inputs and outputs all have rows, a first dimension of -1
    and others behind it, is said to batch; the dimensions of such a one are given
    without the first, as Triton does.
    """
    plan = model.plan(Stage.PREDICT)
    tensors = (*model.inputs, *model.outputs)
    has_rows = bool(model.inputs and model.outputs) and all(
        len(spec.shape) > 1 and spec.shape[0] == -1 for spec in tensors
    )
    batching = next((h.batching for h in plan if h.batching is not None), None)
    most = ANY_NUMBER if batching is None else batching.max_batch_size
    config = {
        "name": model.name,
        "platform": "",
        "backend": "python",
        "max_batch_size": most if has_rows else 0,
        "input": [
            {**_configured(spec, has_rows), "optional": spec.optional}
            for spec in model.inputs
        ],
        "output": [_configured(spec, has_rows) for spec in model.outputs],
        # Whether a request may get several answers.
        "model_transaction_policy": {"decoupled": plan[-1].call is Call.GENERATOR},
    }
    if batching is not None:
        delay = batching.max_delay_ms
        known = 0 if delay == AUTO else int(float(delay) * 1000)
        config["dynamic_batching"] = {"max_queue_delay_microseconds": known}
    return config


def _configured(spec: TensorSpec, has_rows: bool) -> dict[str, Any]:
    word = "STRING" if spec.datatype == "BYTES" else spec.datatype
    return {
        "name": spec.name,
        "data_type": f"TYPE_{word}",
        "dims": list(spec.shape[1:] if has_rows else spec.shape),
    }
