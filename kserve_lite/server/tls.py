"""TLS: certificates from files to what the listener needs."""

from __future__ import annotations

import ssl

from kserve_lite.errors import StartupError


def tls_context(certfile: str, keyfile: str, ca_certs: str) -> ssl.SSLContext | None:
    """Return the TLS context of the settings `ssl_*`; None where they ask for none.

    TLS 1.2 and later (RFC 9113 section 9.2), HTTP/2 and HTTP/1.1 by ALPN (RFC 7301).
    With `ca_certs` a client must show a certificate of one of these authorities.
    Raises StartupError, which names the setting that is wrong.
    """
    if not certfile:
        if keyfile or ca_certs:
            raise StartupError(
                "--ssl_keyfile and --ssl_ca_certs need --ssl_certfile, the server's "
                "certificate; without it the server would not encrypt"
            )
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2", "http/1.1"])
    try:
        # A key with a passphrase would ask for it on the terminal and wait for ever.
        context.load_cert_chain(certfile, keyfile or None, password=_no_passphrase)
    except (OSError, ValueError) as error:
        raise StartupError(
            f"--ssl_certfile {certfile}, --ssl_keyfile {keyfile or certfile}: "
            f"{_reason(error)}; both must be PEM files, and the key must belong to the "
            "certificate and have no passphrase"
        ) from error
    if ca_certs:
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(ca_certs)
        except OSError as error:
            raise StartupError(
                f"--ssl_ca_certs {ca_certs}: {_reason(error)}; it must be a PEM file "
                "with certificates"
            ) from error
    return context


def _no_passphrase() -> str:
    raise ValueError("the key has a passphrase")


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):  # first: it is an OSError as well
        return error.reason or "no certificate can be read from it"
    return getattr(error, "strerror", None) or str(error)
