"""TLS to a predictor: whom it trusts."""

from __future__ import annotations

import ssl
from pathlib import Path

from kserve_lite.errors import StartupError
from kserve_lite.forwarding.settings import ForwardingSettings


def client_tls(settings: ForwardingSettings, *, h2: bool) -> ssl.SSLContext | None:
    """The context that the settings ask for; None where they ask for no TLS.

    It trusts the given authorities, or the system's (SSL_CERT_FILE and SSL_CERT_DIR
    too). Raises StartupError, which names the setting that is wrong.
    """
    if not settings.predictor_use_ssl:
        return None
    given = settings.predictor_ca_certs
    try:
        if given and Path(given).is_dir():
            context = ssl.create_default_context(capath=given)
        else:
            context = ssl.create_default_context(cafile=given or None)
    except OSError as error:
        # ssl.SSLError is one as well, whose words are for programmers.
        is_file = isinstance(error, ssl.SSLError)
        reason = "no certificate can be read from it" if is_file else error.strerror
        raise StartupError(
            f"--predictor_ca_certs {given}: {reason}; it must be a PEM file with "
            "certificates, or a folder of them"
        ) from error
    context.set_alpn_protocols(["h2"] if h2 else ["http/1.1"])
    return context
