"""What KServe v1beta1 and Knative accept, as far as a manifest of ours can go wrong.

The fields and their types are those of the models that are generated from the CRDs'
OpenAPI (packages `kserve` and `kubernetes`): `build` makes the real objects, so unknown
names, wrong types and missing fields are errors. What webhooks check beyond that is
written down in `accepted_by_knative` and `NAME`.
"""

from __future__ import annotations

import re
from typing import Any

import kserve.models
import kubernetes.client

SCALARS = {"str": str, "int": int, "bool": bool, "float": float}
# In the specifications any of these is a class that says nothing of its content.
FREE = {"object", "ResourceQuantity", "IntOrString"}
# pkg/apis/serving/v1beta1 of KServe.
NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")

# Of Knative's pkg/apis/serving: what it lets through without feature flags.
CONTAINER_FIELDS = {
    *("name", "args", "command", "env", "workingDir", "envFrom", "image"),
    *("imagePullPolicy", "livenessProbe", "ports", "readinessProbe", "resources"),
    *("securityContext", "terminationMessagePath", "terminationMessagePolicy"),
    "volumeMounts",
}
PROBE_NUMBERS = (
    *("periodSeconds", "timeoutSeconds", "successThreshold", "failureThreshold"),
)
RESERVED = {"PORT", "K_SERVICE", "K_CONFIGURATION", "K_REVISION"}
# Of KServe 0.18 and later.
BLOCKED = {"PYTHONPATH"}


def build(kind: str, value: Any, at: str = "") -> Any:
    """Make the object of a generated class; an error names the place."""
    if (inner := re.fullmatch(r"[Ll]ist\[(.*)\]", kind)) is not None:
        assert type(value) is list, at
        return [build(inner[1], item, f"{at}[{i}]") for i, item in enumerate(value)]
    if (inner := re.fullmatch(r"[Dd]ict[(\[]str, (.*)[)\]]", kind)) is not None:
        assert type(value) is dict, at
        return {key: build(inner[1], value[key], f"{at}.{key}") for key in value}
    if kind in FREE:
        return value
    if kind in SCALARS:
        assert type(value) is SCALARS[kind], f"{at} is no {kind}: {value!r}"
        return value
    made = getattr(kserve.models, kind, None) or getattr(kubernetes.client, kind)
    assert type(value) is dict, at
    names = {outer: name for name, outer in made.attribute_map.items()}
    arguments = {}
    for key, item in value.items():
        assert key in names, f"{at}.{key} is unknown to {kind}"
        field = made.openapi_types[names[key]]
        arguments[names[key]] = build(field, item, f"{at}.{key}")
    return made(**arguments)  # a required field that is missing is a ValueError


def accepted_by_knative(container: dict[str, Any]) -> None:
    """Assert what its webhook checks of the one container of a pod."""
    assert container.keys() <= CONTAINER_FIELDS
    assert re.fullmatch(r"[^\s]+", container["image"])
    (port,) = container["ports"]
    assert port["name"] in ("http1", "h2c")
    assert port["protocol"] == "TCP"
    names = {each["name"] for each in container.get("env", [])}
    assert not names & (RESERVED | BLOCKED)
    for probe in (container["readinessProbe"], container["livenessProbe"]):
        assert probe.keys() == {"httpGet", *PROBE_NUMBERS}
        assert all(probe[number] >= 1 for number in PROBE_NUMBERS)
        assert probe["httpGet"]["port"] == port["containerPort"]
    resources = container["resources"]
    # A GPU cannot be overcommitted, and a pod whose limits are its requests is evicted
    # last.
    assert resources["requests"] == resources["limits"]
