"""The flags of `kserve-lite manifest`: how a model is deployed, read and checked.

Flags of `kserve-lite run` are taken too, for the container's arguments, so that what is
wrong with them is said here and not by a pod that does not start. Nothing is imported,
started or asked; what comes of the flags is `manifest.py`.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass

from kserve_lite.errors import SettingsError
from kserve_lite.server.settings import known_settings, make_settings, parse_flags
from kserve_lite.server.values import SWITCHES, convert

PORT = 8080  # KServe gives transformers --http_port 8080, so predictors have it too


@dataclass(frozen=True, slots=True)
class Deployment:
    """How a model is deployed: the flags of `kserve-lite manifest`.

    image: the image with the program, as `docker push` takes it. Needed.
    name: of the InferenceService, and so of the model in its URLs. Default: the
        model's name.
    namespace: where it goes. Default: where kubectl is.
    storage_uri: the model's files, which KServe mounts at /mnt/models: s3://, gs://,
        pvc://, https:// and what else the cluster's storage initializer knows.
    grpc: have gRPC reach the container: its port is named h2c. REST reaches it too.
    transformer: module:name of a model without predict, which becomes the transformer
        in front; KServe tells it where the predictor is.
    transformer_image: the transformer's image. Default: the same.
    runtime: the name of a ServingRuntime to write too, for several InferenceServices
        that differ in name and storage_uri only.
    buildpack: the image was made by a buildpack: commands go through its launcher.
    min_replicas: pods at least; 0 lets Knative scale to zero.
    max_replicas: pods at most; 0: as KServe is configured.
    cpu: of each pod, as Kubernetes says it: 2 or 500m. Default: 1 a worker.
    memory: of each pod: 512Mi or 4Gi. Default: 2Gi a worker.
    gpu: NVIDIA GPUs of each predictor pod.
    """

    image: str = ""
    name: str = ""
    namespace: str = ""
    storage_uri: str = ""
    grpc: bool = False
    transformer: str = ""
    transformer_image: str = ""
    runtime: str = ""
    buildpack: bool = False
    min_replicas: int = 1
    max_replicas: int = 0
    cpu: str = ""
    memory: str = ""
    gpu: int = 0


FLAGS = {field.name: field for field in dataclasses.fields(Deployment)}
# Flags of `run` that a manifest cannot pass on, and why.
NOT_HERE = {
    "host": "in a pod the server listens on every address",
    "http_port": f"the port is {PORT}, as probes and routes say",
    "grpc_port": f"every protocol is served on port {PORT}, the one that Knative has",
    "model_name": "--name names the InferenceService and the model alike",
    "predictor_host": "KServe gives it to the transformer",
    "reload": "an image does not change",
} | dict.fromkeys(
    ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs"),
    "KServe's gateway ends TLS and speaks plain HTTP to the container",
)
# RFC 1123.
_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_IMAGE = re.compile(r"[A-Za-z0-9][\w.:/@+-]*")
_REMOTE = re.compile(r"(?!file:)[a-z0-9+]+://.")
_CPU = re.compile(r"\d+(\.\d+)?|\d+m")
_MEMORY = re.compile(r"\d+(\.\d+)?([kMGT]|[KMGT]i)?")


def usage() -> str:
    """The text of `kserve-lite manifest --help`."""
    text = inspect.getdoc(Deployment) or ""
    found = re.findall(r"^(\w+): (.*(?:\n {4}.*)*)", text, re.MULTILINE)
    lines = [
        "usage: kserve-lite manifest module[:name] [...] --image IMAGE [flags]",
        "",
        "Prints the InferenceService of a model, for `kubectl apply -f -`. Every other",
        "flag of `kserve-lite run` goes into the container's arguments.",
        "",
    ]
    for name, words in found:
        lines += [f"  --{name}", "      " + re.sub(r"\n +", "\n      ", words)]
    return "\n".join(lines) + "\n"


def parse(argv: Sequence[str]) -> tuple[list[str], Deployment, dict[str, str]]:
    """Read a command line; return targets, the deployment and the server's flags.

    Raises SettingsError for what is unknown, missing or cannot be.
    """
    own, rest = _own_flags(argv)
    known = known_settings()
    for word in rest:
        name = word[2:].partition("=")[0].replace("-", "_")
        if word.startswith("--") and name not in known:
            close = difflib.get_close_matches(name, [*FLAGS, *known], n=1)
            if close and close[0] in FLAGS:
                raise SettingsError(
                    f"there is no flag --{name}; did you mean --{close[0]}?"
                )
    positionals, flags = parse_flags(rest, "kserve-lite manifest", "", "name")
    for name, why in NOT_HERE.items():
        if name in flags:
            raise SettingsError(f"--{name} is not for a manifest: {why}")
    values = {
        name: convert(type(FLAGS[name].default), text, name=name, origin=f"--{name}")
        for name, text in own.items()
    }
    deployment = Deployment(**values)
    _check(deployment)
    predictors = [name for name in flags if is_for_transformer(name)]
    if predictors and not deployment.transformer:
        raise SettingsError(
            f"--{predictors[0]} is for a transformer: give --transformer too"
        )
    # As KServe will start it.
    given = {"predictor_host": "predictor"} if predictors else {}
    settings = make_settings(flags=flags | given)
    if deployment.grpc and not settings.server.enable_grpc:
        raise SettingsError("--grpc needs gRPC: leave --enable_grpc false out")
    return positionals["name"], deployment, flags


def _own_flags(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    own: dict[str, str] = {}
    rest = []
    words = list(argv)
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        name = flag[2:].replace("-", "_")
        if not flag.startswith("--") or name not in FLAGS:
            rest.append(word)
            continue
        following = words[0] if words else "--"
        if not equals and isinstance(FLAGS[name].default, bool):
            value = words.pop(0) if following.lower() in SWITCHES else "true"
        elif not equals:
            if following.startswith("--"):
                raise SettingsError(f"--{name} needs a value")
            value = words.pop(0)
        own[name] = value
    return own, rest


def _check(wanted: Deployment) -> None:
    if not wanted.image:
        raise SettingsError(
            "--image is missing: give the image with the program, such as "
            "registry.example.com/digits:1"
        )
    if wanted.transformer_image and not wanted.transformer:
        raise SettingsError("--transformer_image is for a transformer: give it too")
    rules = {
        "image": (_IMAGE, "an image such as registry.example.com/digits:1"),
        "transformer_image": (_IMAGE, "an image such as registry.example.com/front:1"),
        "namespace": (_NAMESPACE, "a namespace: small letters, digits and -"),
        "runtime": (_NAMESPACE, "a name of small letters, digits and -"),
        "cpu": (_CPU, "processors, such as 2 or 500m"),
        "memory": (_MEMORY, "a Kubernetes quantity such as 512Mi or 4Gi"),
    }
    for flag, (rule, what) in rules.items():
        value = getattr(wanted, flag)
        if value and not rule.fullmatch(value):
            raise SettingsError(f"--{flag} must be {what}, got {value!r}")
    # Not quoted: it may hold a secret.
    if wanted.storage_uri and not _REMOTE.match(wanted.storage_uri):
        raise SettingsError(
            "--storage_uri must be an URI such as s3://bucket/folder or "
            "pvc://claim/folder; a folder of the image is --model_dir"
        )
    if 0 < wanted.max_replicas < wanted.min_replicas:
        raise SettingsError(
            f"--max_replicas {wanted.max_replicas} is below --min_replicas "
            f"{wanted.min_replicas}"
        )


def is_for_transformer(flag: str) -> bool:
    """Whether a flag of `run` says how to reach the predictor."""
    return flag.startswith(("predictor_", "enable_predictor_"))
