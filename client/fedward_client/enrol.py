"""A hospital's key pair, made at the hospital; the private half never leaves it."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import TypeAdapter, ValidationError

from fedward.errors import ConfigError, OutputError
from fedward.files import write_private
from fedward.protocol import SITE_NAME
from fedward_client.config import Address

if TYPE_CHECKING:
    from fedward_client.config import SiteConfig

# The officer's and both processes' users read them; their owner alone writes them.
_PUBLIC: Final = 0o644
_TEMPLATE: Final = """version = 1

[site]
name = "{name}"
state = "state"

[server]
address = "{address}"
ca = "aggregator-ca.pem"
state = "connector"

[trainer]
socket = "run/trainer.sock"

# What is here to train on; see docs/hospital-data.md.
[datasets.images]
root = "images"
task = "classification"
classes = ["no", "yes"]

# What studies may do; see docs/policy.md. Nothing is served before an entry says so.
[policy]
coordinators = []
approval = "manual"
"""


@dataclass(frozen=True)
class Enrolment:
    """What was made.

    Attributes
    ----------
    public_key : str
        PEM; goes to the coordinator.
    fingerprint : str
        SHA-256 of the public key's DER form, to be compared over the telephone.
    config : Path
        The site's configuration, or its draft.
    """

    public_key: str
    fingerprint: str
    config: Path


def enrol(folder: Path, name: str, address: str, ca: bytes) -> Enrolment:
    """Make a site's key and a draft of its configuration.

    Parameters
    ----------
    folder : Path
        For ``site.toml``, the authority's certificate and the connector's folder.
    name : str
        The site's name.
    address : str
        The aggregator's ``host:port``.
    ca : bytes
        PEM of its authority.

    Raises
    ------
    ConfigError
        There is a key already, the authority's certificate is none, or name or address are not
        as ``site.toml`` wants them.
    OutputError
        The folder cannot be written.
    """
    _check(name, address)
    try:
        x509.load_pem_x509_certificate(ca)
    except ValueError:
        raise ConfigError(
            "the aggregator's authority must be a certificate in PEM",
            fix="Ask the coordinator",
            where="--ca",
        ) from None
    config = folder / "site.toml"
    with _writing():
        key = _make_key(folder / "connector")
        write_private(folder / "aggregator-ca.pem", ca, mode=_PUBLIC)
        (folder / "images").mkdir(mode=0o755, exist_ok=True)
        if not config.exists():
            content = _TEMPLATE.format(name=name, address=address).encode()
            write_private(config, content, mode=_PUBLIC)
    return Enrolment(public_pem(key), key_fingerprint(key.public_key()), config)


def read_authority(path: Path) -> bytes:
    """The file of the aggregator's authority.

    Raises
    ------
    ConfigError
        It cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            "the aggregator's authority must be a readable file",
            value=os.strerror(error.errno or 0),
            fix="Ask the coordinator for it",
            where="--ca",
        ) from None


def _check(name: str, address: str) -> None:
    """Before a key is made, which there is only once."""
    if not re.fullmatch(SITE_NAME, name):
        raise ConfigError(
            "a site's name has up to 64 letters, digits, spaces, . _ and -, and begins with one of "
            "the first two",
            value=name,
            fix="Choose another",
            where="--name",
        )
    if not _is_address(address):
        raise ConfigError(
            "the aggregator is given as host:port, an IPv6 address as [address]:port",
            value=address,
            fix="Ask the coordinator for both",
            where="--server",
        )


def _is_address(text: str) -> bool:
    try:
        TypeAdapter(Address).validate_python(text)
    except ValidationError:
        return False
    return True


def enrol_configured(config: SiteConfig, path: Path) -> Enrolment:
    """Make a site's key where a configuration that is there already wants it.

    Parameters
    ----------
    config, path : SiteConfig, Path
        The configuration, and its file.

    Raises
    ------
    ConfigError
        There is a key already, or the configuration names no aggregator.
    OutputError
        The connector's folder cannot be written.
    """
    if config.server is None:
        raise ConfigError(
            "site.toml must name its aggregator", fix="Add [server] to it", where="server"
        )
    with _writing():
        key = _make_key(config.server.state)
    return Enrolment(public_pem(key), key_fingerprint(key.public_key()), path)


def read_fingerprint(config: SiteConfig) -> str:
    """The fingerprint of the site's key.

    Raises
    ------
    ConfigError
        The configuration names no aggregator, or there is no key.
    """
    place = config.server.state / "site.pub" if config.server else None
    try:
        key = serialization.load_pem_public_key(place.read_bytes()) if place else None
    except (OSError, ValueError):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConfigError(
            "the site's public key must be readable",
            fix="Make it with fedward-client enrol",
            where="server.state",
        )
    return key_fingerprint(key)


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except FileExistsError:
        raise ConfigError(
            "a site has one key",
            fix="Keep it; to change it, move site.key away first",
            where="server.state",
        ) from None
    except OSError as error:
        raise OutputError(
            "the site's folder must be writable",
            value=os.strerror(error.errno or 0),
            fix="Choose another, or give it to the user that runs this",
        ) from None


def _make_key(folder: Path) -> ec.EllipticCurvePrivateKey:
    key = ec.generate_private_key(ec.SECP384R1())
    _write_key(folder / "site.key", key)
    write_private(folder / "site.pub", public_pem(key).encode(), mode=_PUBLIC)
    return key


def public_pem(key: ec.EllipticCurvePrivateKey) -> str:
    """The public half as PEM."""
    return (
        key.public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        .decode()
    )


def key_fingerprint(public: ec.EllipticCurvePublicKey) -> str:
    """SHA-256 of the key's DER form, 64 hexadecimal digits."""
    der = public.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(der).hexdigest()


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        file.flush()
        os.fsync(file.fileno())
