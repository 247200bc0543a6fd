from __future__ import annotations

import socket
import ssl
import stat
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from fedward.errors import ConfigError, OutputError
from fedward.signing import fingerprint
from fedward_server import certificates
from fedward_server.config import ServerConfig, config_from, load_config
from fedward_server.registry import open_registry, read_signing_key
from fedward_server.setup import (
    OwnCertificate,
    SetupOptions,
    SetupResult,
    coordinator_fingerprint,
    initialise,
    renew,
)


def test_the_folder_has_all_parts_with_private_modes(
    made: SetupResult, config: ServerConfig
) -> None:
    root = made.config.parent
    modes = {
        str(path.relative_to(root)): stat.S_IMODE(path.stat().st_mode)
        for path in (root, *root.rglob("*"))
    }
    public = {"tls/ca.crt", "tls/server.crt", "keys/coordinator.pub"}
    for name, mode in modes.items():
        folder = (root / name).is_dir()
        expected = 0o700 if folder else 0o644 if name in public else 0o600
        assert mode == expected, name
    assert {"server.toml", "keys/control.secret", "keys/runtime.secret", "tls/ca.key"} <= set(modes)
    assert [path.name for path in root.parent.iterdir()] == ["hub"]
    assert config.server.state == root / "state"


def test_the_token_opens_the_registry_and_stands_in_no_file(
    made: SetupResult, config: ServerConfig
) -> None:
    registry = open_registry(config)
    token = registry.tokens.check(made.token)
    local = registry.tokens.check(config.local_token.read_text().strip())
    registry.close()
    assert token is not None and (token.name, token.role) == ("admin", "admin")
    assert local is not None and local.name == "local"
    secret = made.token.split("_", 2)[-1].encode()
    for path in made.config.parent.rglob("*"):
        assert not path.is_file() or secret not in path.read_bytes(), path.name


def test_the_coordinator_is_named_by_its_key(made: SetupResult, config: ServerConfig) -> None:
    key = read_signing_key(config.coordinator_key).public_key()
    assert made.coordinator == fingerprint(key.public_bytes_raw())
    assert load_pem_public_key(config.coordinator_key.with_suffix(".pub").read_bytes()) == key


def test_nothing_is_overwritten(made: SetupResult) -> None:
    before = made.config.read_bytes()
    with pytest.raises(ConfigError, match="init overwrites nothing"):
        initialise(made.config.parent, SetupOptions())
    assert made.config.read_bytes() == before


def test_a_wrong_host_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--host: a host must be"):
        initialise(tmp_path / "hub", SetupOptions(hosts=("not a host",)))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="must be writable"):
        initialise(tmp_path / "file" / "hub", SetupOptions())


def handshake(config: ServerConfig, name: str) -> dict[str, object]:
    """What a client that trusts the CA sees of a server with the certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(config.tls.certificate, config.tls.key)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            try:
                context.wrap_socket(connection, server_side=True).close()
            except OSError:
                connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        trusting = ssl.create_default_context(cafile=config.tls.ca)
        # Python 3.13 asks for RFC 5280 to the letter; so will hospitals.
        trusting.verify_flags |= ssl.VERIFY_X509_STRICT
        try:
            with (
                socket.create_connection(listener.getsockname()) as plain,
                trusting.wrap_socket(plain, server_hostname=name) as wrapped,
            ):
                return dict(wrapped.getpeercert() or {})
        finally:
            thread.join()


@pytest.mark.parametrize("name", ["aggregator.example.org", "localhost", "127.0.0.1"])
def test_the_certificate_holds_in_a_real_handshake(config: ServerConfig, name: str) -> None:
    assert handshake(config, name)["subject"]


def test_another_name_does_not(config: ServerConfig) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(config, "elsewhere.example.org")


def test_a_renewed_certificate_is_trusted_through_the_same_authority(config: ServerConfig) -> None:
    old, ca = certificates.read_facts(config.tls.certificate), config.tls.ca.read_bytes()
    new = renew(config)
    assert new.fingerprint != old.fingerprint and new.hosts == old.hosts
    assert 725 < new.days_left <= 730
    assert config.tls.ca.read_bytes() == ca
    assert handshake(config, "aggregator.example.org")
    assert "new.example.org" in renew(config, ["new.example.org"]).hosts
    assert handshake(config, "new.example.org")


def test_own_certificates_are_taken_but_not_renewed(config: ServerConfig, tmp_path: Path) -> None:
    own = OwnCertificate(config.tls.certificate, config.tls.key, config.tls.ca)
    other = load_config(initialise(tmp_path / "other", SetupOptions(own=own)).config)
    assert other.tls.certificate.read_bytes() == config.tls.certificate.read_bytes()
    assert stat.S_IMODE(other.tls.key.stat().st_mode) == 0o600
    with pytest.raises(ConfigError, match="init's own authority"):
        renew(other)


def test_a_key_of_another_certificate_is_refused(config: ServerConfig, tmp_path: Path) -> None:
    own = OwnCertificate(config.tls.ca, config.tls.key, config.tls.ca)
    with pytest.raises(ConfigError, match="--key: key and certificate must belong together"):
        initialise(tmp_path / "other", SetupOptions(own=own))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"version": 1, "api": {"prot": 1}}, "api.prot: this key is not known"),
        ({"version": 1, "api": {"port": 9443}}, "api.port: the ports must differ"),
        ({"version": 1, "api": {"port": 0}}, "api.port: must be at least 1"),
        ({"version": 1, "database": {"url": "mysql://x"}}, "database.url: must be a URL of SQLite"),
        ({"version": 2}, "version: must be 1"),
        ({}, "version: this key is required"),
    ],
)
def test_a_broken_configuration_names_the_key(
    content: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from(content, tmp_path)


def test_a_missing_configuration_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fedward-server init"):
        load_config(tmp_path / "server.toml")


def test_the_coordinators_fingerprint_can_be_shown_again(tmp_path: Path) -> None:
    made = initialise(tmp_path / "agg", SetupOptions())
    assert coordinator_fingerprint(load_config(made.config)) == made.coordinator
