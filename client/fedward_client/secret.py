"""The site's secret, with which whatever names a person or a file is hashed."""

from __future__ import annotations

import errno
import hashlib
import hmac
import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Final

from fedward.errors import ConfigError, OutputError

_NAME: Final = "site.secret"
_LENGTH: Final = 32
# What was made with the secret, and says nothing without it.
_HANG_ON_IT: Final = ("audit", "ledger.sqlite")
_RESTORE: Final = "Restore site.secret from a backup; ledger and audit log hang on it"


class Pseudonyms:
    """Keyed hashes (HMAC-SHA-256, RFC 2104) instead of what names a person or a file.

    Parameters
    ----------
    secret : bytes
        The site's; whoever has it can test guesses, so it stays at the site.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def __call__(self, kind: str, *parts: str) -> str:
        """The stand-in of a value, 32 hexadecimal digits; "" stays "".

        Parameters
        ----------
        kind : str
            What the value is; the same value of two kinds gives two hashes.
        *parts : str
            The value, in parts that are told apart.
        """
        if not any(parts):
            return ""
        text = "\0".join((kind, *parts)).encode("utf-8", "surrogateescape")
        return hmac.new(self._secret, text, hashlib.sha256).hexdigest()[:32]


def site_secret(state: Path) -> bytes:
    """The secret in the site's state folder, made when the folder is new.

    Raises
    ------
    ConfigError
        Others can read it, it is of the wrong length, or it is gone from a folder in use.
    OutputError
        It cannot be written now.
    """
    path = state / _NAME
    if not path.exists():
        if any((state / name).exists() for name in _HANG_ON_IT):
            raise _gone()
        _made(path)
    return existing_secret(state)


def existing_secret(state: Path) -> bytes:
    """The secret in the site's state folder, which nothing is written to.

    Raises
    ------
    ConfigError
        It is not there, others can read it, or it is of the wrong length.
    """
    path = state / _NAME
    try:
        mode, secret = path.stat().st_mode, path.read_bytes()
    except FileNotFoundError:
        raise _gone() from None
    except OSError as error:
        raise ConfigError(
            "the site's secret must be readable",
            value=os.strerror(error.errno or 0),
            fix="Give the state folder to the user that runs this",
            where="site.state",
        ) from None
    if stat.S_IMODE(mode) & 0o077:
        raise ConfigError(
            "the site's secret must be readable by its owner only",
            value=oct(stat.S_IMODE(mode)),
            fix="chmod 600 site.secret",
            where="site.state",
        )
    if len(secret) != _LENGTH:
        raise ConfigError(
            f"the site's secret must have {_LENGTH} bytes",
            value=len(secret),
            fix=_RESTORE,
            where="site.state",
        )
    return secret


def _gone() -> ConfigError:
    return ConfigError("the site's secret must be there", fix=_RESTORE, where="site.state")


def _made(path: Path) -> None:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with suppress(FileExistsError):
            _make(path)
    except OSError as error:
        # A disk that is full has room again some time; a folder of somebody else stays his.
        kind = OutputError if error.errno in (errno.ENOSPC, errno.EDQUOT) else ConfigError
        raise kind(
            "the state folder must be writable",
            value=os.strerror(error.errno or 0),
            fix="Make room, or give it to the user that runs this",
            where="site.state",
        ) from None


def _make(path: Path) -> None:
    # Written aside and linked: a process that is killed leaves no half secret, and of two that
    # start together one wins.
    handle, name = tempfile.mkstemp(prefix=f".{_NAME}-", dir=path.parent)
    aside = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(os.urandom(_LENGTH))
            file.flush()
            os.fsync(file.fileno())
        os.link(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    _sync(path.parent)


def _sync(folder: Path) -> None:
    # All hashes hang on the secret: it must not be lost to a power cut after they are written.
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
