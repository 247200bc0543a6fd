"""``[pacs.NAME]``, ``[importer]`` and ``[datasets.NAME.fetch]`` of ``site.toml``."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from fedward.config_section import DatasetName, Place, Section
from fedward.plan.image_filter import HOW, Patterns
from fedward_client.policy.hours import QuietHours

AeTitle = Annotated[str, Field(max_length=16, pattern=r"^[^\\\x00-\x1f\x7f-\U0010ffff]*$")]
Port = Annotated[int, Field(ge=1, le=65535)]
Modality = Annotated[str, Field(pattern=r"^[A-Z0-9_ ]{1,16}$")]
Broken = Iterator[tuple[str, str, str]]  # key, rule and next step of what does not fit together


class PacsSection(Section):
    """A PACS that images are fetched from, and results stored in."""

    source: Literal["dicomweb", "dimse"] = Field(
        description="`dicomweb`: QIDO-RS, WADO-RS and STOW-RS; `dimse`: C-FIND with C-GET or "
        "C-MOVE, and C-STORE"
    )
    url: str = Field(
        default="",
        pattern=r"^(https?://[^\s/@?#]+[^\s@?#]*)?$",
        max_length=1024,
        description="`dicomweb`: where its services begin, such as `https://pacs/dicom-web`",
    )
    token: Place | None = Field(
        default=None,
        description="`dicomweb`: file with a bearer token, readable by its owner alone",
    )
    host: str = Field(
        default="", max_length=255, pattern=r"^[^\s/]*$", description="`dimse`: name or address"
    )
    port: Port = Field(default=104, description="`dimse`: its port")
    ae_title: AeTitle = Field(default="", description="`dimse`: the PACS's AE title")
    calling_ae_title: AeTitle = Field(
        default="FEDWARD", min_length=1, description="`dimse`: the AE title of this site's importer"
    )
    retrieve: Literal["get", "move"] = Field(
        default="get",
        description="`dimse`: `get`: images come over the same connection (C-GET); `move`: the "
        "PACS opens one to `listen_port` (C-MOVE), and must know host and port of "
        "`calling_ae_title`",
    )
    listen_port: Port = Field(default=11112, description="`move`: port that images are received on")
    tls: bool = Field(default=False, description="`dimse`: speak TLS, 1.2 or newer")
    ca: Place | None = Field(
        default=None, description="certificate authority of the PACS, PEM; TLS needs it"
    )
    certificate: Place | None = Field(
        default=None, description="this site's certificate for the PACS, PEM"
    )
    key: Place | None = Field(default=None, description="its key, PEM, readable by its owner alone")
    timeout_seconds: float = Field(
        default=30.0, gt=0.0, le=3600.0, description="longest silence of the PACS"
    )
    associations: int = Field(
        default=2, ge=1, le=16, description="series that are fetched at the same time"
    )
    max_mib_per_second: float = Field(
        default=0.0, ge=0.0, allow_inf_nan=False, description="bandwidth of all together; 0: any"
    )
    quiet_hours: tuple[str, ...] = Field(
        default=(),
        description='local times without fetching, such as "Mon-Fri 07:00-18:00"; '
        "`policy.timezone` says whose",
    )
    max_object_mib: int = Field(
        default=2048, ge=1, le=65536, description="largest object that is taken, MiB"
    )

    @field_validator("quiet_hours")
    @classmethod
    def _readable(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for one in value:
            QuietHours.parse(one)
        return value

    def broken(self) -> Broken:
        """Key, rule and next step of what does not fit together."""
        web = self.source == "dicomweb"
        for key in ("url",) if web else ("host", "ae_title"):
            if not getattr(self, key):
                yield key, f'it is required with source = "{self.source}"', "Add it"
        other = ("host", "ae_title", "tls") if web else ("url", "token")
        for key in other:
            if getattr(self, key):
                yield key, f'it does not go with source = "{self.source}"', "Remove it"
        if (self.certificate is None) != (self.key is None):
            yield "certificate", "certificate and key belong together", "Name both"
        if self.token is not None and self.certificate is not None:
            yield "token", "a token and a certificate exclude each other", "Keep one"
        encrypted = self.tls or self.url.startswith("https:")
        if encrypted and self.ca is None:
            yield "ca", "TLS needs the authority of the PACS", "Ask who runs it for the PEM file"
        for key in ("ca", "certificate", "token"):
            if getattr(self, key) is not None and not encrypted:
                yield key, "it needs TLS", "Use https, or tls = true with DIMSE"
        if self.tls and self.retrieve == "move" and self.certificate is None:
            yield "certificate", "to receive over TLS needs a certificate", "Name one and its key"

    def placed(self, folder: Path) -> PacsSection:
        """With paths relative to no folder any more."""
        named = {key: getattr(self, key) for key in ("token", "ca", "certificate", "key")}
        return self.model_copy(update={k: folder / place for k, place in named.items() if place})


class ImporterSection(Section):
    """The process that talks to the PACS."""

    state: Place = Field(
        default=Path("importer"),
        description="the importer's own folder: which objects it has fetched and stored; it must "
        "lie outside datasets, the site's state and the connector's",
    )
    reserve_gib: float = Field(
        default=1.0,
        ge=0.0,
        allow_inf_nan=False,
        description="GiB that stay free where the dataset lies; fetching stops before",
    )
    allow_unconfined: bool = Field(
        default=False,
        description="fetch although the importer can read the site's state or reach the trainer's "
        "socket; it then says so",
    )


class FetchSection(Section):
    """What is fetched from a PACS into the dataset: all series that fit every key."""

    pacs: DatasetName = Field(description="name of the PACS, `[pacs.NAME]`")
    modality: tuple[Modality, ...] = Field(
        default=(), description="modalities of series; none: those of the dataset"
    )
    body_part: Patterns = Field(default=(), description=f"`BodyPartExamined` of series: {HOW}")
    study_description: Patterns = Field(default=(), description="`StudyDescription`, likewise")
    series_description: Patterns = Field(default=(), description="`SeriesDescription`, likewise")
    since: date | None = Field(default=None, description="first `StudyDate`, such as 2024-01-01")
    until: date | None = Field(default=None, description="last `StudyDate`")
    worklist: Place | None = Field(
        default=None,
        description="CSV whose column `StudyInstanceUID`, `AccessionNumber` or `PatientID` names "
        "the studies or patients; no other is fetched",
    )
    limit: int = Field(
        default=10_000,
        ge=1,
        le=10_000_000,
        description="studies that the query may find at most; with more nothing is fetched",
    )

    def broken(self) -> Broken:
        """Key, rule and next step of what does not fit together."""
        if self.since and self.until and self.since > self.until:
            yield "since", "it must not be after `until`", "Exchange the two"
        if self.worklist is None and self.since is None:
            yield "worklist", "a query needs a worklist or a first date", "Add one of them"

    def placed(self, folder: Path) -> FetchSection:
        """With paths relative to no folder any more."""
        return self.model_copy(update={"worklist": self.worklist and folder / self.worklist})
