"""How objects are sent to a PACS: what DICOMweb and DIMSE have in common, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from fedward_client.importer.settings import PacsSection
from fedward_client.importer.source import Throttle

_TAKEN: Final = frozenset({0x0000, 0x0107, 0x0116, 0xB000, 0xB006, 0xB007})
_HAD: Final = 0x0111  # it has an object of this UID
# Status of C-STORE (PS3.4, B.2.3; PS3.7, annex C) and failure reason of STOW-RS (PS3.18, I.2).
_SAY: Final = {
    0x0110: ("it failed to process the object", "Look at its log"),
    0x0117: ("it does not take the object's UID", "Look at its log"),
    0x0122: ("it takes no objects of this kind", "Ask who runs it for SEG and SR"),
    0x0124: ("it does not allow this", "Ask who runs it for the right to store"),
    0xA700: ("it is out of resources, such as disk", "Ask who runs it, and try again later"),
    0xA900: ("it finds that the object is not of its kind", "Look at its log"),
    0xC000: ("it cannot read the object", "Look at its log"),
}


@dataclass(frozen=True)
class Item:
    """A file to send.

    Attributes
    ----------
    path : Path
        The file.
    kind, uid : str
        SOP class and SOP instance UID.
    study, series : str
        UIDs.
    syntax : str
        Transfer syntax UID.
    """

    path: Path
    kind: str
    uid: str
    study: str
    series: str
    syntax: str


@dataclass(frozen=True)
class Refusal:
    """Why the PACS did not take an object.

    Attributes
    ----------
    why, fix : str
        In words, and what to do.
    passing : bool
        Whether another try may be better.
    every : bool
        Whether it would not take any other object either.
    """

    why: str
    fix: str
    passing: bool = False
    every: bool = False


class Sender(Protocol):
    """A connection to a PACS that takes objects."""

    def has(self, item: Item) -> bool:
        """Whether the PACS says that it has an object; False where it does not say.

        Raises
        ------
        PacsError
            There is no connection, or it ended.
        """

    def send(self, item: Item) -> Refusal | None:
        """Send an object; None when the PACS has it now.

        Raises
        ------
        PacsError
            There is no connection, or it ended before the PACS answered.
        """

    def close(self) -> None:
        """End the connection; the next call opens another."""


def refusal(status: int) -> Refusal | None:
    """What a status means; None where the PACS has the object."""
    if status in _TAKEN or status == _HAD:
        return None
    group = status & 0xFF00 if status >= 0xA000 else status
    group = 0xC000 if status & 0xF000 == 0xC000 else group
    found, fix = _SAY.get(group, ("it gives no known reason", "Look at its log"))
    full = group == 0xA700
    return Refusal(f"status 0x{status:04X}: {found}", fix, passing=full, every=full)


def open_sender(pacs: PacsSection, throttle: Throttle) -> Sender:
    """A PACS as `site.toml` describes it.

    Parameters
    ----------
    pacs : PacsSection
        Where it is.
    throttle : Throttle
        Of all connections.
    """
    if pacs.source == "dicomweb":
        from fedward_client.importer.stow import StowSender

        return StowSender(pacs, throttle)
    from fedward_client.importer.cstore import CStoreSender

    return CStoreSender(pacs, throttle)
