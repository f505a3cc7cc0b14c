"""Certificates for tests, made afresh, in files as the server takes them."""

from __future__ import annotations

import ssl
from pathlib import Path

import trustme


class Authority:
    """A certificate authority, and what it has issued.

    ca: its own certificate. cert: the server's chain, for `localhost` and 127.0.0.1.
    key: the server's key. both: one file with key and chain.
    client_cert, client_key: for a client.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # Elliptic curve keys, since RSA ones take long to make.
        authority = trustme.CA(key_type=trustme.KeyType.ECDSA)
        server = self._issue(authority, "localhost", "127.0.0.1")
        client = self._issue(authority, "client@example.org")
        self.ca = folder / "ca.pem"
        self.cert, self.key = folder / "cert.pem", folder / "key.pem"
        self.both = folder / "both.pem"
        self.client_cert = folder / "client_cert.pem"
        self.client_key = folder / "client_key.pem"
        authority.cert_pem.write_to_path(self.ca)
        server.private_key_and_cert_chain_pem.write_to_path(self.both)
        for issued, cert, key in (
            (server, self.cert, self.key),
            (client, self.client_cert, self.client_key),
        ):
            cert.write_bytes(b"".join(b.bytes() for b in issued.cert_chain_pems))
            issued.private_key_pem.write_to_path(key)

    @staticmethod
    def _issue(authority: trustme.CA, *names: str) -> trustme.LeafCert:
        return authority.issue_cert(*names, key_type=trustme.KeyType.ECDSA)

    @property
    def settings(self) -> dict[str, str]:
        """The server's settings for TLS."""
        return {"ssl_certfile": str(self.cert), "ssl_keyfile": str(self.key)}

    def trusting(
        self, *protocols: str, with_certificate: bool = False
    ) -> ssl.SSLContext:
        """A client's context that trusts this authority; `protocols` for ALPN."""
        context = ssl.create_default_context(cafile=str(self.ca))
        if protocols:
            context.set_alpn_protocols(list(protocols))
        if with_certificate:
            context.load_cert_chain(self.client_cert, self.client_key)
        return context
