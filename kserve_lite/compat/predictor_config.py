"""Where a transformer's predictor is, as KServe's SDK says it.

A model without a `predict` of its own forwards to it. One configuration holds for the
process: `ModelServer` sets it, in each worker anew, from its argument or its flags.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PredictorConfig:
    """How to reach a predictor.

    predictor_host: its host name, with a port if it is not that of the protocol; None:
        there is none. predictor_protocol: v1, v2 or grpc-v2. predictor_use_ssl: ask by
        TLS. predictor_request_timeout_seconds: of one request.
    predictor_request_retries: how often a request that failed is sent again.
    predictor_health_check: the readiness of a model is that of the predictor's.
    """

    predictor_host: str | None
    predictor_protocol: str = "v1"
    predictor_use_ssl: bool = False
    predictor_request_timeout_seconds: int = 600
    predictor_request_retries: int = 0
    predictor_health_check: bool = False

    @property
    def predictor_base_url(self) -> str:
        scheme = "https" if self.predictor_use_ssl else "http"
        return f"{scheme}://{self.predictor_host}"

    @property
    def protocol(self) -> str:
        return self.predictor_protocol

    @property
    def timeout(self) -> int:
        return self.predictor_request_timeout_seconds

    @property
    def retries(self) -> int:
        return self.predictor_request_retries

    @property
    def use_ssl(self) -> bool:
        return self.predictor_use_ssl


_current: PredictorConfig | None = None


def get_predictor_config() -> PredictorConfig | None:
    """The configuration of this process; None before a `ModelServer` is made."""
    return _current


def set_predictor_config(config: PredictorConfig | None) -> None:
    global _current  # noqa: PLW0603 - KServe's models find it without being told
    _current = config
