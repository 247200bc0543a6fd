"""The operator API over a real registry; in place of the SuperLink, a list of who is enrolled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from fastapi import FastAPI

from fedward.errors import StudyError
from fedward.flower.control_client import ControlClient, Node, stored_key
from fedward_server.api.app import build_api
from fedward_server.api.health import Health
from fedward_server.config import LimitsSection, ServerConfig, load_config
from fedward_server.enrolment import Enrolment
from fedward_server.registry import Registry, open_registry
from fedward_server.setup import SetupOptions, initialise


@dataclass
class Enrolled:
    """Stands for the SuperLink's Control API; the real one is in ``tests/deployment``."""

    known: dict[int, Node] = field(default_factory=dict)
    ever: set[bytes] = field(default_factory=set)
    broken: bool = False

    def nodes(self) -> list[Node]:
        if self.broken:
            raise StudyError("the SuperLink must answer")
        return list(self.known.values())

    def register(self, key: bytes, name: str) -> int:
        self.nodes()
        stored = stored_key(key)
        if stored in self.ever:
            raise StudyError("the SuperLink must accept the call", value="Public key in use")
        node = 1000 + len(self.ever)
        self.ever.add(stored)
        self.known[node] = Node(node, "registered", "", stored)
        return node

    def remove(self, node: int) -> None:
        self.nodes()
        if node not in self.known:
            raise StudyError("the SuperLink must accept the call", value="Node ID not found")
        del self.known[node]


class Client:
    """Calls an application without a port."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app

    def get(self, path: str, **more: Any) -> httpx.Response:
        return self.request("GET", path, **more)

    def request(self, method: str, path: str, **more: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            way = httpx.ASGITransport(self._app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=way, base_url="http://aggregator") as client:
                return await client.request(method, path, **more)

        return asyncio.run(send())


class Api:
    """The API and everything behind it."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.registry: Registry = open_registry(config)
        self.link = Enrolled()
        link = cast(ControlClient, self.link)
        self.enrolment = Enrolment(self.registry, link)
        self.health = Health(config, self.registry, link)
        self.client = Client(build_api(config, self.enrolment, self.health))
        self.tokens = {
            role: self.registry.tokens.create(f"the {role}", role).text  # type: ignore[arg-type]
            for role in ("viewer", "coordinator", "admin")
        }

    def call(self, method: str, path: str, role: str = "admin", **more: Any) -> Any:
        headers = {"Authorization": f"Bearer {self.tokens[role]}"} if role else {}
        # A POST says how long it is, also when it says nothing, as our command line does.
        if method == "POST" and not more:
            more["content"] = b""
        return self.client.request(method, path, headers=headers, **more)


def new_key() -> str:
    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


@pytest.fixture
def site_key() -> Callable[[], str]:
    """Makes a hospital's public key."""
    return new_key


@pytest.fixture
def make_api(tmp_path: Path) -> Iterator[Callable[..., Api]]:
    """Builds an API with its own limits."""
    made: list[Api] = []

    def build(**limits: int) -> Api:
        config = load_config(initialise(tmp_path / f"agg{len(made)}", SetupOptions()).config)
        config = config.model_copy(update={"limits": LimitsSection(**{"free_bytes": 0, **limits})})
        made.append(Api(config))
        return made[-1]

    yield build
    for one in made:
        one.registry.close()


@pytest.fixture
def api(make_api: Callable[..., Api]) -> Api:
    return make_api()
