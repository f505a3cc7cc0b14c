"""`kserve-lite manifest`: objects that KServe takes, for a server that fits them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from kserve_lite import Model
from kserve_lite.cli import main
from kserve_lite.manifest import to_yaml
from kserve_lite.server.settings import make_settings, parse_flags
from tests.deploy.schema import NAME, accepted_by_knative, build
from tests.server.process import App
from tests.support import ServerThread

pytestmark = pytest.mark.usefixtures("folder")
IMAGE = ("--image", "registry.example.com/ml/doubler:1.2@sha256:" + 64 * "0")


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[Any]:
    """What `kserve-lite manifest ...` prints, checked against the schema."""
    main(["manifest", *arguments])
    documents = list(yaml.safe_load_all(capsys.readouterr().out))
    for document in documents:
        version = document["apiVersion"].removeprefix("serving.kserve.io/v")
        built = build(f"V{version}{document['kind']}", document, document["kind"])
        assert built.spec is not None
        assert NAME.fullmatch(document["metadata"]["name"])
    return documents


def flags_of(container: dict[str, Any]) -> dict[str, str]:
    """The flags as the container's own command line reads them."""
    words = [*container["command"], *container["args"]]
    run = words[words.index("kserve-lite") :]
    assert run[:2] == ["kserve-lite", "run"]
    _, flags = parse_flags(run[2:], "kserve-lite run", "", "name")
    make_settings(flags=flags)
    return flags


def test_the_least(capsys: pytest.CaptureFixture[str]) -> None:
    (service,) = printed(capsys, "served_app:model", *IMAGE)
    assert service["apiVersion"] == "serving.kserve.io/v1beta1"
    assert service["kind"] == "InferenceService"
    assert service["metadata"] == {"name": "doubler"}
    predictor = service["spec"].pop("predictor")
    assert service["spec"] == {}
    (container,) = predictor["containers"]
    accepted_by_knative(container)
    assert container["name"] == "kserve-container"
    assert container["image"] == IMAGE[1]
    assert container["command"] == ["kserve-lite", "run", "served_app:model"]
    assert flags_of(container) == {"model_name": "doubler", "grace_period": "25"}
    assert container["ports"][0]["name"] == "http1"
    assert container["resources"]["limits"] == {"cpu": "1", "memory": "2Gi"}
    assert "env" not in container
    assert predictor["minReplicas"] == 1
    assert "maxReplicas" not in predictor


def test_everything_of_a_predictor(capsys: pytest.CaptureFixture[str]) -> None:
    (service,) = printed(
        capsys,
        *("served_app:model", "--image=a/b:1", "--name", "thrice", "--namespace", "ml"),
        *("--storage-uri", "s3://bucket/a folder", "--grpc", "--gpu", "2"),
        *("--workers", "3", "--min_replicas=0", "--max-replicas", "4", "--memory=5Gi"),
        *("--log-format", "json", "--access_log", "false", "--grace_period", "100"),
    )
    assert service["metadata"] == {"name": "thrice", "namespace": "ml"}
    predictor = service["spec"]["predictor"]
    assert (predictor["minReplicas"], predictor["maxReplicas"]) == (0, 4)
    (container,) = predictor["containers"]
    accepted_by_knative(container)
    assert container["env"] == [
        {"name": "STORAGE_URI", "value": "s3://bucket/a folder"}
    ]
    assert container["ports"][0]["name"] == "h2c"
    amounts = {"cpu": "3", "memory": "5Gi", "nvidia.com/gpu": "2"}
    assert container["resources"] == {"requests": amounts, "limits": amounts}
    assert flags_of(container) == {
        "model_name": "thrice",
        "grace_period": "100",
        "workers": "3",
        "log_format": "json",
        "access_log": "false",
    }


def test_a_transformer_in_front(capsys: pytest.CaptureFixture[str]) -> None:
    (service,) = printed(
        capsys,
        *("served_app:model", *IMAGE, "--grpc", "--workers", "2", "--gpu", "1"),
        *("--transformer", "served_app:front", "--transformer_image", "front:2"),
        *("--predictor_request_timeout_seconds", "20", "--storage_uri", "gs://b/m"),
    )
    (predictor,) = service["spec"]["predictor"]["containers"]
    (front,) = service["spec"]["transformer"]["containers"]
    accepted_by_knative(predictor)
    accepted_by_knative(front)
    assert front["name"] == "kserve-container"
    assert (predictor["image"], front["image"]) == (IMAGE[1], "front:2")
    assert front["command"] == ["kserve-lite", "run", "served_app:front"]
    # One name for both, since the path that came is the path that goes on; KServe adds
    # --predictor_host, and would add its own --model_name and --http_port.
    front["args"] += ["--predictor_host", "doubler-predictor.default"]
    front["args"] += ["--http_port", "8080"]
    assert flags_of(front) == {
        "model_name": "doubler",
        "grace_period": "25",
        "predictor_protocol": "grpc-v2",
        "predictor_request_timeout_seconds": "20",
        "predictor_host": "doubler-predictor.default",
        "http_port": "8080",
    }
    assert flags_of(predictor) == {
        "model_name": "doubler",
        "grace_period": "25",
        "workers": "2",
    }
    assert "env" not in front
    assert front["resources"]["limits"] == {"cpu": "1", "memory": "2Gi"}
    # Over REST it asks as KServe's own do, with V1, unless it is told otherwise.
    (service,) = printed(
        capsys, "served_app:model", *IMAGE, "--transformer", "served_app:front"
    )
    (front,) = service["spec"]["transformer"]["containers"]
    assert front["image"] == IMAGE[1]
    assert "predictor_protocol" not in flags_of(front)


def test_a_serving_runtime(capsys: pytest.CaptureFixture[str]) -> None:
    runtime, service = printed(
        capsys,
        *("served_app:model", *IMAGE, "--runtime", "doublers", "--namespace", "ml"),
        *("--storage_uri", "pvc://claim/factors", "--workers", "2", "--grpc"),
    )
    assert runtime["apiVersion"] == "serving.kserve.io/v1alpha1"
    assert runtime["kind"] == "ServingRuntime"
    assert runtime["metadata"] == {"name": "doublers", "namespace": "ml"}
    assert runtime["spec"]["protocolVersions"] == ["v1", "v2", "grpc-v2"]
    (container,) = runtime["spec"]["containers"]
    accepted_by_knative(container)
    assert flags_of(container) == {
        "model_name": "{{.Name}}",  # KServe puts the InferenceService's name there
        "grace_period": "25",
        "workers": "2",
    }
    assert "env" not in container
    model = service["spec"]["predictor"]["model"]
    assert model["runtime"] == "doublers"
    assert model["modelFormat"] in runtime["spec"]["supportedModelFormats"]
    assert model["storageUri"] == "pvc://claim/factors"
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
    assert model["resources"] == container["resources"]
    assert "containers" not in service["spec"]["predictor"]
    _, service = printed(capsys, "served_app:model", *IMAGE, "--runtime", "doublers")
    assert service["spec"]["predictor"]["model"].keys() == {
        *("modelFormat", "runtime", "resources")
    }


def test_several_models(capsys: pytest.CaptureFixture[str]) -> None:
    targets = ("served_app:model", "served_app:other")
    (service,) = printed(capsys, *targets, *IMAGE, "--name", "both")
    (container,) = service["spec"]["predictor"]["containers"]
    assert container["command"] == ["kserve-lite", "run", *targets]
    assert "model_name" not in flags_of(container)


def test_files_in_the_image(capsys: pytest.CaptureFixture[str]) -> None:
    """Their folder is the image's: that it is not here is no error here."""
    (service,) = printed(capsys, "served_app:model", *IMAGE, "--model_dir", "/in/image")
    (container,) = service["spec"]["predictor"]["containers"]
    assert flags_of(container)["model_dir"] == "/in/image"
    assert "env" not in container


def test_an_image_of_a_buildpack(capsys: pytest.CaptureFixture[str]) -> None:
    """Its PATH comes from the launcher, whose `--` keeps a shell out of it."""
    (service,) = printed(capsys, "served_app:model", *IMAGE, "--buildpack")
    (container,) = service["spec"]["predictor"]["containers"]
    assert container["command"] == [
        *("/cnb/lifecycle/launcher", "--"),
        *("kserve-lite", "run", "served_app:model"),
    ]


def test_the_server_fits_its_manifest(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    """It is started as the pod does it: command, arguments, environment, probes."""
    models = folder / "models"
    models.mkdir()
    (models / "factor").write_text("3")
    (service,) = printed(
        capsys,
        *("served_app:model", *IMAGE, "--name", "tripler"),
        *("--storage_uri", "s3://bucket/factors"),
    )
    (container,) = service["spec"]["predictor"]["containers"]
    (env,) = container["env"]
    # KServe's webhook has it say where the files are, in a pod /mnt/models.
    env["value"] = str(models)
    program, *command = container["command"]
    assert program == "kserve-lite"
    with App(
        *("-m", "kserve_lite", *command, *container["args"]),
        cwd=folder,
        PORT="0",  # Knative sets it to the container's port
        **{env["name"]: env["value"]},
    ) as app:
        for probe in ("readinessProbe", "livenessProbe"):
            status, _ = app.ask(container[probe]["httpGet"]["path"])
            assert status == 200
        name = service["metadata"]["name"]
        answer = app.ask(f"/v1/models/{name}:predict", {"instances": [2, 5]})
        assert answer == (200, {"predictions": [6, 15]})
        assert app.stop().status == 0


def test_the_transformer_fits_its_manifest(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    """It asks the predictor that KServe names, for the model of the same name."""
    (service,) = printed(
        capsys, "served_app:model", *IMAGE, "--transformer", "served_app:front"
    )
    (front,) = service["spec"]["transformer"]["containers"]
    predictor = Model("doubler")

    @predictor.predict
    async def predict(payload: dict[str, Any]) -> dict[str, Any]:
        return {"predictions": [2 * row for row in payload["instances"]]}

    with (
        ServerThread(predictor) as asked,
        App(
            *("-m", "kserve_lite", *front["command"][1:], *front["args"]),
            # What KServe adds; the port is another, since that one may be taken here.
            *("--predictor_host", f"127.0.0.1:{asked.port}", "--http_port", "0"),
            cwd=folder,
        ) as app,
    ):
        assert app.ask(front["readinessProbe"]["httpGet"]["path"])[0] == 200
        answer = app.ask("/v1/models/doubler:predict", {"instances": [1]})
        assert answer == (200, {"predictions": [202]})
        assert app.stop().status == 0


def test_yaml_reads_what_is_written() -> None:
    texts = [
        *(
            "",
            " ",
            "plain",
            "a b",
            "a: b",
            "a:",
            "a:b",
            "a #b",
            "#a",
            "- a",
            "-a",
            "--",
        ),
        *(
            "true",
            "No",
            "NULL",
            "~",
            "y",
            "1",
            "1.5",
            "1e3",
            "0x1f",
            "1:30",
            ".5",
            "e5",
        ),
        *("2026-11-23", "=", "<<", "{{.Name}}", "[a]", "'a'", '"a"', "a\nb", "a\\b"),
        *(
            "\t",
            "\x00",
            "\x7f",
            "\x85",
            "é",
            "日本",
            "😀",
            "\ufeff",
            "\u2028",
            "*a",
            "&a",
        ),
        *(
            "%a",
            "@a",
            "`a`",
            "!a",
            "|",
            ">",
            "?",
            "a,b",
            "nvidia.com/gpu",
            "/v2/health",
        ),
        *("a::b", "a:/b", "NaN", ".inf", "null:x", "http://a/b?c=d"),
    ]
    document = {
        "texts": texts,
        "keys": dict.fromkeys(texts, 1),
        "empty": [[], {}, [[]], [{}], {"a": []}],
        "numbers": [0, -1, 2**40, True, False],
        "nested": [[1, [2, 3], {"a": [4], "b": {"c": 5}}], {"d": [{"e": 6}, {"f": 7}]}],
    }
    text = to_yaml([document, {"second": 1}])
    assert list(yaml.safe_load_all(text)) == [document, {"second": 1}]
    # The same by the stricter rules of YAML 1.2, of which JSON is a part: what is not
    # plain is JSON.
    for line in to_yaml([{"texts": texts}]).splitlines()[1:]:
        word = line.strip().removeprefix("- ")
        assert word in texts or json.loads(word) in texts


def test_the_schema_bites(capsys: pytest.CaptureFixture[str]) -> None:
    def spoilt(key: str, value: Any) -> dict[str, Any]:
        (service,) = printed(capsys, "served_app:model", *IMAGE)
        (container,) = service["spec"]["predictor"]["containers"]
        container[key] = value
        built: dict[str, Any] = service
        return built

    probe = {"httpGet": {"path": "/"}}  # no port
    for key, value in (
        ("argz", []),
        ("args", "a"),
        ("ports", [{"containerPort": "1"}]),
    ):
        with pytest.raises(AssertionError, match=key):
            build("V1beta1InferenceService", spoilt(key, value))
    with pytest.raises(ValueError, match="port"):
        build("V1beta1InferenceService", spoilt("readinessProbe", probe))
    with pytest.raises(AssertionError):
        accepted_by_knative({"lifecycle": {}})
