"""The way to a PACS: name, connection, TLS, association or service, and a question."""

from __future__ import annotations

import os
import socket
import ssl
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

from fedward.errors import ConfigError, FedwardError
from fedward.https import why_untrusted
from fedward_client.doctor.line import Line
from fedward_client.importer.settings import PacsSection
from fedward_client.importer.source import Throttle, open_source, read_token, tls


def examine_pacs(title: str, pacs: PacsSection) -> Iterator[Line]:
    """Each step, up to the first that fails.

    Parameters
    ----------
    title : str
        How the PACS is called.
    pacs : PacsSection
        Where it is.
    """
    for line in _steps(title, pacs):
        yield line
        if line.status == "fail":
            return


def _steps(title: str, pacs: PacsSection) -> Iterator[Line]:
    where = urlsplit(pacs.url)
    encrypted = pacs.tls or where.scheme == "https"
    host = pacs.host or where.hostname or ""
    port = pacs.port if pacs.source == "dimse" else where.port or (443 if encrypted else 80)
    try:
        socket.getaddrinfo(host, port)
    except (OSError, UnicodeError):
        yield Line(f"{title}: name", "fail", "it has no address", "Look at DNS, and at the name")
        return
    try:
        raw = socket.create_connection((host, port), pacs.timeout_seconds)
    except OSError as error:
        found = os.strerror(error.errno) if error.errno else "no answer"
        fix = "Compare host and port with who runs the PACS; let the firewall pass them"
        yield Line(f"{title}: connection", "fail", found, fix)
        return
    with raw:
        yield Line(f"{title}: connection", "pass", "it accepts connections")
        if encrypted:
            yield _encrypted(f"{title}: TLS", raw, host, pacs)
    with tempfile.TemporaryDirectory() as folder:
        try:
            yield from _dimse(title, pacs) if pacs.source == "dimse" else ()
            yield _question(title, pacs, Path(folder))
        except FedwardError as error:
            what = "C-FIND" if pacs.source == "dimse" else "QIDO-RS"
            yield _failed(f"{title}: {what}", error)


def _encrypted(title: str, raw: socket.socket, host: str, pacs: PacsSection) -> Line:
    try:
        if pacs.token is not None:
            read_token(pacs.token)
        with tls(pacs).wrap_socket(raw, server_hostname=host) as link:
            return Line(title, "pass", link.version() or "")
    except ConfigError as error:
        return _failed(title, error)
    except ssl.SSLCertVerificationError as error:
        found, _ = why_untrusted(error) or (error.verify_message, "")
        return Line(title, "fail", found, "Compare pacs.ca and the name with who runs the PACS")
    except OSError:
        fix = "Ask whether it speaks TLS there, and whether it wants a certificate of this site"
        return Line(title, "fail", "no TLS 1.2 or newer is spoken there", fix)


def _dimse(title: str, pacs: PacsSection) -> Iterator[Line]:
    """Association and C-ECHO, and whether objects may come."""
    from pynetdicom import build_context

    from fedward_client.importer.dimse import ECHO, FIND, GET, MOVE, DimseSource

    retrieve = GET if pacs.retrieve == "get" else MOVE
    with tempfile.TemporaryDirectory() as folder:
        try:
            source = DimseSource(pacs, Path(folder), lambda _: False, Throttle(0.0))
        except FedwardError as error:
            yield _failed(f"{title}: receiver", error)
            return
        with closing(source):
            try:
                link = source.associate([build_context(one) for one in (ECHO, FIND, retrieve)])
            except FedwardError as error:
                yield _failed(f"{title}: association", error)
                return
            yield Line(f"{title}: association", "pass", "it knows both AE titles")
            accepted = {one.abstract_syntax for one in link.accepted_contexts}
            echo = ECHO in accepted and link.send_c_echo().get("Status") == 0
            link.release()
    fix = "Ask who runs the PACS for it"
    yield Line(f"{title}: C-ECHO", *(("pass", "answered") if echo else ("fail", "refused", fix)))
    for name, one in (("C-FIND", FIND), (f"C-{pacs.retrieve.upper()}", retrieve)):
        if one not in accepted:
            yield Line(f"{title}: {name}", "fail", "it does not offer this", fix)


def _question(title: str, pacs: PacsSection, folder: Path) -> Line:
    """Whether it answers a question about a patient that nobody is."""
    with closing(open_source(pacs, folder, lambda _: False, Throttle(0.0))) as source:
        match = {"PatientID": "fedward-doctor-nobody"}
        with source.find("STUDY", match, ("StudyInstanceUID", "PatientID")) as answers:
            others = next(answers, None) is not None
    name = f"{title}: {'C-FIND' if pacs.source == 'dimse' else 'QIDO-RS'}"
    if others:
        fix = "Ask who runs it which keys it matches; answers that do not fit are left out"
        return Line(name, "warn", "it answers with other patients than asked for", fix)
    return Line(name, "pass", "it answers questions")


def _failed(title: str, error: FedwardError) -> Line:
    return Line(title, "fail", str(error.value or error.rule), error.fix)
