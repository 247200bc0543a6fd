"""``site.toml``: what a hospital says about itself and its datasets."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from ipaddress import IPv6Address
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError

from fedward.config_section import DatasetName, Place, Section, validate_config
from fedward.errors import ConfigError, FedwardError, together
from fedward.plan.messages import lines, schema_errors, validated
from fedward.plan.schema import ColumnName, Task, TaskKind
from fedward.protocol import SITE_NAME
from fedward.tasks.registry import TASKS, kinds_of
from fedward_client.data.options import (
    BoxSection,
    ChannelOptions,
    ChannelSection,
    ColumnSection,
    DeidentificationSection,
    ImageSection,
    LabelOptions,
    LabelSection,
    MaskSection,
    PatientSection,
)
from fedward_client.data.readers.dicom.kinds import ImageOptions
from fedward_client.data.readers.registry import Format, formats
from fedward_client.importer.settings import FetchSection, ImporterSection, PacsSection
from fedward_client.policy.settings import PolicySection

# The parts of ``site.toml`` that the daemon needs: the aggregator, and the two processes.

_MOST_PORT: Final = 65535


def _real_port(address: str) -> str:
    host, _, port = address.rpartition(":")
    if not 1 <= int(port) <= _MOST_PORT:
        raise ValueError(f"a port lies in 1 to {_MOST_PORT}; ask the coordinator for it")
    inner = host.removeprefix("[").removesuffix("]")
    if host == inner and ":" not in host:
        return address
    with suppress(ValueError):
        IPv6Address(inner)
        if host == f"[{inner}]":
            return address
    raise ValueError("an IPv6 address stands in brackets; write it as in [2001:db8::1]:9443")


def _real_proxy(proxy: str) -> str:
    """A proxy, whose password is never shown."""
    with suppress(ValueError):
        found = urlsplit(proxy)
        known = found.scheme in ("http", "https") and bool(found.hostname)
        if not proxy or (known and found.port != 0 and not re.search(r"\s", proxy)):
            return proxy
    raise ValueError("a proxy is written http://host:port; ask who runs the network here")


Address = Annotated[
    str, Field(pattern=r"^[^\s/\"\\]+:[0-9]{1,5}$", max_length=260), AfterValidator(_real_port)
]
Mebibytes = Annotated[int, Field(ge=1, le=4096)]


class ServerSection(Section):
    """The aggregator, and the process that talks to it."""

    address: Address = Field(description="host and port of the aggregator, `host:port`")
    ca: Place = Field(description="certificate authority of the aggregator, PEM")
    state: Place = Field(
        default=Path("connector"),
        description="the connector's own folder: the site's key, and messages in hand; it must lie "
        "outside datasets and the site's state",
    )
    proxy: Annotated[str, AfterValidator(_real_proxy)] = Field(
        default="",
        description="HTTP proxy, `http://host:port`; without it that of the environment "
        "(`HTTPS_PROXY`, `NO_PROXY`)",
    )
    user: str = Field(
        default="",
        description="user that the connector runs as when the daemon is started by root",
    )
    max_download_mib: Mebibytes = Field(default=1024, description="largest message taken, MiB")
    retry_seconds: float = Field(
        default=60.0, gt=0.0, le=3600.0, description="longest pause before the link is tried again"
    )
    idle_seconds: float = Field(
        default=20.0,
        gt=0.0,
        le=60.0,
        description="longest time that a question to the aggregator is held open while there is "
        "nothing to do, at most 25; for proxies that end quiet connections sooner",
    )


class TrainerSection(Section):
    """The process that reads the images."""

    socket: Place = Field(
        default=Path("run/trainer.sock"),
        description="Unix socket between the two processes; its folder must lie outside datasets "
        "and the site's state",
    )
    group: str = Field(
        default="", description="group that may connect to the socket; without it, the owner alone"
    )
    device: str = Field(
        default="auto", pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$", description="where to train"
    )
    threads: int = Field(
        default=0,
        ge=0,
        le=1024,
        description="CPU threads, and processes that read images; 0: all cores",
    )
    physical_batch: int = Field(default=64, ge=1, description="images on the device at once")
    allow_networked_trainer: bool = Field(
        default=False,
        description="train although the trainer has a network; status and audit then shout it",
    )
    allow_unconfined_connector: bool = Field(
        default=False,
        description="carry out orders although the connector can read images; status and audit "
        "then shout it",
    )
    watchdog_seconds: float = Field(
        default=20.0,
        ge=2.0,
        le=3600.0,
        description="longest time in which no thread of the trainer gets to run; then it is ended "
        "and started again, and the order that it had in hand is refused from then on",
    )


class SiteSection(Section):
    """The hospital."""

    name: str = Field(pattern=SITE_NAME, description="the site's name, as studies know it")
    state: Place = Field(
        default=Path("state"),
        description="folder for the index and the site's secret; only its owner can read what is "
        "in it",
    )
    cache_gib: float = Field(
        default=50.0,
        gt=0,
        allow_inf_nan=False,
        description="GiB that prepared images, and what frozen layers make of them, may take in "
        "the state folder; those that were used longest ago make room",
    )


class DatasetSection(Section):
    """One dataset."""

    root: Place = Field(description="folder (or npz file) of the images; never written to")
    format: Format | None = Field(
        default=None,
        description=f"how the data lie ({formats()}); without it the folder is looked at",
    )
    task: TaskKind = Field(description="what the labels are for")
    dimensions: Annotated[Literal[2, 3], BeforeValidator(validate_config)] = Field(
        default=2, description="2 for images, 3 for volumes"
    )
    classes: tuple[str, ...] = Field(
        min_length=1, description="class names in label order, as in a study plan"
    )
    multi_label: bool = Field(
        default=False, description="an image may carry several classes at once"
    )
    modality: tuple[str, ...] = Field(
        default=("any",), description="DICOM modalities that belong to the dataset"
    )
    minimum_patients: int = Field(
        default=10, ge=1, description="fewer patients, in all or of a class, are a risk"
    )
    images_are_patients: bool = Field(
        default=False,
        description="each image is of another person, where the data name no "
        "patients. Without it a private study is refused on such data; with it every promise is "
        "about an image",
    )
    patients: PatientSection = Field(default=PatientSection(), description="patient ids")
    images: ImageSection = Field(default=ImageSection(), description="which DICOM images are taken")
    deidentification: DeidentificationSection = Field(
        default=DeidentificationSection(), description="DICOM images that are not de-identified"
    )
    labels: LabelSection = Field(default=LabelSection(), description="the table of labels")
    table: dict[ColumnName, ColumnSection] = Field(
        default={},
        description="columns of the table of labels that studies may read beside the images, by "
        "the plan's name for each; a frozen cohort keeps their values, which stay at the site",
    )
    masks: MaskSection = Field(default=MaskSection(), description="segments and regions")
    boxes: BoxSection = Field(default=BoxSection(), description="boxes of a detection")
    channels: dict[ColumnName, ChannelSection] = Field(
        default={},
        max_length=16,
        description="named channels of the images, by the plan's name for each; without any an "
        "image serves a plan that names as many as it has planes",
    )
    fetch: FetchSection | None = Field(
        default=None, description="what is fetched from a PACS into `root`"
    )

    def channel_options(self) -> dict[str, ChannelOptions]:
        """Where the channels of an image are, for a reader."""
        return {name: one.options() for name, one in self.channels.items()}

    def label_options(self) -> LabelOptions:
        """How the table of labels is read, for a reader."""
        return self.labels.options(self.table)

    def image_options(self) -> ImageOptions:
        """Which DICOM images are taken, for a reader."""
        return self.deidentification.options(self.images)

    @property
    def masks_mark(self) -> bool:
        """Whether masks say what is in an image."""
        target = TASKS[self.task].target
        return target == "masks" or (target == "boxes" and self.boxes.source == "masks")

    def as_task(self) -> Task:
        """The dataset's labels, in the words of a plan."""
        return Task.model_validate(
            {
                "kind": self.task,
                "dimensions": self.dimensions,
                "classes": self.classes,
                "multi_label": self.multi_label,
                "modality": self.modality,
            }
        )


class SiteConfig(Section):
    """The whole file."""

    version: Annotated[Literal[1], BeforeValidator(validate_config)] = Field(
        description="of this file's format"
    )
    site: SiteSection = Field(description="the hospital")
    datasets: dict[DatasetName, DatasetSection] = Field(
        min_length=1, description="one table per dataset, `[datasets.NAME]`"
    )
    server: ServerSection | None = Field(
        default=None, description="the aggregator; only the daemon needs it"
    )
    trainer: TrainerSection = Field(
        default=TrainerSection(), description="the process that reads the images"
    )
    policy: PolicySection = Field(
        default=PolicySection(), description="what studies may do here; without it: nothing"
    )
    pacs: dict[DatasetName, PacsSection] = Field(
        default={},
        description="one table per PACS that images are fetched from or results stored in, "
        "`[pacs.NAME]`",
    )
    importer: ImporterSection = Field(
        default=ImporterSection(), description="the process that talks to the PACS"
    )

    def dataset(self, name: str) -> DatasetSection:
        """A dataset by its name.

        Raises
        ------
        ConfigError
            There is none of that name.
        """
        if name not in self.datasets:
            raise ConfigError(
                f"the dataset must be one of {', '.join(sorted(self.datasets))}",
                value=name,
                fix="Name one of these, or add it to site.toml",
                where="datasets",
            )
        return self.datasets[name]

    def pacs_for(self, name: str | None, dataset: DatasetSection | None = None) -> str:
        """Name of the PACS that results go to.

        Parameters
        ----------
        name : str or None
            As the command line has it; None: the dataset's, else the only one.
        dataset : DatasetSection, optional
            Whose images the results are about.

        Raises
        ------
        ConfigError
            There is none of that name, or none is named where there is not one alone.
        """
        if name is None and dataset is not None and dataset.fetch is not None:
            name = dataset.fetch.pacs
        if name is None and len(self.pacs) == 1:
            (name,) = self.pacs
        if name not in self.pacs:
            raise ConfigError(
                f"the PACS must be one of {', '.join(sorted(self.pacs)) or 'those in site.toml'}",
                value=name or "none",
                fix="Name one with --pacs" if self.pacs else "Add [pacs.NAME]",
                where="pacs",
            )
        return name

    def present(self, name: str) -> DatasetSection:
        """A dataset that is to be read now.

        Raises
        ------
        ConfigError
            There is none of that name, or its folder or its table of labels is not there.
        """
        if missing := list(self.missing(name)):
            raise together(missing)
        return self.dataset(name)

    def missing(self, name: str) -> Iterator[ConfigError]:
        """What a dataset names and is not there."""
        dataset = self.dataset(name)
        for key, rule, there in (
            ("root", "the dataset must exist", dataset.root.exists()),
            *(
                (f"{key}.file", f"the table of {key} must exist", file is None or file.is_file())
                for key, file in (("labels", dataset.labels.file), ("boxes", dataset.boxes.file))
            ),
        ):
            if not there:
                yield ConfigError(
                    rule, fix="Check the path and the mount", where=f"datasets.{name}.{key}"
                )


def hidden_places(config: SiteConfig) -> list[Path]:
    """What the connector must not see: the site's state, the datasets, their tables of labels.

    And what the importer knows of the PACS.
    """
    sets = config.datasets.values()
    tables = [file for one in sets for file in (one.labels.file, one.boxes.file)]
    tables += [one.fetch.worklist for one in sets if one.fetch]
    tables += [file for one in config.pacs.values() for file in (one.token, one.key)]
    return [
        config.site.state,
        *(one.root for one in sets),
        *(table for table in tables if table is not None),
        *([config.importer.state] if config.pacs else []),
    ]


def importer_hidden_places(config: SiteConfig) -> list[Path]:
    """What the importer must not see: ledger, audit log, the trainer's socket, the site's key."""
    connector = [config.server.state] if config.server else []
    return [config.site.state, config.trainer.socket.parent, *connector]


def trusted_places(config: SiteConfig) -> list[Path]:
    """What the connector must not be able to change: this release, and whom the site trusts."""
    return [Path(__file__).parent, *([config.server.ca] if config.server else [])]


def load_config(path: Path, *, datasets_here: bool = True) -> SiteConfig:
    """Read and validate ``site.toml``; relative paths in it are relative to its folder.

    Parameters
    ----------
    path : Path
        The file.
    datasets_here : bool
        Whether all datasets must exist; see :meth:`SiteConfig.present` for the one that is used.

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
            "the site's configuration must be a readable UTF-8 file",
            value=path.name,
            fix="Give its place with --config",
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            "the site's configuration must be valid TOML", value=str(error), fix="Mend that line"
        ) from None
    except RecursionError:
        raise ConfigError(
            "the site's configuration is at most a few tables deep",
            fix="Flatten its nested lists and tables",
        ) from None
    return config_from(content, path.absolute().parent, text, datasets_here=datasets_here)


def config_from(
    content: dict[str, Any], folder: Path, text: str = "", *, datasets_here: bool = True
) -> SiteConfig:
    """Validate a configuration given as nested dictionaries (see :func:`load_config`).

    With the TOML text that holds it, errors name lines.
    """
    raw = validated(SiteConfig, content, ConfigError, text)
    placed = {name: _placed(one, folder) for name, one in raw.datasets.items()}
    state = folder / raw.site.state
    made = raw.model_copy(
        update={
            "site": raw.site.model_copy(update={"state": state}),
            "datasets": placed,
            "server": raw.server and _placed_server(raw.server, folder),
            "trainer": raw.trainer.model_copy(update={"socket": folder / raw.trainer.socket}),
            "pacs": {name: one.placed(folder) for name, one in raw.pacs.items()},
            "importer": raw.importer.model_copy(update={"state": folder / raw.importer.state}),
        }
    )
    if wrong := list(_wrong(made, datasets_here)):
        raise together(wrong, lines(text))
    return made


def _wrong(config: SiteConfig, datasets_here: bool) -> Iterator[FedwardError]:
    """Each broken rule between keys."""
    for name, one in config.datasets.items():
        yield from _wrong_dataset(name, one)
        if config.site.state.resolve().is_relative_to(one.root.resolve()):
            yield ConfigError(
                "the state folder must not lie inside a dataset",
                fix="Put it elsewhere",
                where="site.state",
            )
        if datasets_here:
            yield from config.missing(name)
        if one.fetch is not None and one.fetch.pacs not in config.pacs:
            yield ConfigError(
                "the PACS must be one of those in site.toml",
                value=one.fetch.pacs,
                fix=f"Add [pacs.{one.fetch.pacs}], or name another",
                where=f"datasets.{name}.fetch.pacs",
            )
    yield from _wrong_places(config)
    yield from _wrong_importer(config)
    for place, rule in enumerate(config.policy.studies):
        if rule.dataset not in config.datasets:
            yield ConfigError(
                f"the dataset must be one of {', '.join(sorted(config.datasets))}",
                value=rule.dataset,
                fix="Name one of these, or add it to site.toml",
                where=f"policy.studies.{place}.dataset",
            )


def _placed_server(server: ServerSection, folder: Path) -> ServerSection:
    return server.model_copy(update={"ca": folder / server.ca, "state": folder / server.state})


def _wrong_places(config: SiteConfig) -> Iterator[FedwardError]:
    """What the connector may see must not lie where the images or the secrets are."""
    hidden = hidden_places(config)
    seen = {"trainer.socket": config.trainer.socket.parent}
    if config.server is not None:
        seen |= {"server.state": config.server.state, "server.ca": config.server.ca}
    for where, place in seen.items():
        if any(place.resolve().is_relative_to(one.resolve()) for one in hidden):
            yield ConfigError(
                "what the connector needs must lie outside datasets and the site's state",
                fix="Put it elsewhere",
                where=where,
            )


def _wrong_importer(config: SiteConfig) -> Iterator[FedwardError]:
    for name, pacs in config.pacs.items():
        for key, rule, fix in pacs.broken():
            yield ConfigError(rule, fix=fix, where=f"pacs.{name}.{key}")
    roots = [one.root for one in config.datasets.values()]
    apart = [*importer_hidden_places(config), *roots] if config.pacs else []
    state = config.importer.state.resolve()
    if any(state.is_relative_to(place.resolve()) for place in apart):
        yield ConfigError(
            "the importer's folder must lie outside datasets and what the other processes keep",
            fix="Put it elsewhere",
            where="importer.state",
        )


def _placed(dataset: DatasetSection, folder: Path) -> DatasetSection:
    labels = dataset.labels.placed(folder)
    fetch = dataset.fetch and dataset.fetch.placed(folder)
    boxes = dataset.boxes.placed(folder)
    own = {"root": folder / dataset.root, "labels": labels, "boxes": boxes, "fetch": fetch}
    return dataset.model_copy(update=own)


def _wrong_dataset(name: str, dataset: DatasetSection) -> Iterator[FedwardError]:
    try:
        dataset.as_task()
    except ValidationError as error:
        for one in schema_errors(error, ConfigError, Task):
            where = f"datasets.{name}.{one.where}"
            yield ConfigError(one.rule, value=one.value, fix=one.fix, where=where)
    for key, rule, fix in _broken(dataset):
        yield ConfigError(rule, fix=fix, where=f"datasets.{name}.{key}")


def _broken(dataset: DatasetSection) -> Iterator[tuple[str, str, str]]:
    """Rules between keys, which a plan has too: no plan could be served otherwise."""
    spec = TASKS[dataset.task]
    if len(set(dataset.classes)) != len(dataset.classes):
        yield "classes", "class names must differ", "Rename one"
    yield from spec.rules(dataset.classes, dataset.multi_label)
    if not dataset.masks_mark and dataset.masks != MaskSection():
        yield "masks", f"masks belong to {kinds_of('masks')}", "Remove the section"
    if spec.target != "boxes" and dataset.boxes != BoxSection():
        yield "boxes", f"boxes belong to {kinds_of('boxes')}", "Remove the section"
    yield from dataset.boxes.broken(dataset.classes)
    named = LabelSection(patient_column=dataset.labels.patient_column)  # serves `patients.csv`
    if dataset.patients.folder and dataset.labels.patient_column:
        yield "patients.folder", "one thing must name the patients", "Remove labels.patient_column"
    if spec.target != "labels" and dataset.labels != named:
        yield "labels", f"labels belong to {kinds_of('labels')}", "Remove the section"
    if spec.target != "labels" and dataset.table:
        yield "table", f"columns belong to {kinds_of('labels')}", "Remove the section"
    own = [name for name, one in dataset.channels.items() if one.options().by_file]
    if own and len(own) < len(dataset.channels):
        yield "channels", "either all channels have files of their own, or none", "Give each one"
    if own and dataset.format == "dicom":
        yield "channels", "files of channels are pictures or NIfTI files", "Convert the dataset"
    if len({name.casefold() for name in dataset.table}) != len(dataset.table):
        yield "table", "a column must be listed once, in whatever case", "Remove one"
    yield from dataset.labels.broken(dataset.classes, dataset.multi_label)
    yield from dataset.masks.broken(dataset.classes)
    for key, rule, fix in dataset.fetch.broken() if dataset.fetch else ():
        yield f"fetch.{key}", rule, fix
    if "any" in dataset.modality and len(dataset.modality) > 1:
        yield "modality", "`any` stands alone", "List modalities, or only `any`"
