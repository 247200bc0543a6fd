"""Put a backup back, in place of what is there; nothing that was there is ever deleted."""

from __future__ import annotations

import shutil
import sqlite3
import tarfile
import tempfile
import zlib
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Final

from fedward.errors import ConfigError, OutputError
from fedward.files import alone
from fedward_server.backup import FORMAT, REGISTRY, folders, key_files, registry_file
from fedward_server.config import ServerConfig
from fedward_server.registry.database import open_database
from fedward_server.registry.transfer import copy_registry

_KNOWN: Final = ("keys", REGISTRY, "studies", "tls", "weights")


@dataclass(frozen=True)
class Restored:
    """What was put back.

    Attributes
    ----------
    parts : list of str
        Parts of the archive.
    aside : str
        Folder in the state folder with what was there before.
    """

    parts: list[str]
    aside: str


def restore(config: ServerConfig, source: Path) -> Restored:
    """Put an archive back; the registry first, so that one that cannot be loaded changes nothing.

    Raises
    ------
    ConfigError
        The file is no backup, or is damaged.
    ServiceError
        The service runs.
    OutputError
        The state folder cannot be written.
    """
    state = config.server.state
    try:
        with (
            alone(state, "run"),
            alone(state, "service"),
            tempfile.TemporaryDirectory(dir=state) as name,
        ):
            found = _unpack(source, Path(name))
            aside = _new_aside(state)
            if REGISTRY in found:
                _put_registry(config, Path(name) / REGISTRY, aside)
            _put_files(config, Path(name), aside)
            # Its runs and node numbers belong to the time before.
            for path in state.glob(config.superlink_database.name + "*"):
                path.replace(aside / path.name)
    except OSError as error:
        raise OutputError(
            "the aggregator's folders must be writable",
            value=error.strerror,
            fix="Free some space; what was there is in the newest state/before-restore",
        ) from None
    return Restored(found, aside.name)


def _new_aside(state: Path) -> Path:
    for number in count(1):
        aside = state / ("before-restore" if number == 1 else f"before-restore-{number}")
        try:
            aside.mkdir(mode=0o700)
        except FileExistsError:
            continue
        return aside
    raise AssertionError


def _put_registry(config: ServerConfig, archived: Path, aside: Path) -> None:
    place = registry_file(config)
    if place is None:
        copy_registry(config.database_url, f"sqlite:///{aside / REGISTRY}")
        copy_registry(f"sqlite:///{archived}", config.database_url)
        return
    # What was written last may stand beside the file alone.
    for left in ("-wal", "-shm"):
        beside = place.with_name(place.name + left)
        if beside.exists():
            shutil.move(beside, aside / (REGISTRY + left))
    _swap(archived, place, aside / REGISTRY)


def _put_files(config: ServerConfig, new: Path, aside: Path) -> None:
    for name, place in (folders(config) | key_files(config)).items():
        if (new / name).exists():
            (aside / name).parent.mkdir(mode=0o700, exist_ok=True)
            place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _swap(new / name, place, aside / name)


def _swap(new: Path, place: Path, aside: Path) -> None:
    if place.exists():
        shutil.move(place, aside)
    shutil.move(new, place)
    private = place.suffix not in (".crt", ".pub")
    place.chmod(0o700 if place.is_dir() else 0o600 if private else 0o644)


def _unpack(source: Path, folder: Path) -> list[str]:
    with _opened(source) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:gz") as archive:
                _extract(archive, folder)
            if (folder / REGISTRY).exists():
                _check_registry(folder / REGISTRY)
        except (tarfile.TarError, EOFError, OSError, IndexError, zlib.error, ValueError) as error:
            if isinstance(error, OSError) and error.errno:
                raise
            raise _broken(source) from None
    return [one for one in _KNOWN if (folder / one).exists()]


def _opened(source: Path) -> BinaryIO:
    try:
        return source.open("rb")
    except OSError as error:
        raise ConfigError(
            "a backup must be a readable file",
            value=f"{source.name}: {error.strerror}",
            fix="Check its name, and its owner",
        ) from None


def _extract(archive: tarfile.TarFile, folder: Path) -> None:
    first = archive.next()
    text = archive.extractfile(first) if first and first.name == "FORMAT" else None
    if text is None or text.read() != FORMAT.encode():
        raise ValueError
    members = [one for one in archive.getmembers() if one.name != "FORMAT"]
    if any(PurePosixPath(one.name).parts[0] not in _KNOWN for one in members):
        raise ValueError
    archive.extractall(folder, members, filter="data")


def _check_registry(path: Path) -> None:
    try:
        with closing(sqlite3.connect(path)) as found:
            told = found.execute("PRAGMA integrity_check").fetchone()
            found.execute("SELECT count(*) FROM studies")
    except sqlite3.Error:
        raise ValueError from None
    if told != ("ok",):
        raise ValueError
    open_database(f"sqlite:///{path}").dispose()  # one of a newer release is refused here


def _broken(source: Path) -> ConfigError:
    return ConfigError(
        "a backup must be a whole archive that `fedward-server backup` wrote",
        value=source.name,
        fix="Take another one",
    )
