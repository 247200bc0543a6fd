"""Copy an aggregator's state while it runs, and put it back.

Studies first, then the registry: a study that goes on after a restore trains again what the copy
of its checkpoints does not have. Flower's own database is left out; the service enrols the
hospitals at the SuperLink again when it starts, with the keys that the registry has.
"""

from __future__ import annotations

import io
import os
import shutil
import sqlite3
import tarfile
import tempfile
from contextlib import closing
from pathlib import Path, PurePosixPath
from typing import Final

from sqlalchemy.engine import make_url

from fedward.errors import ConfigError, OutputError
from server.config import ServerConfig
from server.registry.transfer import copy_registry

_FORMAT: Final = "fedward aggregator backup 1\n"
_REGISTRY: Final = "registry.db"


def backup(config: ServerConfig, target: Path, *, keys: bool) -> int:
    """Write one archive (tar.gz, mode 0600); gives its size in bytes.

    Parameters
    ----------
    config : ServerConfig
        The aggregator; it may run.
    target : Path
        The archive; not overwritten.
    keys : bool
        Whether the signing key, secrets and certificates go along.

    Raises
    ------
    ConfigError
        The registry cannot be read.
    OutputError
        The archive is there already, or cannot be written.
    """
    part = target.with_name(f".{target.name}.part")
    try:
        if target.exists():
            raise OutputError(
                "a backup overwrites nothing", value=target.name, fix="Name another file"
            )
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "wb") as file:
            with tarfile.open(fileobj=file, mode="w:gz") as archive:
                _add_text(archive, "FORMAT", _FORMAT)
                _add_folder(archive, config.studies, "studies")
                _add_registry(archive, config)
                if keys:
                    _add_folder(archive, config.server.keys, "keys")
                    _add_folder(archive, config.tls.ca.parent, "tls")
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OutputError(
            "the backup must be writable", value=error.strerror, fix="Choose another place"
        ) from None
    return target.stat().st_size


def restore(config: ServerConfig, source: Path) -> list[str]:
    """Put an archive back, in place of what is there; gives what was restored.

    What it replaces is kept beside it under ``before-restore``. The service must not run.

    Raises
    ------
    ConfigError
        The file is no backup, or is damaged.
    OutputError
        The state folder cannot be written.
    """
    registry = _sqlite(config)
    places = {
        "studies": config.studies, "keys": config.server.keys, "tls": config.tls.ca.parent
    }  # fmt: skip
    aside = config.server.state / "before-restore"
    try:
        with tempfile.TemporaryDirectory(dir=config.server.state) as name:
            found = _unpack(source, Path(name))
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(mode=0o700)
            for part in found:
                if part != _REGISTRY:
                    _swap(Path(name) / part, places[part], aside / part)
            if _REGISTRY in found and registry is None:
                _load(config.database_url, Path(name) / _REGISTRY, aside / _REGISTRY)
            elif _REGISTRY in found and registry is not None:
                _swap(Path(name) / _REGISTRY, registry, aside / _REGISTRY)
                for left in ("-wal", "-shm"):
                    registry.with_name(registry.name + left).unlink(missing_ok=True)
            # Its runs and node numbers belong to the time before.
            for path in config.server.state.glob(config.superlink_database.name + "*"):
                path.replace(aside / path.name)
    except OSError as error:
        raise OutputError(
            "the state folder must be writable", value=error.strerror, fix="Free some space"
        ) from None
    return sorted(found)


def _sqlite(config: ServerConfig) -> Path | None:
    """The registry's file; None where it is no file."""
    url = make_url(config.database_url)
    return Path(url.database) if url.get_backend_name() == "sqlite" and url.database else None


def _add_text(archive: tarfile.TarFile, name: str, text: str) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(text)
    archive.addfile(info, io.BytesIO(text.encode()))


def _add_folder(archive: tarfile.TarFile, folder: Path, name: str) -> None:
    """A folder whose parts may be renamed meanwhile; each file is whole, as it was written."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and ".part" not in path.name and "/.part" not in str(path):
            try:
                content = path.read_bytes()
            except FileNotFoundError:
                continue  # an older checkpoint that just made room
            info = tarfile.TarInfo(f"{name}/{path.relative_to(folder).as_posix()}")
            info.size, info.mode = len(content), path.stat().st_mode & 0o777
            archive.addfile(info, io.BytesIO(content))


def _add_registry(archive: tarfile.TarFile, config: ServerConfig) -> None:
    with tempfile.TemporaryDirectory() as folder:
        copy, source = Path(folder) / _REGISTRY, _sqlite(config)
        if source is None:
            copy_registry(config.database_url, f"sqlite:///{copy}")
        else:
            with closing(sqlite3.connect(source)) as live, closing(sqlite3.connect(copy)) as made:
                live.backup(made)
        # Out of write-ahead mode, so that it is one file.
        with closing(sqlite3.connect(copy)) as made:
            made.execute("PRAGMA journal_mode=DELETE")
        archive.add(copy, _REGISTRY)


def _unpack(source: Path, folder: Path) -> list[str]:
    known = {"studies", _REGISTRY, "keys", "tls"}
    try:
        with tarfile.open(source, "r:gz") as archive:
            first = archive.next()
            text = archive.extractfile(first) if first and first.name == "FORMAT" else None
            if text is None or text.read() != _FORMAT.encode():
                raise _broken(source)
            members = [one for one in archive.getmembers() if one.name != "FORMAT"]
            if any(PurePosixPath(one.name).parts[0] not in known for one in members):
                raise _broken(source)
            archive.extractall(folder, members, filter="data")
    except (tarfile.TarError, EOFError, OSError, IndexError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise _broken(source) from None
    return [one for one in sorted(known) if (folder / one).exists()]


def _swap(new: Path, place: Path, aside: Path) -> None:
    if place.exists():
        shutil.move(place, aside)
    shutil.move(new, place)
    place.chmod(0o700 if place.is_dir() else 0o600)


def _load(url: str, archived: Path, aside: Path) -> None:
    copy_registry(url, f"sqlite:///{aside}")
    copy_registry(f"sqlite:///{archived}", url)


def _broken(source: Path) -> ConfigError:
    return ConfigError(
        "a backup must be a whole archive that `fedward-server backup` wrote", value=source.name,
        fix="Take another one",
    )  # fmt: skip
