"""Where a service listens: its certificate, its address, and what is said of both."""

from __future__ import annotations

import ipaddress
import socket
import ssl
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from ekiben.errors import SettingsError, UsageError
from ekiben.serving.address import Address, check_host, who_may_call
from ekiben.serving.http.guards import Guard
from ekiben.serving.security.issuing import add_key, revoke_key
from ekiben.serving.security.keys import KeyFile
from ekiben.serving.problem import Problem
from ekiben.serving.http.routes import PREDICTORS
from ekiben.serving.security.tls import Certificate, check_tls


def lets_in(keys: KeyFile, is_private: bool) -> bool:
    """Return whether somebody on this machine gets in without a key."""
    try:
        Guard(keys, 0, is_private).admit({"headers": [], "client": ("127.0.0.1", 1)}, PREDICTORS)
    except Problem:
        return False
    return True


# Certificates


def make_pair(
    folder: Path, name: str, *, days: tuple[float, float] = (-1, 30), names: tuple[str, ...] = ("localhost", "127.0.0.1"),
    password: bytes = b"",
) -> tuple[Path, Path]:
    """Write a self-signed certificate and its key, valid between two days from now."""
    key = ec.generate_private_key(ec.SECP256R1())
    who = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    begin, end = (datetime.now(UTC) + timedelta(days=d) for d in days)
    alternatives: list[x509.GeneralName] = [
        x509.IPAddress(ipaddress.ip_address(n)) if n[0].isdigit() else x509.DNSName(n) for n in names
    ]
    made = x509.CertificateBuilder().subject_name(who).issuer_name(who).public_key(key.public_key())
    made = made.serial_number(x509.random_serial_number()).not_valid_before(begin).not_valid_after(end)
    if alternatives:
        made = made.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
    certificate, private = folder / f"{name}.pem", folder / f"{name}.key"
    certificate.write_bytes(made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    how = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how))
    return certificate, private


def test_a_certificate_is_checked_before_it_is_used(tmp_path: Path) -> None:
    make_pair(tmp_path, "good")
    make_pair(tmp_path, "other")
    make_pair(tmp_path, "old", days=(-30, -1))
    make_pair(tmp_path, "new", days=(1, 30))
    make_pair(tmp_path, "locked", password=b"secret")
    (tmp_path / "text.pem").write_text("hello")
    (tmp_path / "cut.pem").write_bytes((tmp_path / "good.pem").read_bytes()[:200])
    (tmp_path / "cut.key").write_bytes((tmp_path / "good.key").read_bytes()[:60])
    found = check_tls("good.pem", str(tmp_path / "good.key"), tmp_path)
    assert found and found.names == ("localhost", "127.0.0.1") and found.days_left == 29 and Path(found.certificate).is_absolute()
    for certificate, key, says in [
        ("good.pem", "", "tls_certificate is set and tls_key is not"),
        ("", "good.key", "tls_key is set and tls_certificate is not"),
        ("none.pem", "good.key", "tls_certificate: .*none.pem.* No such file"),
        ("good.pem", "none.key", "tls_key: .*none.key.* No such file"),
        ("good.pem", ".", "tls_key: .* Is a directory"),
        ("good.pem", "other.key", "tls_key: .*other.key.* is not the one of .*good.pem"),
        ("old.pem", "old.key", "tls_certificate: .*old.pem.* expired on "),
        ("new.pem", "new.key", "tls_certificate: .*new.pem.* is valid from "),
        ("locked.pem", "locked.key", "tls_key: .*locked.key.* has a password"),
        ("text.pem", "good.key", "tls_certificate: .*text.pem.* no certificate"),
        ("cut.pem", "good.key", "tls_certificate: .*cut.pem.* no certificate"),
        ("good.pem", "cut.key", "tls_key: .*cut.key"),
        ("good.key", "good.pem", "tls_certificate: .*good.key.* no certificate"),
    ]:
        with pytest.raises(SettingsError, match=says) as error:
            check_tls(certificate, key, tmp_path)
        assert "\n" not in str(error.value) and "secret" not in str(error.value)


def test_the_service_asks_itself_over_https_and_takes_no_other_certificate(tmp_path: Path) -> None:
    good = check_tls(*map(str, make_pair(tmp_path, "good", names=("service.example",))))
    other = check_tls(*map(str, make_pair(tmp_path, "other")))
    assert good and other
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(good.certificate, good.key)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(60)

        def answer() -> None:
            for _ in range(2):
                try:
                    with server.wrap_socket(listening.accept()[0], server_side=True) as client:
                        client.send(b"hello")
                except OSError:
                    pass

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            address = listening.getsockname()
            with socket.create_connection(address, 60) as raw, good.client_context().wrap_socket(raw) as client:
                assert client.recv(5) == b"hello"
            with socket.create_connection(address, 60) as raw, pytest.raises(ssl.SSLCertVerificationError):
                other.client_context().wrap_socket(raw)
        finally:
            thread.join(60)


# What is said


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1"])
def test_other_machines_are_let_in_once_a_key_exists(host: str) -> None:
    assert check_host(host, has_keys=True) == host
    with pytest.raises(UsageError, match="ekiben keys add NAME"):
        check_host(host)


@pytest.mark.parametrize("host", ["example.org", "127.0.0.1:80", "300.1.1.1"])
def test_a_host_is_an_address(host: str) -> None:
    with pytest.raises(UsageError, match="takes an IP address"):
        check_host(host, has_keys=True)


def test_what_is_said_of_keys_is_what_the_guard_does(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    far = Certificate(certificate="c", key="k", names=("*.example.org", "api.example.org"), expires=datetime.now(UTC))
    for host, is_private in (("127.0.0.1", True), ("0.0.0.0", False)):
        path.unlink(missing_ok=True)
        if is_private:
            assert "no key needed" in who_may_call(Address(host, 1), KeyFile(path))
            assert lets_in(KeyFile(path), is_private)
        add_key(path, "a", ["predict"])
        assert "callers need a key, 1 key is in use" in who_may_call(Address(host, 1), KeyFile(path))
        assert ("unencrypted" in who_may_call(Address(host, 1), KeyFile(path))) is not is_private
        assert "unencrypted" not in who_may_call(Address(host, 1, far), KeyFile(path))
        revoke_key(path, "a")
        assert "nobody can call it" in who_may_call(Address(host, 1), KeyFile(path))
        assert not lets_in(KeyFile(path), is_private)
    assert Address("0.0.0.0", 8443, far).url == "https://api.example.org:8443"
    assert Address("0.0.0.0", 8443, far).probe == "https://127.0.0.1:8443"
    assert Address("::", 1).url == Address("::1", 1).url == "http://[::1]:1"
