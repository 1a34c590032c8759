"""Who may reach a server and how: addresses, tokens, certificates, and what is logged."""

from __future__ import annotations

import datetime
import logging
import socket
import ssl

import pytest

pytest.importorskip("aiohttp")

import serving

from featherweight.edge import access
from featherweight.edge import http as blocks
from featherweight.errors import FeatherweightError

TOKEN = "0123456789abcdef-token"


def test_beyond_loopback_a_token_is_needed():
    assert access.check_bind("127.0.0.1", token=None, tls=False) == ()
    assert access.check_bind("::1", token=None, tls=False) == ()
    with pytest.raises(FeatherweightError, match="needs a token"):
        access.check_bind("0.0.0.0", token=None, tls=True)
    assert "unencrypted" in access.check_bind("0.0.0.0", token=TOKEN, tls=False)[0]
    assert access.check_bind("0.0.0.0", token=TOKEN, tls=True) == ()


@pytest.mark.parametrize(
    "content", [b"", b"short", b"two words are no token", b"line one of it\nline two of it", b"\xff" * 40]
)
def test_token_files_that_hold_none(tmp_path, content):
    file = tmp_path / "token"
    file.write_bytes(content)
    with pytest.raises(FeatherweightError) as caught:
        access.read_token(file)
    assert content == b"" or content.decode("latin-1") not in str(caught.value)
    with pytest.raises(FeatherweightError, match="cannot be read"):
        access.read_token(tmp_path / "absent")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A self-signed certificate of 127.0.0.1: its file and that of its key."""
    pytest.importorskip("cryptography")
    from ipaddress import ip_address

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(1).not_valid_before(now - day).not_valid_after(now + day)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True).sign(key, hashes.SHA256())
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("tls")
    (folder / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8)
    (folder / "key.pem").write_bytes(key.private_bytes(*form, serialization.NoEncryption()))
    (folder / "locked.pem").write_bytes(key.private_bytes(*form, serialization.BestAvailableEncryption(b"password")))
    return folder / "cert.pem", folder / "key.pem", folder / "locked.pem"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tls_by_certificate_files(tmp_path, certificate):
    cert, key, locked = certificate
    with serving.serving([serving.whole(tmp_path)], token=TOKEN, tls=access.server_tls(cert, key)) as running:
        import urllib3

        with urllib3.PoolManager(ssl_context=access.client_tls(cert)) as pool:
            found = pool.request(
                "GET", running.url + "/v2", headers={"Authorization": f"Bearer {TOKEN}"}, retries=False
            )
        assert found.status == 200
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
        old.set_ciphers("ALL:@SECLEVEL=0")
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
        with socket.create_connection(("127.0.0.1", running.port)) as plain, pytest.raises(OSError):
            old.wrap_socket(plain)
    with pytest.raises(FeatherweightError, match="belong together"):
        access.server_tls(cert, cert)
    with pytest.raises(FeatherweightError, match="password"):
        access.server_tls(cert, locked)
    with pytest.raises(FeatherweightError, match="authorities"):
        access.client_tls(tmp_path / "absent.pem")


def test_offload_over_tls_trusts_only_whom_it_is_told_to(tmp_path, certificate):
    import featherweight as fw

    cert, key, _ = certificate
    with serving.serving([serving.tail(tmp_path)], token=TOKEN, tls=access.server_tls(cert, key)) as running:
        told = {"tail": "tail", "fallback": serving.whole(tmp_path), "token": TOKEN, "deadline": "10s", "probe_s": 0.02}
        with fw.Offload(serving.head(tmp_path), running.url, ca=cert, **told) as model:
            assert model.wait_until_up(10)
            assert model.ask({"image": serving.image()}).source == "split"
        with fw.Offload(serving.head(tmp_path), running.url, **told) as model:
            assert not model.wait_until_up(0.2)
            assert model.ask({"image": serving.image()}).source == "local"


def test_the_access_log_has_no_secrets(tmp_path, caplog):
    with (
        caplog.at_level(logging.INFO, "test.access"),
        serving.serving([serving.whole(tmp_path)], token=TOKEN) as running,
    ):
        blocks.log_access(running.app, logging.getLogger("test.access"))
        running.ask("GET", "/v2?key=hidden%0aforged")
        running.ask("GET", "/v2/models/x%0d%0aforged")
    lines = [r.getMessage() for r in caplog.records if r.name == "test.access"]
    assert len(lines) == 2
    assert all("hidden" not in line and TOKEN not in line and "\n" not in line for line in lines)
    assert "GET" in lines[0]
    assert "200" in lines[0]
