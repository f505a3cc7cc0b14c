"""What `kserve-lite manifest` refuses, in one line, and what its help says."""

from __future__ import annotations

import re

import pytest

from kserve_lite.cli import COMMANDS, main
from kserve_lite.deployment import FLAGS, NOT_HERE
from kserve_lite.server.settings import known_settings

pytestmark = pytest.mark.usefixtures("folder")
IMAGE = ("--image", "registry.example.com/doubler:1")
PREDICTOR = ("served_app:model", *IMAGE)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["manifest", *arguments])
    assert ended.value.code == 1
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if "module that prints" not in line]
    assert out == ""
    return line.removeprefix("kserve-lite: ")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("served_app:model",), "--image is missing"),
        (("served_app:model", "--image"), "--image needs a value"),
        (("served_app:model", "--image", "--grpc"), "--image needs a value"),
        (("served_app:model", "--image", "a b"), "such as registry.example.com"),
        (("served_app:model", "--imge", "a"), "did you mean --image?"),
        ((*PREDICTOR, "--worker", "2"), "did you mean 'workers'?"),
        ((*PREDICTOR, "--storageuri", "s3://a"), "did you mean --storage_uri?"),
        ((*PREDICTOR, "--workers", "0"), "--workers must be at least 1"),
        ((*PREDICTOR, "--gpu", "many"), "--gpu must be a whole number"),
        ((*PREDICTOR, "--memory", "2GB"), "such as 512Mi or 4Gi, got '2GB'"),
        ((*PREDICTOR, "--cpu", "half"), "such as 2 or 500m"),
        ((*PREDICTOR, "--namespace", "My"), "--namespace must be"),
        ((*PREDICTOR, "--storage_uri", "/models"), "--model_dir"),
        ((*PREDICTOR, "--storage_uri", "file:///models"), "--model_dir"),
        ((*PREDICTOR, "--min_replicas", "3", "--max_replicas", "2"), "is below"),
        ((*PREDICTOR, "--grpc", "--enable_grpc", "false"), "--grpc needs gRPC"),
        ((*PREDICTOR, "--predictor_protocol", "v2"), "give --transformer too"),
        ((*PREDICTOR, "--transformer_image", "x"), "for a transformer"),
        ((*PREDICTOR, "--transformer", "served_app:other"), "has a predict handler"),
        ((*PREDICTOR, "--transformer", "served_app"), "one model before one other"),
        ((*PREDICTOR, "--transformer", "served_app:fron"), "served_app:front?"),
        (("served_app:front", *IMAGE), "give it as --transformer"),
        ((*PREDICTOR, "served_app:other"), "2 models have no one name: give --name"),
        ((*PREDICTOR, "served_app:other", "--runtime", "r"), "give module:name"),
        (("served_app:capital", *IMAGE), "give --name my-model"),
        (("served_app:nothing", *IMAGE), "served_app has no 'nothing'"),
        (("missing:model", *IMAGE), "there is no module 'missing'"),
        (IMAGE, "required: module[:name]"),
    ],
)
def test_what_cannot_be_is_one_line(
    arguments: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told in refused(capsys, *arguments)


def test_a_storage_uri_is_not_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    secret = "secret@bucket"
    assert secret not in refused(capsys, *PREDICTOR, "--storage_uri", secret)


@pytest.mark.parametrize("flag", NOT_HERE)
def test_flags_that_a_pod_cannot_have(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refused(capsys, *PREDICTOR, f"--{flag}=1")
    assert told == f"--{flag} is not for a manifest: {NOT_HERE[flag]}"


def test_the_flags_that_it_leaves_out_are_flags() -> None:
    assert NOT_HERE.keys() <= known_settings().keys()
    # Its own are its own, but for the one that goes into the environment.
    assert FLAGS.keys() & known_settings().keys() == {"storage_uri"}


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    main(["manifest", "--help"])
    text = capsys.readouterr().out
    assert re.findall(r"^  --(\w+)$", text, re.M) == list(FLAGS)
    assert max(map(len, text.splitlines())) <= 88
    main(["--help"])
    text = capsys.readouterr().out
    assert all(f"kserve-lite {command} " in text for command in COMMANDS)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("manifset", "did you mean manifest?"),
        ("runs", "did you mean run?"),
        ("app:model", "did you mean kserve-lite run app:model?"),
        ("frobnicate", "they are run and manifest"),
        ("--image", "they are run and manifest"),
    ],
)
def test_an_unknown_command(
    given: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([given])
    assert told in capsys.readouterr().err
