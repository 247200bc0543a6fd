"""What the commands share: the site, its indexes, and how answers are printed."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from fedward.console import Console, say
from fedward.errors import DataError

if TYPE_CHECKING:
    from fedward_client.cohort.open import FrozenCohort
    from fedward_client.config import DatasetSection, SiteConfig
    from fedward_client.data.sample import Dataset
    from fedward_client.index.extract import Extractor
    from fedward_client.index.scan import Summary
    from fedward_client.index.store import Index

_EVERY: Final = 5.0  # seconds between two lines


@dataclass(frozen=True)
class Work:
    """A dataset that a command works on, its index brought up to date.

    Attributes
    ----------
    site : SiteConfig
        The hospital.
    name : str
        The dataset.
    index : Index
        Open.
    extract : Extractor
        Knows the files' names in the index.
    """

    site: SiteConfig
    name: str
    index: Index
    extract: Extractor

    @property
    def dataset(self) -> DatasetSection:
        """The dataset's configuration."""
        return self.site.dataset(self.name)

    def open_cohort(self, which: str) -> FrozenCohort:
        """One of the dataset's frozen cohorts.

        Raises
        ------
        DataError
            It has changed, or its labels are not those that the configuration now tells of.
        """
        from fedward_client.cohort.open import open_cohort

        with busy(f"{self.name}: verifying the frozen cohort"):
            cohort = open_cohort(self.site, self.name, which, secret=self.extract.secret)
        if cohort.task != self.dataset.as_task():
            raise DataError(
                "a frozen cohort must have the task and classes of its dataset in site.toml",
                fix="Freeze it again, or put them back",
                where=cohort.name,
            )
        return cohort

    def samples(self, which: str | None, *, strict: bool = False) -> tuple[str, Dataset]:
        """The name and the samples of a frozen cohort; "" and the usable ones without any.

        With these comes what was left out; of a cohort that is not known any more.

        Raises
        ------
        DataError
            `strict`: the site's rule for patient ids refuses the dataset.
        """
        from fedward_client.cohort.freeze import check_patients, usable

        if which is not None:
            cohort = self.open_cohort(which)
            return cohort.name, cohort.dataset
        with reading(self.name) as listen:
            found = usable(self.dataset, self.index, self.extract, listen)
        if strict:
            check_patients(self.dataset, found)
        return "", found


def load_site(path: Path) -> SiteConfig:
    """The site's configuration; a dataset must be there only when it is used."""
    from fedward_client.config import load_config

    return load_config(path, datasets_here=False)


@contextmanager
def work_on(site: SiteConfig, name: str) -> Iterator[Work]:
    """Index what is new, then give what a command needs."""
    from fedward_client.index.store import open_index

    scan_dataset(site, name)
    with open_index(site.site.state, name) as found:
        yield Work(site, name, found, extractor(site, name))


def scan_dataset(site: SiteConfig, name: str) -> Summary:
    """Bring a dataset's index up to date, and say how far that is."""
    from fedward_client.index.scan import scan
    from fedward_client.index.store import open_index

    extract = extractor(site, name)
    with open_index(site.site.state, name) as found:
        first = "indexing for the first time" if not found.count() else "looking for changes"
        say(f"{name}: {first}", err=True)
        with busy(f"{name}: indexing") as tell:
            return scan(
                extract,
                found,
                listen=lambda s: tell(f"{name}: {s.new} files read, {s.unchanged} known"),
            )


def extractor(site: SiteConfig, name: str) -> Extractor:
    """What reads the files of a dataset, which must be there.

    Raises
    ------
    ConfigError
        It is not.
    """
    from fedward_client.data.dataset import detect, masks_beside
    from fedward_client.index.extract import Extractor
    from fedward_client.secret import site_secret

    dataset = site.present(name)
    format = dataset.format or detect(dataset.root)
    beside = None
    if dataset.as_task().has_masks:
        beside = masks_beside(
            dataset.root,
            format,
            dataset.masks.options().suffix,
            dataset.channel_options(),
            dataset.dimensions,
        )
    return Extractor(
        dataset.root,
        format,
        site_secret(site.site.state),
        dataset.patients.options(),
        beside.suffix if beside else "",
    )


@contextmanager
def reading(name: str) -> Iterator[Callable[[int, int], None]]:
    """The same while headers and labels are read; what it yields is told how far that is."""
    text = f"{name}: reading headers and labels"
    with busy(text) as tell:
        yield lambda done, of: tell(f"{text}, {done} of {of} files")


@contextmanager
def busy(text: str) -> Iterator[Callable[[str], None]]:
    """A line on standard error that moves while something takes its time.

    Where that is no terminal, a line every few seconds.
    """
    if not sys.stderr.isatty():
        with _lines(text) as tell:
            yield tell
        return
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as progress:
        shown = progress.add_task(text)
        yield lambda now: progress.update(shown, description=now)


@contextmanager
def _lines(text: str) -> Iterator[Callable[[str], None]]:
    now, began, done = [text], time.monotonic(), threading.Event()

    def tell() -> None:
        while not done.wait(_EVERY):
            say(f"{now[0]} ({time.monotonic() - began:.0f} s)", err=True)

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield lambda new: now.__setitem__(0, new)
    finally:
        done.set()
        teller.join()
