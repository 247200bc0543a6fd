"""Send objects to a PACS by C-STORE, with pynetdicom."""

from __future__ import annotations

from typing import Final

import pydicom
from pydicom.dataset import Dataset
from pydicom.uid import ImplicitVRLittleEndian
from pynetdicom import build_context
from pynetdicom.association import Association

from fedward_client.importer.dimse import ECHO, FIND, associate
from fedward_client.importer.sender import Item, Refusal, refusal
from fedward_client.importer.settings import PacsSection
from fedward_client.importer.source import Throttle, lost, tls

_UNKNOWN: Final = 0x0122  # SOP class not supported


class CStoreSender:
    """See :class:`fedward_client.importer.sender.Sender`."""

    def __init__(self, pacs: PacsSection, throttle: Throttle) -> None:
        self._pacs, self._throttle = pacs, throttle
        self._tls = tls(pacs) if pacs.tls else None
        self._open: Association | None = None
        self._asked: tuple[str, str] | None = None

    def has(self, item: Item) -> bool:
        """Ask by C-FIND, where the PACS offers it."""
        link = self._link(item)
        if FIND not in {one.abstract_syntax for one in link.accepted_contexts}:
            return False
        asked = Dataset()
        asked.QueryRetrieveLevel = "IMAGE"
        asked.StudyInstanceUID, asked.SeriesInstanceUID = item.study, item.series
        asked.SOPInstanceUID = item.uid
        found = False
        try:
            for status, answer in link.send_c_find(asked, FIND):
                if "Status" not in status:
                    raise lost("silence for pacs.timeout_seconds, or half an answer")
                found = found or (answer is not None and answer.get("SOPInstanceUID") == item.uid)
        except (RuntimeError, ValueError):
            raise lost("a connection that ended") from None
        return found

    def send(self, item: Item) -> Refusal | None:
        """Send by C-STORE."""
        link = self._link(item)
        if not any(one.abstract_syntax == item.kind for one in link.accepted_contexts):
            return refusal(_UNKNOWN)
        self._throttle.take(item.path.stat().st_size)
        try:
            status = link.send_c_store(pydicom.dcmread(item.path))
        except (RuntimeError, ValueError):  # ended meanwhile, or without this transfer syntax
            raise lost("a connection that ended") from None
        if "Status" not in status:
            raise lost("silence for pacs.timeout_seconds, or a connection that ended")
        return refusal(int(status.Status))

    def _link(self, item: Item) -> Association:
        """A connection on which an object of this kind may be sent."""
        asked = (item.kind, item.syntax)
        if self._open is None or not self._open.is_established or self._asked != asked:
            self.close()
            # Each syntax apart: a PACS that takes one of them chooses it.
            ways = list(dict.fromkeys((item.syntax, str(ImplicitVRLittleEndian))))
            contexts = [build_context(item.kind, one) for one in ways]
            own = [build_context(ECHO), build_context(FIND)]
            self._open = associate(self._pacs, self._tls, [*contexts, *own])
            self._asked = asked
        return self._open

    def close(self) -> None:
        """End the connection."""
        link, self._open = self._open, None
        if link is not None and link.is_established:
            link.release()
