"""What the command line says beside the plan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedward.errors import ConfigError
from fedward_client.config import DatasetSection, SiteConfig, load_config
from fedward_client.data.readers.registry import Format

Engine = Literal["local", "ray"]


@dataclass(frozen=True)
class Hospital:
    """A hospital that brings a frozen cohort.

    Attributes
    ----------
    config : Path
        Its ``site.toml``.
    dataset : str
        Whose latest cohort is taken; "" for its only dataset.
    """

    config: Path
    dataset: str = ""

    @classmethod
    def parse(cls, text: str) -> Hospital:
        """From ``PATH`` or ``PATH:DATASET``."""
        path, colon, dataset = text.rpartition(":")
        # A path may hold a colon itself.
        if not colon or Path(text).exists():
            return cls(Path(text))
        return cls(Path(path), dataset)

    def configured(self) -> tuple[SiteConfig, str]:
        """Its configuration, and the name of the dataset, which must be there.

        Raises
        ------
        ConfigError
            The configuration is broken, or the dataset has to be named.
        """
        config = load_config(self.config, datasets_here=False)
        name = self.dataset or next(iter(config.datasets))
        if not self.dataset and len(config.datasets) > 1:
            raise ConfigError(
                "a site with several datasets needs one of them named",
                value=", ".join(sorted(config.datasets)),
                fix="Name it after a colon: site.toml:DATASET",
                where=config.site.name,
            )
        config.present(name)
        return config, name


def is_config(data: Path) -> bool:
    """Whether ``--data`` names a site's configuration, and not the data themselves."""
    return Path(data.name.partition(":")[0]).suffix == ".toml"


@dataclass(frozen=True)
class Options:
    """What is to be run, and how.

    Attributes
    ----------
    data : Path or None
        A dataset to divide; None when there are `hospitals`.
    hospitals : tuple of Hospital
        Or: those that bring frozen cohorts.
    private_counts : bool
        Whether the federated arms are evaluated with noisy counts, as hospitals with the default
        policy send them.
    policy : Path or None
        A ``site.toml`` whose policy all hospitals have; None: everything is allowed.
    exact : bool
        Whether figures leave as they were counted, whatever the policy says of them.
    cache_gib : float or None
        GiB that prepared images of `data` may take; None for no bound.
    patient_column : str
        The column of the tables of `data` that names the patients; "": found by name.
    patient_folder : int
        Which folder on the path of an image of `data` is its patient, from 1; 0: none.
    images_are_patients : bool
        Whether each image of `data` is of another person, where the data name no patients.
    dataset : DatasetSection or None
        What a site's configuration says of `data`.
    evaluate_only : tuple of str
        Hospitals that take no part in training; the finished models are tested there.
    fresh : bool
        Whether to leave aside the state of an unfinished run in `out`.
    checkpoint_seconds : float
        Least time between two writes of a run's state; 0 writes after each round.
    """

    data: Path | None
    out: Path
    format: Format | None = None
    partition: str = "folders"
    sites: int | None = None
    engine: Engine = "local"
    device: str = "auto"
    baselines: bool = False
    leave_one_out: bool = False
    evaluate_only: tuple[str, ...] = ()
    epsilons: tuple[float, ...] = ()
    seed: int = 0
    plan_folder: Path | None = None
    hospitals: tuple[Hospital, ...] = ()
    cache_gib: float | None = None
    private_counts: bool = False
    policy: Path | None = None
    exact: bool = False
    patient_column: str = ""
    patient_folder: int = 0
    images_are_patients: bool = False
    dataset: DatasetSection | None = None
    fresh: bool = False
    checkpoint_seconds: float = 10.0

    @property
    def division(self) -> str:
        """How the data come to be divided, for the report."""
        return "frozen cohorts" if self.hospitals else self.partition

    @property
    def cache_bytes(self) -> int | None:
        """Bytes that the cache may take; None for no bound."""
        return None if self.cache_gib is None else round(self.cache_gib * 2**30)
