"""What DICOMweb and DIMSE have in common: how a PACS is asked and what it sends."""

from __future__ import annotations

import contextlib
import logging
import os
import ssl
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, Protocol

from fedward.errors import ConfigError, PacsError
from fedward_client.importer.settings import PacsSection

Level = Literal["STUDY", "SERIES", "IMAGE"]
Answer = Mapping[str, str]  # keyword to value; several values are separated by a backslash
Keep = Callable[[Path], bool]  # takes over a file that was received; whether it was wanted
_SLICE: Final = 0.2  # seconds; a wait looks so often whether it shall end

for _name in ("pynetdicom", "dicomweb_client", "urllib3"):  # their texts quote identifiers
    logging.getLogger(_name).setLevel(logging.CRITICAL + 1)
    logging.getLogger(_name).propagate = False


class Stopped(Exception):
    """What runs in another thread shall end; nobody is told."""


@dataclass
class Throttle:
    """Bandwidth of all connections together, and the end of them all.

    Attributes
    ----------
    rate : float
        Bytes in a second; 0: any number.
    stop : threading.Event
        Ends every wait.
    """

    rate: float
    stop: threading.Event = field(default_factory=threading.Event)
    received: int = 0
    _free: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, count: int) -> None:
        """Wait until this many bytes more fit.

        Raises
        ------
        Stopped
            The fetching ends.
        """
        with self._lock:
            self.received += count
            now = time.monotonic()
            self._free = max(now, self._free) + (count / self.rate if self.rate else 0.0)
            pause = self._free - now - 0.05  # so that small parts do not wait each
        if self.stop.is_set() or (pause > 0 and self.stop.wait(pause)):
            raise Stopped


class Session(Protocol):
    """One connection to the PACS, used by one thread."""

    def retrieve(self, study: str, series: str, instances: Mapping[str, str], whole: bool) -> None:
        """Have objects sent; each is handed to what the source was given to keep them.

        Parameters
        ----------
        study, series : str
            UIDs.
        instances : mapping
            UIDs of the objects to their SOP classes ("" where that is not known).
        whole : bool
            Whether these are all objects of the series.

        Raises
        ------
        PacsError
            The PACS refuses, or ends the connection.
        """

    def close(self) -> None:
        """End it."""


class Source(Protocol):
    """A PACS."""

    def find(
        self, level: Level, match: Mapping[str, str], want: Sequence[str]
    ) -> AbstractContextManager[Iterator[Answer]]:
        """Ask; answers come one after another, and may be left before the last.

        Parameters
        ----------
        level : str
            Of what is asked for.
        match : mapping
            Keywords to what they must be; a date may be a range.
        want : sequence of str
            Keywords to be told.
        """

    def session(self) -> Session:
        """A connection to retrieve objects."""

    def close(self) -> None:
        """End every connection, also of other threads."""


def tls(pacs: PacsSection, *, serve: bool = False) -> ssl.SSLContext:
    """TLS with the PACS: its authority and no other, and this site's certificate.

    Parameters
    ----------
    pacs : PacsSection
        With an authority.
    serve : bool
        Whether the PACS connects to this process; it then needs a certificate of its own.

    Raises
    ------
    ConfigError
        A file cannot be read, or is not what it should be.
    """
    kind = ssl.PROTOCOL_TLS_SERVER if serve else ssl.PROTOCOL_TLS_CLIENT
    context = ssl.SSLContext(kind)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if serve:
        context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(cafile=pacs.ca)
        if pacs.certificate is not None and pacs.key is not None:
            check_private(pacs.key, "pacs.key")
            context.load_cert_chain(pacs.certificate, pacs.key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            "authority, certificate and key of a PACS must be readable PEM files",
            value=os.strerror(error.errno) if error.errno and not _is_ssl(error) else "no PEM",
            fix="Look at pacs.ca, pacs.certificate and pacs.key",
            where="pacs",
        ) from None
    return context


def _is_ssl(error: OSError) -> bool:
    return isinstance(error, ssl.SSLError)


def check_private(path: Path, where: str) -> None:
    """Make sure that nobody but its owner reads a secret.

    Raises
    ------
    ConfigError
        The file is missing, or others can read it.
    """
    mode = None
    with contextlib.suppress(OSError):
        mode = path.stat().st_mode
    if mode is None or stat.S_IMODE(mode) & 0o077:
        raise ConfigError(
            "a secret must be a file that its owner alone can read",
            value="missing" if mode is None else oct(stat.S_IMODE(mode)),
            fix="chmod 600, and give it to the importer's user",
            where=where,
        )


def read_token(path: Path) -> str:
    """A bearer token.

    Raises
    ------
    ConfigError
        The file is missing, others can read it, or it holds none.
    """
    check_private(path, "pacs.token")
    text = path.read_text("ascii", "replace").strip()
    if not text.isprintable() or not text.isascii() or not text or " " in text:
        raise ConfigError(
            "a bearer token is one word of ASCII", fix="Write it anew", where="pacs.token"
        )
    return text


def is_uid(text: str) -> bool:
    """Whether a text may be a UID (PS3.5, 9.1), and is so safe in a URL."""
    return 0 < len(text) <= 64 and set(text) <= set("0123456789.") and text.strip(".") == text


def lost(what: str, fix: str = "Give the command again: it goes on where it was") -> PacsError:
    """The PACS did something that ends a connection."""
    return PacsError("the PACS must answer as DICOM says", value=what, fix=fix)


def open_source(pacs: PacsSection, folder: Path, keep: Keep, throttle: Throttle) -> Source:
    """A PACS as `site.toml` describes it.

    Parameters
    ----------
    pacs : PacsSection
        Where it is.
    folder : Path
        Where objects are written as they come.
    keep : callable
        Is given each file that is received whole, in any thread.
    throttle : Throttle
        Of all connections.
    """
    if pacs.source == "dicomweb":
        from fedward_client.importer.dicomweb import DicomwebSource

        return DicomwebSource(pacs, folder, keep, throttle)
    from fedward_client.importer.dimse import DimseSource

    return DimseSource(pacs, folder, keep, throttle)
