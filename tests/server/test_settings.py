"""Settings: described, converted, refused, and which source beats which."""

from __future__ import annotations

import dataclasses
import inspect
import re
from decimal import Decimal
from typing import Any

import httpx
import pytest

from kserve_lite import Model, SettingsError, StartupError, run, serve
from kserve_lite.server.settings import (
    ELSEWHERE,
    ENVIRONMENT,
    Setting,
    Settings,
    known_settings,
    make_settings,
    parse_flags,
)
from kserve_lite.server.values import CHOICES, LEAST, MOST
from tests.support import ServerThread

# Every flag of KServe 0.21 and of its servers of trained models.
KSERVE = re.findall(
    r"\w+",
    """
access_log_format configure_logging enable_docs_url enable_grpc enable_latency_logging
enable_predictor_health_check event_loop grpc_max_receive_message_length
grpc_max_send_message_length grpc_port http_port log_config_file max_asyncio_workers
max_threads model_dir model_name predictor_host predictor_protocol
predictor_request_retries predictor_request_timeout_seconds predictor_use_ssl protocol
ssl_certfile ssl_keyfile timeout_keep_alive workers
""",
)


# What some settings are about, without which they make no sense.
_PREDICTOR = {"predictor_host": "predictor"}
NEEDS = {
    "predictor_protocol": _PREDICTOR,
    "predictor_use_ssl": _PREDICTOR,
    "enable_predictor_health_check": _PREDICTOR,
}


def another(setting: Setting) -> Any:
    """A value that is not the default."""
    if setting.name.endswith("_host"):
        return "predictor:8080"
    if setting.name in CHOICES:
        return CHOICES[setting.name][-1]
    if setting.type is bool:
        return not setting.default
    if setting.type is str:
        return "/"  # a folder too, for storage_uri
    return setting.default + 1


def value_of(settings: Settings, name: str) -> Any:
    return getattr(getattr(settings, known_settings()[name].group), name)


def test_every_field_is_known_by_a_name_of_its_own() -> None:
    settings = Settings()
    fields = [
        (group.name, field.name)
        for group in dataclasses.fields(settings)
        if group.name != "given"
        for field in dataclasses.fields(getattr(settings, group.name))
    ]
    known = known_settings()
    assert len(fields) == len(known)
    assert sorted(fields) == sorted((s.group, s.name) for s in known.values())


@pytest.mark.parametrize("name", known_settings())
def test_every_setting_is_described(name: str) -> None:
    text = known_settings()[name].text
    assert len(text) > 10
    assert text.endswith((".", ")"))
    assert "  " not in text


@pytest.mark.parametrize("name", known_settings())
def test_every_setting_has_its_default_again(name: str) -> None:
    setting = known_settings()[name]
    made = make_settings(flags={name: str(setting.default)})
    assert made == make_settings({name: setting.default})
    assert made == dataclasses.replace(Settings(), given=frozenset({name}))


def test_what_was_given_is_known() -> None:
    assert Settings().given == make_settings().given == frozenset()
    made = make_settings(
        {"grpc_port": 8081}, environment={"PORT": "8080"}, flags={"enable_grpc": "yes"}
    )
    assert made.given == {"grpc_port", "http_port", "enable_grpc"}


def test_tables_name_settings() -> None:
    known = set(known_settings())
    for table in (ENVIRONMENT.values(), CHOICES, LEAST, MOST):
        assert set(table) <= known
    assert not known & set(ELSEWHERE)
    for name, choices in CHOICES.items():
        assert all(choice in known_settings()[name].text for choice in choices)


def test_environment_variables_are_those_of_the_contract() -> None:
    shown = {s.variable: s.name for s in known_settings().values() if s.variable}
    assert shown == ENVIRONMENT
    assert set(shown) == {
        "PORT",
        "STORAGE_URI",
        "STORAGE_ALLOW_PATTERNS",
        "STORAGE_IGNORE_PATTERNS",
        "CE_TYPE",
        "CE_SOURCE",
        "CE_MERGE",
        "REQUESTS_CA_BUNDLE",
        "KSERVE_LOGLEVEL",
        "KSERVE_TLS_CERT_FILE",
        "KSERVE_TLS_KEY_FILE",
    }


@pytest.mark.parametrize("name", known_settings())
def test_flags_and_arguments_agree(name: str) -> None:
    value = "other" if name == "model_name" else another(known_settings()[name])
    assert value != known_settings()[name].default
    spelt = name.replace("_", "-")
    _, flags = parse_flags([f"--{spelt}", str(value)], "prog", "text")
    needs = NEEDS.get(name, {})
    made = make_settings(flags=flags | needs)
    assert made == make_settings({name: value} | needs)
    assert made == make_settings({name: str(value)} | needs)
    assert value_of(made, name) == value


def test_embedding_takes_the_same_names_and_no_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for variable in ENVIRONMENT:
        monkeypatch.setenv(variable, "unusable")
    given = {"log_level": "ERROR", "max_streams": 7, "grace_period": 1}
    assert serve(Model("m"), **given).settings == make_settings(given)


@pytest.mark.parametrize(("variable", "name"), ENVIRONMENT.items())
def test_each_source_beats_the_next(variable: str, name: str) -> None:
    setting = known_settings()[name]
    of_argument, of_environment, of_flag = {
        "http_port": ("1", "2", "3"),
        "log_level": ("DEBUG", "ERROR", "CRITICAL"),
        "ce_merge": ("True", "False", "True"),
        "storage_uri": ("/", "/proc", "/sys"),
    }.get(name, ("a", "b", "c"))

    def made(**sources: Any) -> str:
        return str(value_of(make_settings(**sources), name))

    sources = {
        "arguments": {name: of_argument},
        "environment": {variable: of_environment},
        "flags": {name: of_flag},
    }
    assert made(**sources) == of_flag
    del sources["flags"]
    assert made(**sources) == of_environment
    assert made(**sources | {"environment": {variable: ""}}) == of_argument
    del sources["environment"]
    assert made(**sources) == of_argument
    assert made() == str(setting.default)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("http_port", "8080"),
        ("enable_grpc", "true"),
        ("ssl_certfile", "none"),
        ("model_dir", "/mnt/models"),
        ("max_in_flight", "4096"),
        ("grace_period", "30 s"),
        ("request_timeout", "600 s"),
        ("max_head_size", "64 KiB"),
        ("max_body_size", "100 MiB"),
    ],
)
def test_defaults_are_shown_for_people(name: str, shown: str) -> None:
    assert known_settings()[name].shown == shown


def test_help_has_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_flags(["--help"], "prog", "text")
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for setting in known_settings().values():
        entry = f"{setting.text} Default: {setting.shown}"
        if setting.variable:
            entry += f"; environment: ${setting.variable}"
        # argparse may break a line after a hyphen.
        assert entry.replace(" ", "") in text.replace(" ", "")
        assert f"--{setting.name} " in text


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("http_port", "0", 0),
        ("http_port", "65535", 65535),
        ("grace_period", "1.5", 1.5),
        ("grace_period", "0", 0.0),
        ("grace_period", "1e2", 100.0),
        ("enable_latency_logging", "TRUE", True),
        ("enable_latency_logging", "y", True),
        ("enable_latency_logging", "1", True),
        ("enable_latency_logging", "off", False),
        ("enable_latency_logging", "No", False),
        ("log_level", "warning", "WARNING"),
        ("model_dir", "relative/path", "relative/path"),
        ("grpc_port", "0", 0),
        ("enable_grpc", "false", False),
        ("ssl_certfile", "cert.pem", "cert.pem"),
    ],
)
def test_text_is_converted(name: str, text: str, value: object) -> None:
    setting = known_settings()[name]
    made = getattr(getattr(make_settings(flags={name: text}), setting.group), name)
    assert (made, type(made)) == (value, type(value))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("http_port", "many", "a whole number"),
        ("http_port", "", "a whole number"),
        ("http_port", "80.5", "a whole number"),
        ("http_port", 80.0, "a whole number"),
        ("http_port", True, "a whole number"),
        ("http_port", None, "a whole number"),
        ("http_port", "65536", "at most 65535"),
        ("http_port", -1, "at least 0"),
        ("http_port", b"80", "a whole number"),
        ("http_port", Decimal("80.5"), "a whole number"),
        ("grpc_port", "65536", "at most 65535"),
        ("workers", "0", "at least 1"),
        ("workers", 1025, "at most 1024"),
        ("workers", "two", "a whole number"),
        ("max_queue_size", "0", "at least 1"),
        ("max_streams", 2**31, "at most 2147483647"),
        ("timeout_keep_alive", "0", r"at least 0\.01"),
        ("request_timeout", 10**400, "a number of seconds"),
        ("request_timeout", 2e9, "at most 1000000000"),
        ("log_format", "xml", "text, json"),
        ("model_dir", None, "text"),
        ("model_dir", b"/mnt", "text"),
        ("host", 1, "text"),
        ("model_name", "a/b", "without '/'"),
        ("enable_grpc", "maybe", "true or false"),
        ("max_connections", "9" * 30, "at most"),
        ("max_connections", "9" * 5000, "a whole number"),
        ("grace_period", "soon", "a number of seconds"),
        ("grace_period", "nan", "at least 0"),
        ("grace_period", "inf", "at most"),
        ("grace_period", "-0.1", "at least 0"),
        ("enable_latency_logging", "perhaps", "true or false"),
        ("enable_latency_logging", "", "true or false"),
        ("enable_latency_logging", 2, "true or false"),
        ("event_loop", "trio", "auto, asyncio, uvloop"),
        ("log_level", "loud", "DEBUG, INFO, WARNING, ERROR, CRITICAL"),
        ("max_body_size", "1MB", "a whole number"),
    ],
)
def test_unusable_values_are_refused(name: str, value: object, words: str) -> None:
    with pytest.raises(SettingsError, match=words) as caught:
        make_settings({name: value})
    assert str(caught.value).startswith(name)
    if isinstance(value, str):
        with pytest.raises(SettingsError, match=words) as caught:
            make_settings(flags={name: value})
        assert str(caught.value).startswith(f"--{name}")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("htpp_port", "did you mean 'http_port'?"),
        ("max_conections", "did you mean 'max_connections'?"),
        ("zzzz", "known: http_port, grpc_port, "),
        ("grcp_port", "did you mean 'grpc_port'?"),
        ("ssl_cert_file", "did you mean 'ssl_certfile'?"),
        ("port", "did you mean 'http_port'?"),
        ("loglevel", "did you mean 'log_level'?"),
        ("num_workers", "did you mean 'workers'?"),
        ("keep_alive", "did you mean 'timeout_keep_alive'?"),
        ("body_size", "did you mean 'max_body_size'?"),
        *ELSEWHERE.items(),
    ],
)
def test_unknown_settings_are_refused(name: str, hint: str) -> None:
    wrong: dict[str, Any] = {name: 1}
    with pytest.raises(SettingsError) as caught:
        make_settings(wrong)
    assert f"there is no setting {name!r}; {hint}" in str(caught.value)
    with pytest.raises(SettingsError) as caught:
        serve(Model("m"), **wrong)
    assert hint in str(caught.value)
    with pytest.raises(SettingsError) as caught:
        parse_flags([f"--{name}", "1"], "prog", "text")
    assert f"there is no flag --{name}; {hint}" in str(caught.value)


@pytest.mark.parametrize("name", KSERVE)
def test_flags_of_kserve_work_or_say_what_does(name: str) -> None:
    assert (name in known_settings()) != (name in ELSEWHERE)


def test_suggestions_name_what_there_is() -> None:
    known = known_settings()
    named = [re.findall(r"'(\w+)'|\b(\w+_\w+)", text) for text in ELSEWHERE.values()]
    found = {quoted or plain for pairs in named for quoted, plain in pairs}
    assert {"max_asyncio_workers", "log_config", "host", "grace_period"} <= found
    handlers = {"max_batch_size", "max_concurrency"}
    assert handlers <= set(inspect.signature(Model.predict).parameters) | set(
        inspect.signature(Model).parameters
    )
    assert found - handlers <= set(known)


def test_a_program_is_told_of_a_wrong_argument(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for settings, words in (
        (
            {"http_prot": 1},
            "there is no setting 'http_prot'; did you mean 'http_port'?",
        ),
        ({"workers": 0}, "workers must be at least 1, got 0"),
    ):
        with pytest.raises(SystemExit) as ended:
            run(Model("m"), argv=[], **settings)
        assert ended.value.code == 1
        assert capsys.readouterr().err == f"kserve-lite: {words}\n"


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("KSERVE_LOG_LEVEL", "KSERVE_LOGLEVEL"),
        ("KSERVE_LOGLEVL", "KSERVE_LOGLEVEL"),
        ("KSERVE_TLS_CERTFILE", "KSERVE_TLS_CERT_FILE"),
        ("KSERVE_TLS_KEYFILE", "KSERVE_TLS_KEY_FILE"),
    ],
)
def test_misspelt_variables_are_refused(variable: str, meant: str) -> None:
    with pytest.raises(SettingsError, match=rf"\${variable}; did you mean \${meant}\?"):
        make_settings(environment={variable: "x"})


@pytest.mark.parametrize(
    "variable",
    [
        "KSERVE_OPENAI_ROUTE_PREFIX",
        "KSERVE_TLS_CA_FILE",
        "KSERVE_OCI_DOCKER_CONFIG",
        # What Kubernetes makes for services of these names.
        "KSERVE_LITE_PORT",
        "KSERVE_LITE_SERVICE_HOST",
        "KSERVE_SERVICE_PORT",
        "HTTP_PORT",
        "REMOTE_STORAGE_URI",
    ],
)
def test_variables_of_others_are_left_alone(variable: str) -> None:
    assert make_settings(environment={variable: "tcp://10.0.0.1:80"}) == Settings()


def test_a_lone_model_is_served_under_another_name() -> None:
    model = Model("mine", predict=lambda payload: {"predictions": ["done"]})
    with ServerThread(model, model_name="theirs") as server:
        models = f"{server.url}/v1/models"
        assert httpx.get(models).json() == {"models": ["theirs"]}
        answer = httpx.post(f"{models}/theirs:predict", json={"instances": [1]})
        assert answer.json() == {"predictions": ["done"]}
        assert httpx.get(f"{models}/mine").status_code == 404


def test_versions_of_one_model_are_renamed_together() -> None:
    versions = [Model("m", version=v, predict=lambda p: p) for v in ("1", "2")]
    with ServerThread(*versions, model_name="n") as server:
        assert httpx.get(f"{server.url}/v2/models/n/versions/1").status_code == 200
        assert httpx.get(f"{server.url}/v2/models/n").json()["versions"] == ["1", "2"]


def test_several_models_cannot_be_renamed() -> None:
    models = [Model(name, predict=lambda payload: payload) for name in ("a", "b")]
    with (
        pytest.raises(StartupError, match="'c' is for one model, and there are 2"),
        ServerThread(*models, model_name="c"),
    ):
        pass
    assert [model.name for model in models] == ["a", "b"]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"predictor_protocol": "v2"}, "predictor_protocol needs predictor_host"),
        ({"predictor_use_ssl": True}, "predictor_use_ssl needs predictor_host"),
        (
            {"enable_predictor_health_check": True, "explainer_host": "e"},
            "enable_predictor_health_check needs predictor_host",
        ),
        ({"predictor_protocol": "v3", "predictor_host": "p"}, "v1, v2, grpc-v2"),
        ({"predictor_host": "http://p"}, "without a scheme"),
        ({"predictor_host": "p:0"}, "host:port"),
        ({"predictor_host": "p:65536"}, "host:port"),
        ({"predictor_host": "p q"}, "host:port"),
        ({"predictor_host": "u@p"}, "host:port"),
        ({"predictor_host": "p/a?b"}, "host:port"),
        ({"explainer_host": ":80"}, "explainer_host must be host"),
        ({"predictor_host": "p/a", "predictor_protocol": "grpc-v2"}, "has a path"),
        ({"predictor_request_retries": 101}, "at most 100"),
        ({"predictor_request_timeout_seconds": -1}, "at least 0"),
    ],
)
def test_forwarding_that_makes_no_sense(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        make_settings(wrong)


@pytest.mark.parametrize("host", ["p", "p:80", "[::1]:8080", "a_b.ns.svc", "p/x/y/"])
def test_hosts_that_are_forwarded_to(host: str) -> None:
    made = make_settings({"predictor_host": host, "explainer_host": host}).forwarding
    assert made.predictor_host == made.explainer_host == host
    make_settings({"predictor_use_ssl": True, "explainer_host": host})


def test_environment_errors_name_the_variable() -> None:
    with pytest.raises(SettingsError, match=r"^\$PORT must be"):
        make_settings(environment={"PORT": "many"})


@pytest.mark.parametrize(
    ("argv", "targets", "flags"),
    [
        (["a:b"], ["a:b"], {}),
        (["a", "b", "--http-port", "1"], ["a", "b"], {"http_port": "1"}),
        (["--http_port=1", "a"], ["a"], {"http_port": "1"}),
        (["--model-dir", "some-folder", "a"], ["a"], {"model_dir": "some-folder"}),
        (["--model_dir=a=b--c", "a"], ["a"], {"model_dir": "a=b--c"}),
        (
            ["--enable-latency-logging", "a"],
            ["a"],
            {"enable_latency_logging": "true"},
        ),
        (
            ["--enable_latency_logging", "off", "a"],
            ["a"],
            {"enable_latency_logging": "off"},
        ),
        (
            ["a", "--expose_errors", "--http_port", "1"],
            ["a"],
            {"expose_errors": "true", "http_port": "1"},
        ),
        (["--http_port", "1", "a", "--http_port", "2"], ["a"], {"http_port": "2"}),
        (["a", "--http_port", "1", "b"], ["a", "b"], {"http_port": "1"}),
        (["a", "--enable-grpc", "false"], ["a"], {"enable_grpc": "false"}),
        (["--grpc-port=1", "a"], ["a"], {"grpc_port": "1"}),
    ],
)
def test_command_lines(
    argv: list[str], targets: list[str], flags: dict[str, str]
) -> None:
    assert parse_flags(argv, "prog", "text", "name") == ({"name": targets}, flags)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "the following arguments are required"),
        (["a", "--http_port"], "expected one argument"),
        (["a", "--http"], "there is no flag --http;"),
        (["a", "-v"], "unexpected argument '-v'"),
    ],
)
def test_command_lines_that_are_refused(argv: list[str], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        parse_flags(argv, "prog", "text", "name")
