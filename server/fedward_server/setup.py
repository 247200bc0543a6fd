"""Make an aggregator's folder: configuration, certificates, keys, registry, the first token."""

from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedward.errors import ConfigError, OutputError
from fedward.files import write_private
from fedward.plan.text import toml_text
from fedward.signing import fingerprint, public_bytes
from fedward_server import certificates
from fedward_server.certificates import (
    ALWAYS,
    certificate_pem,
    key_pem,
    make_ca,
    make_certificate,
    new_key,
)
from fedward_server.config import ServerConfig, config_from, load_config
from fedward_server.registry import open_registry, read_signing_key

CONFIG_NAME: Final = "server.toml"


@dataclass(frozen=True)
class OwnCertificate:
    """Certificate, key and authority that the user brings."""

    certificate: Path
    key: Path
    ca: Path


@dataclass(frozen=True)
class SetupOptions:
    """What an aggregator is to be like.

    Attributes
    ----------
    hosts : sequence of str
        DNS names and addresses under which hospitals reach it.
    own : OwnCertificate, optional
        Instead of a private authority.
    database : str
        URL of the registry; "" for SQLite in the folder.
    """

    name: str = "aggregator"
    hosts: Sequence[str] = ()
    own: OwnCertificate | None = None
    database: str = ""


@dataclass(frozen=True)
class SetupResult:
    """What the user must be told; the token is kept nowhere."""

    config: Path
    token: str
    coordinator: str
    certificate: certificates.Facts


def initialise(folder: Path, wishes: SetupOptions) -> SetupResult:
    """Make the folder, whole or not at all.

    Raises
    ------
    ConfigError
        The folder is there and not empty, or a wish breaks a rule.
    OutputError
        It cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            "init overwrites nothing",
            value=folder.name,
            fix="Name a new or an empty folder",
            where="DIR",
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            made = _fill(part, wishes)
            part.replace(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise OutputError(
            "the aggregator's folder must be writable",
            value=error.strerror,
            fix="Choose another folder, or free some space",
            where="DIR",
        ) from None
    token, coordinator = made
    config = load_config(folder / CONFIG_NAME)
    return SetupResult(
        folder / CONFIG_NAME, token, coordinator, certificates.read_facts(config.tls.certificate)
    )


def renew(config: ServerConfig, hosts: Sequence[str] = ()) -> certificates.Facts:
    """A new certificate of the same authority for the same key.

    Parameters
    ----------
    config : ServerConfig
        Whose certificate; a service that runs takes the new one at its next start.
    hosts : sequence of str
        Names and addresses; none: those of the old certificate.

    Raises
    ------
    ConfigError
        The authority is not the one that ``init`` made.
    """
    ca_key_path = config.ca_key
    if not ca_key_path.exists():
        raise ConfigError(
            "only certificates of init's own authority are renewed here",
            where="tls",
            fix="Put the new files of your authority where server.toml names them, and restart",
        )
    old = certificates.read_facts(config.tls.certificate)
    ca, ca_key = certificates.read_certificate(config.tls.ca), certificates.read_key(ca_key_path)
    names = (*hosts, *ALWAYS) if hosts else old.hosts
    new = make_certificate(names, certificates.read_key(config.tls.key), ca, ca_key)
    write_private(config.tls.certificate, certificate_pem(new), mode=0o644)
    return certificates.read_facts(config.tls.certificate)


def _fill(folder: Path, wishes: SetupOptions) -> tuple[str, str]:
    content = _content(wishes)
    config = config_from(content, folder)
    for inner in (config.server.state, config.server.keys, config.tls.ca.parent):
        inner.mkdir(mode=0o700)
    config.studies.mkdir(mode=0o700)
    write_private(folder / CONFIG_NAME, toml_text(content).encode())
    _tls(config, wishes)
    coordinator = _keys(config)
    registry = open_registry(config)
    try:
        token = registry.tokens.create("admin", "admin").text
        write_private(
            config.local_token, registry.tokens.create("local", "admin").text.encode() + b"\n"
        )
    finally:
        registry.close()
    return token, coordinator


def _content(wishes: SetupOptions) -> dict[str, Any]:
    """The file with all defaults written out, so that its reader sees what can be changed."""
    content = ServerConfig(version=1).model_dump(mode="json")
    content["server"]["name"] = wishes.name
    content["database"]["url"] = wishes.database
    return content


def _tls(config: ServerConfig, wishes: SetupOptions) -> None:
    if wishes.own is not None:
        _copy_own(config, wishes.own)
        return
    ca_key, key = new_key(), new_key()
    ca = make_ca(wishes.name, ca_key)
    server = make_certificate((*wishes.hosts, *ALWAYS), key, ca, ca_key)
    write_private(config.tls.ca, certificate_pem(ca), mode=0o644)
    write_private(config.ca_key, key_pem(ca_key))
    write_private(config.tls.certificate, certificate_pem(server), mode=0o644)
    write_private(config.tls.key, key_pem(key))


def _copy_own(config: ServerConfig, own: OwnCertificate) -> None:
    certificate = certificates.read_certificate(own.certificate)
    certificates.read_certificate(own.ca)
    try:
        pem = own.key.read_bytes()
        key: Any = serialization.load_pem_private_key(pem, None)
    except (OSError, ValueError, TypeError):
        raise ConfigError(
            "a private key must be a readable PEM file without a password",
            value=own.key.name,
            fix="Check the file",
            where="--key",
        ) from None
    if key.public_key() != certificate.public_key():
        raise ConfigError(
            "key and certificate must belong together",
            fix="Give the certificate's own key",
            where="--key",
        )
    write_private(config.tls.certificate, own.certificate.read_bytes(), mode=0o644)
    write_private(config.tls.key, pem)
    write_private(config.tls.ca, own.ca.read_bytes(), mode=0o644)


def _keys(config: ServerConfig) -> str:
    key = Ed25519PrivateKey.generate()
    encoding = serialization.Encoding.PEM
    private = key.private_bytes(
        encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(
        encoding, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    write_private(config.coordinator_key, private)
    write_private(config.coordinator_key.with_suffix(".pub"), public, mode=0o644)
    for path in (config.control_secret, config.runtime_secret):
        write_private(path, secrets.token_urlsafe(32).encode())
    return fingerprint(public_bytes(key))


def coordinator_fingerprint(config: ServerConfig) -> str:
    """The fingerprint of the key that signs studies.

    Raises
    ------
    ConfigError
        The key cannot be read.
    """
    return fingerprint(public_bytes(read_signing_key(config.coordinator_key)))
