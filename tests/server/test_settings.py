"""Settings: described, converted, refused, and which source beats which."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from kserve_lite import Model, SettingsError, serve
from kserve_lite.server.settings import (
    ENVIRONMENT,
    Settings,
    known_settings,
    make_settings,
    parse_flags,
)


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


def test_environment_names_settings() -> None:
    assert set(ENVIRONMENT.values()) <= set(known_settings())


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
        ("http_port", "65536", "0 to 65535"),
        ("http_port", -1, "negative"),
        ("grpc_port", "65536", "0 to 65535"),
        ("enable_grpc", "maybe", "true or false"),
        ("max_connections", "9" * 30, "huge"),
        ("max_connections", "9" * 5000, "a whole number"),
        ("grace_period", "soon", "a number of seconds"),
        ("grace_period", "nan", "negative or huge"),
        ("grace_period", "inf", "huge"),
        ("grace_period", "-0.1", "negative"),
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


def test_flags_beat_environment_beats_arguments_beats_defaults() -> None:
    arguments, environment, flags = {"http_port": 1}, {"PORT": "2"}, {"http_port": "3"}

    def port(**sources: Any) -> int:
        return make_settings(**sources).server.http_port

    assert port() == 8080
    assert port(arguments=arguments) == 1
    assert port(arguments=arguments, environment=environment) == 2
    assert port(arguments=arguments, environment=environment, flags=flags) == 3
    assert port(arguments=arguments, environment={"PORT": ""}) == 1


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
