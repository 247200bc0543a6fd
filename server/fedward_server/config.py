"""``server.toml``: how the aggregator is reached, where it keeps what, and its limits."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from fedward.connections import ConnectionLimits, host_and_port
from fedward.errors import ConfigError, together
from fedward.plan.messages import lines, validated

Place = Annotated[Path, Field(strict=False)]
Port = Annotated[int, Field(ge=1, le=65535)]
Address = Annotated[str, Field(pattern=r"^[A-Za-z0-9.:\[\]-]{1,253}$")]


class Section(BaseModel):
    """Base of the tables: nothing unknown inside, no value converted, nothing changed later."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ServerSection(Section):
    """The aggregator itself."""

    name: str = Field(
        default="aggregator", pattern=r"^\w[\w. -]{0,63}$", description="what people call it"
    )
    state: Place = Field(
        default=Path("state"),
        description="folder for the registry, the SuperLink's database, checkpoints and models",
    )
    keys: Place = Field(
        default=Path("keys"),
        description="folder of the coordinator's signing key and this machine's secrets",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="how much the log says"
    )


class SitesSection(Section):
    """Where hospitals connect."""

    address: Address = Field(default="0.0.0.0", description="address to listen on")
    port: Port = Field(default=9443, description="the one port that hospitals must reach")


class ApiSection(Section):
    """Where operators connect."""

    address: Address = Field(default="127.0.0.1", description="address to listen on")
    port: Port = Field(default=9444, description="port of the operator API")
    health_port: Port = Field(
        default=9445, description="port of the gRPC health service, on the same address"
    )


class TlsSection(Section):
    """Certificates (PEM); hospitals and operators check the same one."""

    certificate: Place = Field(default=Path("tls/server.crt"), description="the server's chain")
    key: Place = Field(default=Path("tls/server.key"), description="its private key")
    ca: Place = Field(
        default=Path("tls/ca.crt"), description="the authority that hospitals and operators trust"
    )


class DatabaseSection(Section):
    """The registry."""

    url: str = Field(
        default="",
        description="SQLAlchemy URL, such as `postgresql+psycopg://user:password@host/fedward`; "
        "empty: SQLite in the state folder",
    )

    @field_validator("url")
    @classmethod
    def _known(cls, value: str) -> str:
        try:
            known = not value or make_url(value).drivername in {"sqlite", "postgresql+psycopg"}
        except ArgumentError:
            known = False
        if not known:
            raise ValueError("must be a URL of SQLite or PostgreSQL; begin with postgresql+psycopg")
        return value


class LimitsSection(Section):
    """What one caller, or one machine, may take."""

    request_bytes: int = Field(
        default=2_000_000, ge=10_000, description="largest request that the API reads, in bytes"
    )
    requests_per_minute: int = Field(default=600, ge=1, description="per token")
    failures_per_minute: int = Field(
        default=20,
        ge=1,
        description="requests without a valid token, per token prefix and network, before the "
        "answers to more of them are 429 and slow; a valid token is served all the same",
    )
    unauthenticated_connections: int = Field(
        default=256,
        ge=8,
        description="connections of callers that have not shown a valid signature or token, per "
        "port; beyond it the oldest of the network with the most is closed",
    )
    unauthenticated_connections_per_network: int = Field(
        default=64,
        ge=4,
        description="the same from one IPv4 address or one /64 of IPv6; raise it where all callers "
        "come through one proxy",
    )
    unauthenticated_seconds: float = Field(
        default=20.0,
        gt=0.0,
        strict=False,
        description="how long such a connection may last, TLS handshake included",
    )
    free_bytes: int = Field(
        default=1_000_000_000,
        ge=0,
        description="room on the state folder's disk below which the service is not ready",
    )


class ServerConfig(Section):
    """The whole file."""

    version: Literal[1] = Field(description="of this file's format")
    server: ServerSection = ServerSection()
    sites: SitesSection = SitesSection()
    api: ApiSection = ApiSection()
    tls: TlsSection = TlsSection()
    database: DatabaseSection = DatabaseSection()
    limits: LimitsSection = LimitsSection()

    @property
    def database_url(self) -> str:
        """URL of the registry."""
        return self.database.url or f"sqlite:///{self.server.state / 'registry.db'}"

    @property
    def superlink_database(self) -> Path:
        """Flower's own database."""
        return self.server.state / "superlink.db"

    @property
    def connection_limits(self) -> ConnectionLimits:
        """What callers may hold of a port before they are known."""
        limits = self.limits
        return ConnectionLimits(
            limits.unauthenticated_connections,
            limits.unauthenticated_connections_per_network,
            limits.unauthenticated_seconds,
        )

    @property
    def superlink_address(self) -> str:
        """Where this machine finds the SuperLink (host:port)."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.sites.address, self.sites.address)
        return host_and_port(host, self.sites.port)

    @property
    def studies(self) -> Path:
        """Folder of the studies' checkpoints and models."""
        return self.server.state / "studies"

    @property
    def weights(self) -> Path:
        """Folder of the weights files that plans start from."""
        return self.server.state / "weights"

    def study_folder(self, study: str) -> Path:
        """Folder of one study; the delivered model in it is ``model.safetensors``."""
        return self.studies / study

    @property
    def coordinator_key(self) -> Path:
        """Ed25519 key with which studies are signed (PKCS #8, PEM)."""
        return self.server.keys / "coordinator.key"

    @property
    def ca_key(self) -> Path:
        """Key of ``init``'s own authority; there is none of one that was brought."""
        return self.tls.ca.with_name("ca.key")

    @property
    def control_secret(self) -> Path:
        """What a caller of the SuperLink's Control API must show."""
        return self.server.keys / "control.secret"

    @property
    def runtime_secret(self) -> Path:
        """What a study's run must show to the SuperLink."""
        return self.server.keys / "runtime.secret"

    @property
    def local_token(self) -> Path:
        """Token of commands on this machine."""
        return self.server.keys / "local.token"

    @property
    def api_url(self) -> str:
        """Where commands on this machine find the API."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.api.address, self.api.address)
        return f"https://{host_and_port(host, self.api.port)}"


def load_config(path: Path) -> ServerConfig:
    """Read and validate ``server.toml``; relative paths in it are relative to its folder.

    Raises
    ------
    ConfigError
        The file is missing, is not TOML, or breaks a rule; the message names the key.
    """
    try:
        text = path.read_text("utf-8-sig")
        content = tomllib.loads(text)
    except (OSError, UnicodeDecodeError):
        raise ConfigError(
            "the server's configuration must be a readable UTF-8 file",
            value=path.name,
            fix="Give its place with --config, or make it with fedward-server init",
        ) from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(
            "the server's configuration must be valid TOML", value=str(error), fix="Mend that line"
        ) from None
    return config_from(content, path.absolute().parent, text)


def config_from(content: dict[str, Any], folder: Path, text: str = "") -> ServerConfig:
    """Validate a configuration given as nested dictionaries (see :func:`load_config`).

    With the TOML text that holds it, errors name lines.
    """
    raw = validated(ServerConfig, content, ConfigError, text)
    ports = [raw.sites.port, raw.api.port, raw.api.health_port]
    if len(set(ports)) < len(ports):
        wrong = ConfigError(
            "the ports must differ", value=ports, fix="Change one", where="api.port"
        )
        raise together([wrong], lines(text))
    server, tls = raw.server, raw.tls
    return raw.model_copy(
        update={
            "server": server.model_copy(
                update={"state": folder / server.state, "keys": folder / server.keys}
            ),
            "tls": TlsSection(
                certificate=folder / tls.certificate, key=folder / tls.key, ca=folder / tls.ca
            ),
        }
    )
