"""Send what ``predict`` wrote to the PACS, each object once."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pydicom

from fedward.errors import DataError, OutputError, PacsError
from fedward.files import locked
from fedward_client.config import SiteConfig
from fedward_client.data.quiet import quiet
from fedward_client.data.readers.dicom.sniff import is_dicom
from fedward_client.importer.journal import Journal
from fedward_client.importer.sender import Item, Refusal, Sender, open_sender
from fedward_client.importer.source import Throttle, lost

FOLDER: Final = "dicom"
"""Where ``predict`` and ``explain`` write objects, in the folder of their results."""
_TOLD: Final = ("predictions.json", "explain.json")
_TAGS: Final = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
_SENDING: Final = "sending"  # in the journal: it may have arrived
_TRIES: Final = 4
_NOT_WHOLE: Final = "no whole DICOM object"


@dataclass
class Outcome:
    """What became of the objects; numbers only.

    Attributes
    ----------
    objects : int
        In the folder.
    before : int
        Of them, those that an earlier call had stored.
    stored : int
        Those that the PACS took now.
    there : int
        Those that it had, though the call that sent them was ended before it knew.
    refused_before : int
        Those that it did not take from an earlier call.
    refused : mapping
        Names of the files that it does not take, to the reason.
    """

    objects: int = 0
    before: int = 0
    stored: int = 0
    there: int = 0
    refused_before: int = 0
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """Whether it took all that was sent now."""
        return not self.refused


def store_results(
    config: SiteConfig,
    pacs: str,
    out: Path,
    *,
    retry_refused: bool = False,
    pause: float = 0.5,
    listen: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Send the DICOM objects of a folder of predictions that the PACS does not have.

    An object is noted before it is sent and again when the PACS has it. One that was only sent
    when the process was killed is asked for, and sent again where the PACS does not say that it
    has it. Segmentations go before reports, which point at them.

    Parameters
    ----------
    config : SiteConfig
        The site.
    pacs : str
        Name of the PACS.
    out : Path
        Folder of ``fedward-client predict`` or ``explain``.
    retry_refused : bool
        Send again what the PACS did not take before.
    pause : float
        Seconds before the second try; each later one waits twice as long.
    listen : callable
        Hears of the progress, in words without identifiers.

    Raises
    ------
    DataError
        The folder holds neither predictions nor explanations.
    PacsError
        The PACS cannot be reached, ends the connection, or takes no object at all.
    OutputError
        The journal cannot be written.
    """
    section = config.pacs[pacs]
    if not any((out / name).is_file() for name in _TOLD):
        raise DataError(
            "what is stored must be a folder of predictions or explanations",
            fix="Name the --out of fedward-client predict or explain",
            where="OUT",
        )
    state = config.importer.state / "stored"
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            "the importer's folder must be writable",
            value=error.strerror,
            fix="Free some space, or give it to the importer's user",
            where="importer.state",
        ) from None
    throttle = Throttle(section.max_mib_per_second * (1 << 20))
    with (
        locked(state / pacs),
        closing(Journal(state / f"{pacs}.sqlite", state)) as journal,
        closing(open_sender(section, throttle)) as sender,
    ):
        if retry_refused:
            journal.forget_refused(but=_SENDING)
        return _Store(sender, journal, throttle.stop, pause).run(out / FOLDER, listen)


class _Store:
    def __init__(
        self, sender: Sender, journal: Journal, stop: threading.Event, pause: float
    ) -> None:
        self._sender, self._journal, self._stop, self._pause = sender, journal, stop, pause
        self._outcome = Outcome()

    def run(self, folder: Path, listen: Callable[[str], None]) -> Outcome:
        outcome = self._outcome
        items = sorted(self._items(folder), key=lambda one: ("SR" in _name(one), one.path))
        known = self._journal.known(one.uid for one in items)
        outcome.objects = len(items) + len(outcome.refused)
        for number, item in enumerate(items):
            listen(f"{number} of {len(items)} objects stored")
            reason = known[item.uid][0] if item.uid in known else None
            if reason in (None, _SENDING):
                self._one(item, sent=reason == _SENDING)
            elif reason:
                outcome.refused_before += 1
            else:
                outcome.before += 1
        return outcome

    def _items(self, folder: Path) -> Iterator[Item]:
        for path in sorted(folder.glob("*.dcm")):
            try:
                yield _item(path)
            except Exception:  # pydicom raises nearly anything on a broken file
                self._outcome.refused[path.name] = _NOT_WHOLE

    def _one(self, item: Item, *, sent: bool) -> None:
        for turn in range(_TRIES):
            if turn:
                self._stop.wait(self._pause * 2.0 ** (turn - 1))
            try:
                found = self._try(item, sent=sent or turn > 0)
            except PacsError as error:
                self._sender.close()
                ended = error
                continue
            if found is None:
                self._note(item)
                return
            ended = lost(found.why, found.fix)
            if not found.passing:
                if found.every:
                    break
                self._outcome.refused[item.path.name] = found.why
                self._note(item, found.why)
                return
        raise ended

    def _try(self, item: Item, *, sent: bool) -> Refusal | None:
        if sent and self._sender.has(item):
            self._outcome.there += 1
            return None
        if not sent:
            self._note(item, _SENDING)
            self._journal.write()
        found = self._sender.send(item)
        if found is None:
            self._outcome.stored += 1
        return found

    def _note(self, item: Item, reason: str = "") -> None:
        with item.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self._journal.add(item.uid, reason, digest, item.path.stat().st_size)


def _item(path: Path) -> Item:
    with quiet():
        if not is_dicom(path):
            raise ValueError(_NOT_WHOLE)
        made = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(_TAGS))
        kind, uid, study, series = (str(made[name].value) for name in _TAGS)
        return Item(path, kind, uid, study, series, str(made.file_meta.TransferSyntaxUID))


def _name(item: Item) -> str:
    return pydicom.uid.UID(item.kind).name
