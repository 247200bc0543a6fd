"""A PACS over DIMSE: C-FIND, and C-GET or C-MOVE with a receiver, by pynetdicom."""

from __future__ import annotations

import ssl
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pynetdicom import AE, _config, build_context, build_role, evt
from pynetdicom.association import Association
from pynetdicom.presentation import AllStoragePresentationContexts, StoragePresentationContexts
from pynetdicom.sop_class import (
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelGet,
    StudyRootQueryRetrieveInformationModelMove,
    Verification,
)

from fedward.errors import ConfigError, PacsError
from fedward_client.importer.check import COMPRESSED, SYNTAXES
from fedward_client.importer.settings import PacsSection
from fedward_client.importer.source import (
    Answer,
    Keep,
    Level,
    Stopped,
    Throttle,
    lost,
    tls,
)

FIND: Final = StudyRootQueryRetrieveInformationModelFind
GET: Final = StudyRootQueryRetrieveInformationModelGet
MOVE: Final = StudyRootQueryRetrieveInformationModelMove
ECHO: Final = Verification
_PDU: Final = 1 << 17  # bytes; fewer and larger parts cost Python less
_MOST: Final = 128  # presentation contexts of an association (PS3.8, 9.3.2.2)
_BATCH: Final = 50  # UIDs in one request for single objects
_LOOK: Final = 0.25  # seconds between two looks at what is silent
_PENDING: Final = frozenset({0xFF00, 0xFF01})
# Association rejected: source and reason (PS3.8, 9.3.4).
_REJECTED: Final = {
    (1, 2): ("it does not know this application context", "Ask who runs the PACS"),
    (1, 3): ("it does not know the calling AE title", "Have it add pacs.calling_ae_title"),
    (1, 7): ("it has another AE title", "Compare pacs.ae_title with who runs the PACS"),
    (3, 1): ("it is busy", "Try again later, or lower pacs.associations"),
    (3, 2): ("it takes no more connections", "Lower pacs.associations"),
}
_STATUS: Final = {
    0xA701: ("it is out of resources", "Try again later"),
    0xA702: ("it could not send", "Look at its log: does it reach pacs.listen_port here?"),
    0xA801: (
        "it does not know where to send",
        "Have it add pacs.calling_ae_title with this machine's address and pacs.listen_port",
    ),
    0xA900: ("it does not take the query's keys", "Leave out a key of the query"),
    0x0122: ("it does not support this", "Choose the other pacs.retrieve, or DICOMweb"),
}
_OUT_OF_RESOURCES, _NOT_WANTED = 0xA700, 0xC000  # answers to C-STORE (PS3.4, B.2.3)

_config.LOG_HANDLER_LEVEL = "none"
_config.LOG_REQUEST_IDENTIFIERS = False
_config.LOG_RESPONSE_IDENTIFIERS = False


def associate(
    pacs: PacsSection,
    context: ssl.SSLContext | None,
    contexts: Sequence[Any],
    roles: Sequence[Any] = (),
    handlers: Sequence[Any] = (),
) -> Association:
    """A connection, negotiated.

    Parameters
    ----------
    pacs : PacsSection
        With whom.
    context : ssl.SSLContext, optional
        Of TLS.
    contexts : sequence
        Presentation contexts to ask for.
    roles, handlers : sequence
        As pynetdicom takes them.

    Raises
    ------
    PacsError
        There is none: nobody answers, or the PACS refuses it; the message says which.
    """
    entity = AE(pacs.calling_ae_title)
    entity.maximum_pdu_size = _PDU
    entity.acse_timeout = entity.dimse_timeout = pacs.timeout_seconds
    entity.network_timeout = entity.connection_timeout = pacs.timeout_seconds
    try:
        made = entity.associate(
            pacs.host,
            pacs.port,
            list(contexts),
            ae_title=pacs.ae_title,
            max_pdu=_PDU,
            ext_neg=list(roles),
            tls_args=None if context is None else (context, pacs.host),
            evt_handlers=list(handlers),
        )
    except (OSError, RuntimeError):
        raise lost("no connection", "fedward-client doctor says which step fails") from None
    if made.is_established:
        return made
    if made.is_rejected:
        answer = made.acceptor.primitive
        reason = (int(answer.result_source or 0), int(answer.diagnostic or 0))
        found, fix = _REJECTED.get(reason, ("it gives no reason", "Ask who runs the PACS"))
        raise lost(f"association refused: {found}", fix)
    if made.acceptor.primitive is not None and not made.accepted_contexts:
        fix = "Ask who runs the PACS for C-FIND, and for C-GET, C-MOVE or C-STORE"
        raise lost("association without what was asked for", fix)
    raise lost("no association", "fedward-client doctor says which step fails")


@dataclass
class _Watched:
    """An association that may not be silent, and may not send an object without end."""

    association: Association
    heard: float = field(default_factory=time.monotonic)
    bytes: int = 0
    why: PacsError | None = None

    def end(self, why: PacsError | None) -> None:
        """Abort it, and wake who waits for it."""
        self.why = self.why or why
        self.association.abort(block=False)
        self.association.dimse.msg_queue.put((None, None))


class DimseSource:
    """See :class:`fedward_client.importer.source.Source`."""

    def __init__(self, pacs: PacsSection, folder: Path, keep: Keep, throttle: Throttle) -> None:
        self.pacs, self._keep, self._throttle = pacs, keep, throttle
        self._context = tls(pacs) if pacs.tls else None
        self._open: dict[Association, _Watched] = {}
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._finder: Association | None = None
        self._server: Any = None
        # Objects are written to files as they come, whatever their size, and there.
        _config.STORE_RECV_CHUNKED_DATASET = True
        tempfile.tempdir = str(folder)
        if pacs.retrieve == "move":
            self._listen()
        threading.Thread(target=self._watch, daemon=True).start()

    @contextmanager
    def find(
        self, level: Level, match: Mapping[str, str], want: Sequence[str]
    ) -> Iterator[Iterator[Answer]]:
        """Ask by C-FIND of the Study Root model."""
        asked = Dataset()
        if not "".join(match.values()).isascii():
            asked.SpecificCharacterSet = "ISO_IR 192"
        asked.QueryRetrieveLevel = level
        for name in want:
            setattr(asked, name, "")
        for name, value in match.items():
            setattr(asked, name, value.split("\\") if "\\" in value else value)
        if self._finder is None or not self._finder.is_established:
            self._finder = self.associate([build_context(FIND)])
        answers = self._answers(self._finder, asked, want)
        ended = False
        try:
            yield answers
            ended = next(answers, None) is None
        finally:
            if not ended:  # the rest may be any number
                self._finder.abort()

    def _answers(
        self, association: Association, asked: Dataset, want: Sequence[str]
    ) -> Iterator[Answer]:
        for status, answer in association.send_c_find(asked, FIND):
            if "Status" not in status:
                raise lost("silence for pacs.timeout_seconds, or half an answer")
            if status.Status not in _PENDING:
                check_status(int(status.Status))
                return
            if answer is None:
                raise lost("an answer that is no DICOM")
            yield {name: _text(answer, name) for name in want}

    def associate(
        self, contexts: Sequence[Any], roles: Sequence[Any] = (), handlers: Sequence[Any] = ()
    ) -> Association:
        """A connection; see :func:`associate`."""
        return associate(self.pacs, self._context, contexts, roles, handlers)

    def session(self) -> DimseSession:
        """A connection for C-GET or C-MOVE."""
        return DimseSession(self)

    def watch(self, association: Association) -> _Watched:
        """Have an association ended when it is silent for too long."""
        association.dimse_timeout = None  # an object may take longer than a silence may last
        with self._lock:
            self._open[association] = found = _Watched(association)
        return found

    def unwatch(self, association: Association) -> None:
        """Leave an association alone."""
        association.dimse_timeout = self.pacs.timeout_seconds
        with self._lock:
            self._open.pop(association, None)

    def _watch(self) -> None:
        while not self._closed.wait(_LOOK):
            late = time.monotonic() - self.pacs.timeout_seconds
            with self._lock:
                silent = [one for one in self._open.values() if one.heard < late]
            for one in silent:
                one.end(lost("silence for pacs.timeout_seconds"))

    def handlers(self) -> list[Any]:
        """What an association that receives objects does."""
        return [(evt.EVT_C_STORE, self._store), (evt.EVT_DATA_RECV, self._received)]

    def _received(self, event: evt.Event) -> None:
        """Part of something came; in the thread that reads, which so waits for its turn."""
        with self._lock:
            watched = self._open.get(event.assoc)
        size = len(event.data)
        if watched is not None:
            watched.bytes += size
            if watched.bytes > self.pacs.max_object_mib << 20:
                watched.end(
                    lost("an object that is too large", "Raise pacs.max_object_mib if it is right")
                )
                return
        with suppress(Stopped):
            self._throttle.take(size)
        if watched is not None:
            watched.heard = time.monotonic()

    def _store(self, event: evt.Event) -> int:
        with self._lock:
            watched = self._open.get(event.assoc)
        if watched is not None:
            watched.bytes = 0
        path = event.dataset_path
        if self._throttle.stop.is_set():
            path.unlink(missing_ok=True)
            return _OUT_OF_RESOURCES
        # pynetdicom removes a file of that name when this returns.
        mine = path.rename(path.with_suffix(""))
        return 0x0000 if self._keep(mine) else _NOT_WANTED

    def _listen(self) -> None:
        """Receive what the PACS sends for C-MOVE."""
        pacs = self.pacs
        entity = AE(pacs.calling_ae_title)
        entity.maximum_pdu_size = _PDU
        entity.require_called_aet = True
        entity.require_calling_aet = [pacs.ae_title]
        entity.maximum_associations = 2 * pacs.associations
        entity.network_timeout = pacs.timeout_seconds
        for one in AllStoragePresentationContexts:
            entity.add_supported_context(one.abstract_syntax, SYNTAXES)
        entity.add_supported_context(Verification)
        watching = [
            (evt.EVT_ESTABLISHED, lambda event: self.watch(event.assoc) and None),
            (evt.EVT_CONN_CLOSE, lambda event: self.unwatch(event.assoc)),
        ]
        try:
            self._server = entity.start_server(
                ("", pacs.listen_port),
                block=False,
                ssl_context=tls(pacs, serve=True) if pacs.tls else None,
                evt_handlers=[*self.handlers(), *watching],
            )
        except OSError:
            raise ConfigError(
                "the port that the PACS sends to must be free on this machine",
                value=pacs.listen_port,
                fix="End what uses it, or choose another",
                where="pacs.listen_port",
            ) from None

    def close(self) -> None:
        """End every connection."""
        self._closed.set()
        with self._lock:
            still = list(self._open.values())
        for one in still:
            one.end(None)
        if self._finder is not None and self._finder.is_established:
            self._finder.release()
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
        tempfile.tempdir = None


class DimseSession:
    """See :class:`fedward_client.importer.source.Session`."""

    def __init__(self, source: DimseSource) -> None:
        self._source = source
        self._association: Association | None = None
        self._classes: frozenset[str] = frozenset()

    def retrieve(self, study: str, series: str, instances: Mapping[str, str], whole: bool) -> None:
        """Retrieve by C-GET or C-MOVE, the series or a list of its objects."""
        asked = Dataset()
        asked.QueryRetrieveLevel = "SERIES" if whole else "IMAGE"
        asked.StudyInstanceUID, asked.SeriesInstanceUID = study, series
        uids = list(instances)
        association = self._associate(frozenset(instances.values()))
        for start in range(0, 1 if whole else len(uids), _BATCH):
            if not whole:
                asked.SOPInstanceUID = uids[start : start + _BATCH]
            self._ask(association, asked)

    def _ask(self, association: Association, asked: Dataset) -> None:
        watched = self._source.watch(association)
        try:
            if self._source.pacs.retrieve == "get":
                answers = association.send_c_get(asked, GET)
            else:
                answers = association.send_c_move(asked, self._source.pacs.calling_ae_title, MOVE)
            for status, _ in answers:
                watched.heard = time.monotonic()
                if "Status" not in status:
                    raise watched.why or lost("half an answer: it ended the connection")
                if status.Status not in _PENDING:
                    check_status(int(status.Status))
        except (RuntimeError, ValueError):  # ended meanwhile, or without this service
            self.close()
            fix = "Choose the other pacs.retrieve, or DICOMweb"
            raise watched.why or lost("a connection without C-GET or C-MOVE", fix) from None
        finally:
            self._source.unwatch(association)

    def _associate(self, classes: frozenset[str]) -> Association:
        known = self._association
        if known is not None and known.is_established and classes <= self._classes:
            return known
        self.close()
        if self._source.pacs.retrieve == "move":
            made = self._source.associate([build_context(MOVE)])
        else:
            contexts = _contexts(classes)
            roles = {one.abstract_syntax for one in contexts}
            made = self._source.associate(
                [build_context(GET), *contexts],
                [build_role(one, scp_role=True) for one in sorted(roles)],
                self._source.handlers(),
            )
        self._association, self._classes = made, classes
        return made

    def close(self) -> None:
        """End it."""
        if self._association is not None and self._association.is_established:
            self._association.release()
        self._association = None


def _contexts(classes: frozenset[str]) -> list[Any]:
    """What C-GET may send: each syntax apart, if there is room, so that nothing is converted."""
    named = sorted(classes - {""})
    plain = [one for one in SYNTAXES if one not in COMPRESSED]
    if "" in classes or not named:
        return list(StoragePresentationContexts[: _MOST - 1])
    if len(named) * (1 + len(COMPRESSED)) < _MOST:
        ways = [plain, *([one] for one in COMPRESSED)]
        return [build_context(one, way) for one in named for way in ways]
    return [build_context(one, SYNTAXES) for one in named[: _MOST - 1]]


def check_status(status: int) -> None:
    """Refuse the status of a failed request; objects that were not sent are asked for again.

    Raises
    ------
    PacsError
        It is one.
    """
    if status in (0x0000, 0xB000):
        return
    found, fix = _STATUS.get(status, ("it gives no known reason", "Look at its log"))
    raise lost(f"status 0x{status:04X}: {found}", fix)


def _text(answer: Dataset, name: str) -> str:
    try:
        value = answer.get(name)
        several = isinstance(value, MultiValue)
        return "\\".join(map(str, value)) if several else str(value or "").strip()
    except Exception:  # pydicom raises nearly anything on a broken value
        return ""
