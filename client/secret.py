"""The site's secret, with which whatever names a person or a file is hashed."""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Final

from fedward.errors import ConfigError

_NAME: Final = "site.secret"
_LENGTH: Final = 32


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
    """The secret in the site's state folder, made when there is none.

    Raises
    ------
    ConfigError
        Others can read it, it is of the wrong length, or it cannot be written.
    """
    path = state / _NAME
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        with suppress(FileExistsError):
            _make(path)
        mode, secret = path.stat().st_mode, path.read_bytes()
    except OSError as error:
        raise ConfigError(
            "the state folder must be writable", value=os.strerror(error.errno or 0),
            fix="Give it to the user that runs this", where="site.state",
        ) from None  # fmt: skip
    if stat.S_IMODE(mode) & 0o077:
        raise ConfigError(
            "the site's secret must be readable by its owner only",
            value=oct(stat.S_IMODE(mode)), fix="chmod 600 site.secret", where="site.state",
        )  # fmt: skip
    if len(secret) != _LENGTH:
        raise ConfigError(
            f"the site's secret must have {_LENGTH} bytes", value=len(secret),
            fix="Restore it from a backup; with a new one, index all datasets again",
            where="site.state",
        )  # fmt: skip
    return secret


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
