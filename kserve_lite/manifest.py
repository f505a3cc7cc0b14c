"""What `kubectl apply` wants of a model, as YAML.

Models and flags in, Kubernetes objects out: an InferenceService (v1beta1), and with
`--runtime` the ServingRuntime (v1alpha1) that it uses. What their fields must be is
what KServe's webhooks and Knative's validation accept: one container port, probes
without a startup probe, no PORT in the environment. No cluster is asked.

YAML is written by a few lines of this file: what is needed of it is small, and PyYAML
would be a dependency of every server for the sake of one command.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kserve_lite.deployment import PORT, Deployment, is_for_transformer
from kserve_lite.errors import SettingsError
from kserve_lite.handlers import Stage
from kserve_lite.model import Model
from kserve_lite.server.settings import make_settings

CONTAINER = "kserve-container"  # KServe looks for this name
MODEL_FORMAT = "kserve-lite"
LAUNCHER = "/cnb/lifecycle/launcher"  # what sets PATH in an image of a buildpack
# Kubernetes kills 30 s after it asked, and then unloading should be done, too.
GRACE_PERIOD = {"grace_period": "25"}

# RFC 1123 labels have 63; "-transformer" is the longest of what KServe adds.
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,49}[a-z0-9])?")
# Path, period, timeout (seconds), failures. Knative wants each 1 or more; older ones
# know no startup probe; `live` answers before a model is loaded, but not before its
# module is imported, so that may take a minute.
_PROBES = {
    "readinessProbe": ("/v2/health/ready", 5, 5, 3),
    "livenessProbe": ("/v2/health/live", 10, 5, 6),
}


def manifests(
    targets: Sequence[str],
    models: Sequence[Model],
    transformers: Sequence[Model],
    deployment: Deployment,
    *,
    flags: Mapping[str, str],
) -> list[dict[str, Any]]:
    """The Kubernetes objects that serve models, to be applied in this order.

    targets: what `kserve-lite run` imports. models: what that gives. transformers: what
    `deployment.transformer` gives. flags: the server's, by name.

    Raises SettingsError for models that cannot be deployed so.
    """
    name = _service_name(models, transformers, deployment)
    passed = {n: text for n, text in flags.items() if not is_for_transformer(n)}
    workers = make_settings(flags=passed).server.workers
    named = {"model_name": name} if len(models) == 1 else {}
    container = _container(
        deployment,
        targets,
        named | GRACE_PERIOD | passed,
        workers=workers,
        gpu=deployment.gpu,
    )
    predictor = _replicas(deployment)
    objects = []
    if deployment.runtime:
        # KServe puts the InferenceService's name there.
        container["args"][:2] = ["--model_name", "{{.Name}}"]
        spec = {
            "supportedModelFormats": [{"name": MODEL_FORMAT}],
            "protocolVersions": ["v1", "v2", "grpc-v2"],
            "containers": [container],
        }
        where = _metadata(deployment.runtime, deployment)
        objects.append(_object("v1alpha1", "ServingRuntime", where, spec))
        predictor["model"] = {
            "modelFormat": {"name": MODEL_FORMAT},
            "runtime": deployment.runtime,
        }
        if deployment.grpc:
            predictor["model"]["protocolVersion"] = "grpc-v2"
        if deployment.storage_uri:
            predictor["model"]["storageUri"] = deployment.storage_uri
        # KServe's defaults would beat those of the runtime.
        predictor["model"]["resources"] = container["resources"]
    else:
        if deployment.storage_uri:
            # KServe's webhook fills /mnt/models, and has the variable say so.
            container["env"] = [
                {"name": "STORAGE_URI", "value": deployment.storage_uri}
            ]
        predictor["containers"] = [container]
    spec = {"predictor": predictor}
    if deployment.transformer:
        front = {"model_name": name} | GRACE_PERIOD
        if deployment.grpc:
            front["predictor_protocol"] = "grpc-v2"
        front |= {n: text for n, text in flags.items() if is_for_transformer(n)}
        image = deployment.transformer_image or deployment.image
        spec["transformer"] = _replicas(deployment) | {
            "containers": [
                _container(
                    dataclasses.replace(deployment, image=image),
                    [deployment.transformer],
                    front,
                )
            ]
        }
    where = _metadata(name, deployment)
    return [*objects, _object("v1beta1", "InferenceService", where, spec)]


def _service_name(
    models: Sequence[Model], transformers: Sequence[Model], deployment: Deployment
) -> str:
    for model in models:
        if model.handler(Stage.PREDICT) is None:
            raise SettingsError(
                f"model {model.name!r} has no predict handler, so it is no predictor: "
                "if it transforms for another, give it as --transformer"
            )
    if deployment.transformer:
        if len(transformers) != 1 or len(models) != 1:
            raise SettingsError(
                "--transformer is one model before one other: give module:name for both"
            )
        if transformers[0].handler(Stage.PREDICT) is not None:
            raise SettingsError(
                f"{deployment.transformer} has a predict handler, so it would not ask "
                "the predictor: remove that, or leave --transformer out"
            )
    if deployment.runtime and len(models) != 1:
        raise SettingsError("--runtime serves one model a pod: give module:name")
    if not deployment.name and len(models) != 1:
        raise SettingsError(
            f"{len(models)} models have no one name: give --name for the "
            "InferenceService, or module:name for one of them"
        )
    name = deployment.name or models[0].name
    if not _NAME.fullmatch(name):
        close = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-0123456789")[:51]
        raise SettingsError(
            f"an InferenceService cannot be named {name!r}: at most 51 small letters, "
            f"digits and -, a letter first; give --name {close.strip('-') or 'model'}"
        )
    return name


def _container(
    deployment: Deployment,
    targets: Sequence[str],
    flags: Mapping[str, str],
    *,
    workers: int = 1,
    gpu: int = 0,
) -> dict[str, Any]:
    # "--" has the launcher start what follows without a shell.
    launcher = [LAUNCHER, "--"] if deployment.buildpack else []
    amounts = {
        "cpu": deployment.cpu or str(workers),
        "memory": deployment.memory or f"{2 * workers}Gi",
    }
    if gpu:
        amounts["nvidia.com/gpu"] = str(gpu)
    # Named, since "" is http1 in Knative and nothing in a plain Service.
    port = "h2c" if deployment.grpc else "http1"
    return {
        "name": CONTAINER,
        "image": deployment.image,
        "command": [*launcher, "kserve-lite", "run", *targets],
        "args": [word for n, text in flags.items() for word in (f"--{n}", text)],
        "ports": [{"containerPort": PORT, "name": port, "protocol": "TCP"}],
        **{
            probe: {
                "httpGet": {"path": path, "port": PORT},
                "periodSeconds": period,
                "timeoutSeconds": timeout,
                "successThreshold": 1,
                "failureThreshold": failures,
            }
            for probe, (path, period, timeout, failures) in _PROBES.items()
        },
        "resources": {"requests": amounts, "limits": amounts},
    }


def _replicas(deployment: Deployment) -> dict[str, Any]:
    most = deployment.max_replicas
    return {"minReplicas": deployment.min_replicas} | (
        {"maxReplicas": most} if most else {}
    )


def _metadata(name: str, deployment: Deployment) -> dict[str, Any]:
    namespace = deployment.namespace
    return {"name": name} | ({"namespace": namespace} if namespace else {})


def _object(
    version: str, kind: str, metadata: dict[str, Any], spec: dict[str, Any]
) -> dict[str, Any]:
    return {
        "apiVersion": f"serving.kserve.io/{version}",
        "kind": kind,
        "metadata": metadata,
        "spec": spec,
    }


def to_yaml(documents: Sequence[Mapping[str, Any]]) -> str:
    """Documents of dicts, lists, text, whole numbers and bools as YAML 1.1 and 1.2."""
    texts = ("".join(f"{line}\n" for line in _lines(each)) for each in documents)
    return "---\n".join(texts)


# What no YAML takes for a number, a bool, null or syntax; all else is quoted as JSON,
# which YAML reads, with what it calls unprintable escaped too.
_PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9_./-]*(:[A-Za-z0-9_./-]+)*")
_WORDS = frozenset(("y", "n", "yes", "no", "on", "off", "true", "false", "null"))


def _lines(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _entry(f"{_scalar(key)}:", item)
    elif isinstance(value, list) and value:
        for item in value:
            first, *others = _lines(item)
            yield f"- {first}"
            yield from (f"  {line}" for line in others)
    else:
        yield _scalar(value)


def _entry(key: str, item: Any) -> Iterator[str]:
    if isinstance(item, (Mapping, list)) and item:
        yield key
        yield from (f"  {line}" for line in _lines(item))
    else:
        yield f"{key} {_scalar(item)}"


def _scalar(value: Any) -> str:
    if (
        isinstance(value, str)
        and _PLAIN.fullmatch(value)
        and value.lower() not in _WORDS
    ):
        return value
    quoted = json.dumps(value, ensure_ascii=False)
    return re.sub(r"[\x7f-\x9f\u2028\u2029\ufeff]", _escape, quoted)


def _escape(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"
