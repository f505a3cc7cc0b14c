"""To which servers requests are forwarded: the settings, by KServe's names.

Hosts are read here, once, so that a wrong one is an error of the start. Nothing here
connects or imports a client.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from kserve_lite.errors import SettingsError

GRPC = "grpc-v2"


@dataclass(frozen=True, slots=True)
class ForwardingSettings:
    """Who predicts and explains for models that do not.

    predictor_host: the host, or host:port, of the server that predicts for models that
        have no predict handler; a path may follow that its URLs begin with.
    predictor_protocol: what it is spoken to in: v1, v2 or grpc-v2.
    predictor_use_ssl: speak TLS to it; without a port it is then asked on 443, not 80.
    predictor_ca_certs: a PEM file, or a folder of them, with the authorities that its
        certificate may come from, instead of the system's.
    predictor_request_timeout_seconds: how long it may take for an answer, unless the
        client waits for less; 0: any number.
    predictor_request_retries: how often a request is sent again that it has not begun
        to answer: it could not be reached, was not ready or had too much to do.
    enable_predictor_health_check: be ready only while it is, too.
    explainer_host: the host, or host:port, of the server that explains (V1) for models
        that have no explain handler; TLS, time and retries are as for the predictor.

    Raises SettingsError for values that make no sense together.
    """

    predictor_host: str = ""
    predictor_protocol: str = "v1"
    predictor_use_ssl: bool = False
    predictor_ca_certs: str = ""
    predictor_request_timeout_seconds: float = 600.0
    predictor_request_retries: int = 0
    enable_predictor_health_check: bool = False
    explainer_host: str = ""

    def __post_init__(self) -> None:
        for name in ("predictor_host", "explainer_host"):
            if getattr(self, name):
                address_of(getattr(self, name), name)
        if self.predictor_host:
            is_grpc = self.predictor_protocol == GRPC
            if is_grpc and address_of(self.predictor_host).path:
                raise SettingsError(
                    f"predictor_host {self.predictor_host!r} has a path, which gRPC "
                    "has no place for: leave it out"
                )
            return
        for name, value in (
            ("predictor_protocol", self.predictor_protocol != "v1"),
            ("enable_predictor_health_check", self.enable_predictor_health_check),
        ):
            if value:
                raise SettingsError(
                    f"{name} needs predictor_host, the server that it is about"
                )
        if self.predictor_use_ssl and not self.explainer_host:
            raise SettingsError(
                "predictor_use_ssl needs predictor_host, or explainer_host: the server "
                "that it is about"
            )


class Address(NamedTuple):
    """Where a server is. port: None for the scheme's own. path: "" or "/..."."""

    host: str
    port: int | None
    path: str

    def port_for(self, *, tls: bool) -> int:
        return self.port or (443 if tls else 80)


_ADDRESS = re.compile(
    r"(?P<host>[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,253})|\[[0-9A-Fa-f:.]{2,45}\])"
    r"(?::(?P<port>[0-9]{1,5}))?(?P<path>(?:/[A-Za-z0-9._~%-]+)*)/?"
)


def address_of(text: str, name: str = "predictor_host") -> Address:
    """Read `host[:port][/path]`; raise SettingsError, which names the setting."""
    found = _ADDRESS.fullmatch(text)
    port = int(found["port"]) if found and found["port"] else None
    if found is None or port == 0 or (port or 0) > 65535:
        hint = "host, or host:port"
        if "://" in text:
            hint += " without a scheme (predictor_use_ssl is for https)"
        raise SettingsError(f"{name} must be {hint}, got {text!r}")
    return Address(found["host"], port, found["path"])
