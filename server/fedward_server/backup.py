"""Copy an aggregator's state while it runs.

Studies first, then the registry: a study that goes on after a restore trains again what the copy
of its checkpoints does not have. Flower's own database is left out; the service enrols the
hospitals at the SuperLink again when it starts, with the keys that the registry has.
"""

from __future__ import annotations

import io
import os
import sqlite3
import tarfile
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Final

from sqlalchemy.engine import make_url

from fedward.errors import ConfigError, OutputError
from fedward_server.config import ServerConfig
from fedward_server.registry.transfer import copy_registry

FORMAT: Final = "fedward aggregator backup 1\n"
REGISTRY: Final = "registry.db"


def folders(config: ServerConfig) -> dict[str, Path]:
    """The folders in an archive, and where they belong."""
    return {"studies": config.studies, "weights": config.weights}


def key_files(config: ServerConfig) -> dict[str, Path]:
    """The files of ``--keys`` in an archive, and where they belong; no other lies with them."""
    tls, signing = config.tls, config.coordinator_key
    keys = (
        signing,
        signing.with_suffix(".pub"),
        config.control_secret,
        config.runtime_secret,
        config.local_token,
    )
    return {f"keys/{path.name}": path for path in keys} | {
        "tls/server.crt": tls.certificate,
        "tls/server.key": tls.key,
        "tls/ca.crt": tls.ca,
        "tls/ca.key": config.ca_key,
    }


def registry_file(config: ServerConfig) -> Path | None:
    """The registry's file; None where it is no file."""
    url = make_url(config.database_url)
    return Path(url.database) if url.get_backend_name() == "sqlite" and url.database else None


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
        The registry is missing, or cannot be read.
    OutputError
        The archive is there already, or cannot be written.
    """
    part = target.with_name(f".{target.name}.part")
    try:
        if target.exists():
            raise OutputError(
                "a backup overwrites nothing", value=target.name, fix="Name another file"
            )
        _write(config, part, keys=keys)
        part.replace(target)
    except OSError as error:
        raise OutputError(
            "the backup must be writable", value=error.strerror, fix="Choose another place"
        ) from None
    finally:
        part.unlink(missing_ok=True)
    return target.stat().st_size


def _write(config: ServerConfig, part: Path, *, keys: bool) -> None:
    handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "wb") as file:
        with tarfile.open(fileobj=file, mode="w:gz") as archive:
            _add_text(archive, "FORMAT", FORMAT)
            for name, folder in folders(config).items():
                _add_folder(archive, folder, name)
            _add_registry(archive, config)
            for name, path in key_files(config).items() if keys else ():
                _add_file(archive, path, name)
        file.flush()
        os.fsync(file.fileno())


def _add_text(archive: tarfile.TarFile, name: str, text: str) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(text)
    archive.addfile(info, io.BytesIO(text.encode()))


def _add_folder(archive: tarfile.TarFile, folder: Path, name: str) -> None:
    """A folder whose parts may be renamed meanwhile; each file is whole, as it was written."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and ".part" not in path.name and "/.part" not in str(path):
            _add_file(archive, path, f"{name}/{path.relative_to(folder).as_posix()}")


def _add_file(archive: tarfile.TarFile, path: Path, name: str) -> None:
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return  # an older checkpoint that just made room, or a key that is not here
    with file:
        info, about = tarfile.TarInfo(name), os.fstat(file.fileno())
        info.size, info.mode = about.st_size, about.st_mode & 0o777
        archive.addfile(info, file)


def _add_registry(archive: tarfile.TarFile, config: ServerConfig) -> None:
    with tempfile.TemporaryDirectory() as folder:
        copy, source = Path(folder) / REGISTRY, registry_file(config)
        if source is None:
            copy_registry(config.database_url, f"sqlite:///{copy}")
        else:
            _copy_file(source, copy)
        # Out of write-ahead mode, so that it is one file.
        with closing(sqlite3.connect(copy)) as made:
            made.execute("PRAGMA journal_mode=DELETE")
        archive.add(copy, REGISTRY)


def _copy_file(source: Path, copy: Path) -> None:
    # The mode makes none where none is.
    address = f"{source.absolute().as_uri()}?mode=rw"
    try:
        with (
            closing(sqlite3.connect(address, uri=True)) as live,
            closing(sqlite3.connect(copy)) as made,
        ):
            live.backup(made)
    except sqlite3.Error as error:
        raise ConfigError(
            "the registry must be there, and whole",
            value=f"{source.name}: {error}",
            fix="Restore a backup",
            where="database.url",
        ) from None
