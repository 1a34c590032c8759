"""Who may reach a service, and over what: tokens, addresses, certificates."""

from __future__ import annotations

import ipaddress
import ssl
from pathlib import Path

from featherweight.errors import FeatherweightError

MIN_TOKEN_CHARACTERS = 16


def read_token(path: Path) -> str:
    """The token in a file: one line of at least 16 printable ASCII characters without spaces.

    Raises FeatherweightError saying what is wrong with the file, never what is in it.
    """
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError as e:
        raise FeatherweightError(f"the token file {path} cannot be read: {e.strerror or e}") from e
    except UnicodeDecodeError as e:
        raise FeatherweightError(
            f"a token must be ASCII text, but {path} is not; write one with openssl rand -hex 32"
        ) from e
    if len(text) < MIN_TOKEN_CHARACTERS or any(not 33 <= ord(c) <= 126 for c in text):
        raise FeatherweightError(
            f"a token must be one line of at least {MIN_TOKEN_CHARACTERS} characters without spaces, but {path} holds "
            f"{len(text)} characters in {len(text.splitlines())} lines; write one with openssl rand -hex 32"
        )
    return text


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_bind(host: str, *, token: str | None, tls: bool) -> tuple[str, ...]:
    """Warnings about serving on `host`. Raises FeatherweightError beyond loopback without a token."""
    if is_loopback(host):
        return ()
    if token is None:
        raise FeatherweightError(
            f"a service that others can reach needs a token, but host is {host} and none was given; "
            "give --token-file, or serve on 127.0.0.1"
        )
    if not tls:
        return (f"the token and all data cross the network to {host} unencrypted; give --tls-cert and --tls-key",)
    return ()


def server_tls(cert: Path, key: Path) -> ssl.SSLContext:
    """TLS 1.2 or newer from PEM files. Raises FeatherweightError if they cannot be used."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # A key with a password would make OpenSSL ask on the terminal; a service has nobody to answer.
        context.load_cert_chain(cert, key, password=lambda: b"")
    except (OSError, ValueError) as e:
        raise FeatherweightError(
            f"the certificate {cert} and key {key} cannot be used: {getattr(e, 'reason', None) or e}; "
            "they must be PEM files that belong together, the key without a password"
        ) from e
    return context


def client_tls(ca: Path | None = None) -> ssl.SSLContext:
    """Verifying TLS for clients; `ca` is a PEM file of the only authorities to trust (None: the system's)."""
    try:
        context = ssl.create_default_context(cafile=None if ca is None else str(ca))
    except (OSError, ValueError) as e:
        raise FeatherweightError(f"the file of authorities {ca} cannot be used: {e}") from e
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context
