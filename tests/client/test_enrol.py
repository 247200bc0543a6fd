"""A site's key and draft: what is wrong is said before the one key is made."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from typer.testing import CliRunner

from fedward.errors import ConfigError
from fedward_client.cli import app
from fedward_client.config import load_config


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    """A certificate, PEM."""
    key, now = ec.generate_private_key(ec.SECP256R1()), dt.datetime.now(dt.UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority")])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + dt.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    path = tmp_path / "ca.pem"
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    return path


@pytest.fixture
def enrol(tmp_path: Path, authority: Path) -> Callable[..., BaseException | None]:
    """Runs the command; gives how it failed."""

    def run(name: str = "north", server: str = "agg.example:9443", ca: Path = authority) -> object:
        words = ["enrol", "--name", name, "--server", server, "--ca", str(ca)]
        return CliRunner().invoke(app, [*words, "--out", str(tmp_path / "site")]).exception

    return run  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        ({"name": 'St. "Mary"'}, "--name: a site's name"),
        ({"name": " north"}, "--name: a site's name"),
        ({"server": "agg.example"}, "--server: the aggregator is given as host:port"),
        ({"server": "https://agg:9443/"}, "--server: the aggregator is given as host:port"),
        ({"server": "agg:99999"}, "--server: the aggregator is given as host:port"),
        ({"server": 'agg":9443'}, "--server: the aggregator is given as host:port"),
        ({"server": "agg:0"}, "--server: the aggregator is given as host:port"),
        ({"ca": Path("/nowhere/ca.pem")}, "--ca: the aggregator's authority must be a readable"),
        ({"ca": Path("/")}, "--ca: the aggregator's authority must be a readable"),
        ({"ca": Path("/dev/null")}, "--ca: the aggregator's authority must be a certificate"),
    ],
)
def test_what_is_wrong_is_said_before_a_key_is_made(
    enrol: Callable[..., BaseException], tmp_path: Path, wrong: dict[str, str], rule: str
) -> None:
    error = enrol(**wrong)
    assert isinstance(error, ConfigError), error
    assert str(error).startswith(rule)
    assert str(tmp_path) not in str(error)
    assert not (tmp_path / "site").exists()
    assert enrol() is None
    config = load_config(tmp_path / "site" / "site.toml")
    assert config.server is not None
    assert (config.site.name, config.server.address) == ("north", "agg.example:9443")
