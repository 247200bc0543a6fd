"""A private certificate authority for one aggregator, and the certificate that it signs."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedward.errors import ConfigError

CA_DAYS: Final = 3652
SERVER_DAYS: Final = 730
ALWAYS: Final = ("localhost", "127.0.0.1", "::1")
_DNS: Final = re.compile(r"(?=.{1,253}$)([A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.?)+")
Key = ec.EllipticCurvePrivateKey


@dataclass(frozen=True)
class Facts:
    """What a certificate says.

    Attributes
    ----------
    hosts : tuple of str
        Names and addresses that it stands for.
    begins, expires : datetime
        Start and end of its life, UTC.
    fingerprint : str
        SHA-256 of its DER form, hexadecimal.
    """

    hosts: tuple[str, ...]
    begins: datetime
    expires: datetime
    fingerprint: str

    @property
    def days_left(self) -> int:
        """Whole days until it expires; negative afterwards."""
        return (self.expires - datetime.now(UTC)).days


def new_key() -> Key:
    """A fresh EC key on P-256 (FIPS 186-5)."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: Key) -> bytes:
    """PKCS #8, PEM, not encrypted: the service starts without a person."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def certificate_pem(certificate: x509.Certificate) -> bytes:
    """The certificate as PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def make_ca(name: str, key: Key) -> x509.Certificate:
    """A self-signed authority that may sign end certificates only (RFC 5280, 4.2.1.9)."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Fedward CA of {name}"[:64])])
    usage = _usage(signs=True)
    return (
        _builder(subject, subject, key.public_key(), CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def make_certificate(
    hosts: Iterable[str], key: Key, ca: x509.Certificate, ca_key: Key, days: int = SERVER_DAYS
) -> x509.Certificate:
    """A server's certificate for names and addresses.

    Raises
    ------
    ConfigError
        A host is neither a DNS name nor an IP address.
    """
    names = list(dict.fromkeys(hosts))
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])])
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    return (
        _builder(subject, ca.subject, key.public_key(), days)
        .add_extension(x509.SubjectAlternativeName([_host(one) for one in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(authority, critical=False)
        .sign(ca_key, hashes.SHA256())
    )


def read_facts(path: Path) -> Facts:
    """What the first certificate of a PEM file says.

    Raises
    ------
    ConfigError
        It cannot be read.
    """
    certificate = read_certificate(path)
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        hosts = [str(one) for one in names.get_values_for_type(x509.DNSName)]
        hosts += [str(one) for one in names.get_values_for_type(x509.IPAddress)]
    except x509.ExtensionNotFound:
        hosts = []
    return Facts(
        tuple(hosts),
        certificate.not_valid_before_utc,
        certificate.not_valid_after_utc,
        certificate.fingerprint(hashes.SHA256()).hex(),
    )


def read_certificate(path: Path) -> x509.Certificate:
    """The first certificate of a PEM file (see :func:`read_facts`)."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError):
        raise ConfigError(
            "a certificate must be a readable PEM file",
            value=path.name,
            fix="Check the file",
            where="tls",
        ) from None


def read_key(path: Path) -> Key:
    """An EC private key of a PEM file.

    Raises
    ------
    ConfigError
        It cannot be read.
    """
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(
            "an EC private key must be a readable PEM file",
            value=path.name,
            where="tls",
            fix="Check the file; certificates of your own authority are renewed there",
        )
    return key


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))  # a hospital's clock may be behind
        .not_valid_after(now + timedelta(days=days))
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _host(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        if _DNS.fullmatch(text):
            return x509.DNSName(text)
        raise ConfigError(
            "a host must be a DNS name or an IP address",
            value=text,
            where="--host",
            fix="Give the name under which hospitals reach this machine",
        ) from None
