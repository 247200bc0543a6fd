"""An aggregator's folder and registry, made by the real commands."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedward_server.config import ServerConfig, load_config
from fedward_server.registry import Registry, open_registry
from fedward_server.setup import SetupOptions, SetupResult, initialise


@pytest.fixture
def made(tmp_path: Path) -> SetupResult:
    """A fresh aggregator."""
    return initialise(tmp_path / "hub", SetupOptions(hosts=("aggregator.example.org",)))


@pytest.fixture
def config(made: SetupResult) -> ServerConfig:
    """Its configuration."""
    return load_config(made.config)


@pytest.fixture
def registry(config: ServerConfig) -> Iterator[Registry]:
    """Its registry."""
    registry = open_registry(config)
    yield registry
    registry.close()


def site_key() -> str:
    """A hospital's public key."""
    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


@pytest.fixture
def new_site_key() -> str:
    """A hospital's public key."""
    return site_key()
