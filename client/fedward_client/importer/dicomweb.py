"""A PACS over DICOMweb: QIDO-RS by dicomweb-client, WADO-RS streamed to files as it is sent."""

from __future__ import annotations

import secrets
import ssl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final

import requests
from dicomweb_client.api import DICOMwebClient
from requests.adapters import HTTPAdapter
from urllib3.exceptions import ReadTimeoutError

from fedward.errors import PacsError
from fedward_client.importer.settings import PacsSection
from fedward_client.importer.source import (
    Answer,
    Keep,
    Level,
    Throttle,
    lost,
    read_token,
    tls,
)

_CHUNK: Final = 1 << 18
_PAGE: Final = 500  # answers that are asked for at once
ANSWER: Final = 64 << 20  # bytes of one page of answers
_HEADERS: Final = 1 << 14  # bytes of the headers of one part
_ACCEPT: Final = 'multipart/related; type="application/dicom"; transfer-syntax=*'
_SAY: Final = {
    401: ("it does not accept the token or the certificate", "Look at pacs.token"),
    403: ("it does not allow this", "Ask who runs it for read access"),
    404: ("there is no such service or object", "Compare pacs.url with its DICOMweb address"),
    405: ("it does not offer this", "Ask who runs it for STOW-RS, or use DIMSE"),
    413: ("the object is too large for it", "Ask who runs it for a higher limit"),
    429: ("it is asked too often", "Try again later"),
    503: ("it is busy", "Try again later"),
    507: ("its disk is full", "Ask who runs it, and try again later"),
}


class _Tls(HTTPAdapter):  # type: ignore[misc]
    """TLS as the site says it, instead of what requests takes from the environment."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context
        super().__init__()

    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        super().init_poolmanager(*arguments, ssl_context=self._context, **options)

    def cert_verify(self, *_: Any) -> None:
        """Nothing: the context has it all."""


class _Bounded:
    """The bytes of an answer, no faster than the throttle lets them and no more than allowed."""

    def __init__(self, raw: Any, throttle: Throttle, most: int) -> None:
        self._raw, self._throttle, self._most = raw, throttle, most

    def stream(self, size: int, decode_content: bool = True) -> Iterator[bytes]:
        total = 0
        # Not its own stream, which waits for a whole chunk: what has come is kept at once.
        while chunk := self._raw.read1(min(size, _CHUNK), decode_content):
            total += len(chunk)
            if self._most and total > self._most:
                raise lost("an answer that is too long", "Narrow the query")
            self._throttle.take(len(chunk))
            yield chunk

    def __getattr__(self, name: str) -> Any:
        return getattr(self._raw, name)


def open_http(pacs: PacsSection, throttle: Throttle, most: int) -> requests.Session:
    """HTTP as the site says it.

    Parameters
    ----------
    pacs : PacsSection
        With whom.
    throttle : Throttle
        Of all connections.
    most : int
        Bytes of one answer; 0: any number.
    """
    http = requests.Session()
    http.trust_env = False  # a PACS is in the house: no proxy, no password of the environment
    http.max_redirects = 0
    http.headers["Accept-Encoding"] = "identity"  # what is small may be any size unpacked
    if pacs.token is not None:
        http.headers["Authorization"] = f"Bearer {read_token(pacs.token)}"
    if pacs.url.startswith("https:"):
        http.mount("https://", _Tls(tls(pacs)))

    def bound(answer: requests.Response, **_: Any) -> None:
        answer.raw = _Bounded(answer.raw, throttle, most)

    http.hooks["response"].append(bound)
    return http


def open_client(pacs: PacsSection, http: requests.Session) -> DICOMwebClient:
    """What speaks QIDO-RS and STOW-RS, and tries nothing twice by itself."""
    client = DICOMwebClient(pacs.url, session=http, timeout=pacs.timeout_seconds)
    client.set_http_retry_params(retry=False)
    return client


class DicomwebSource:
    """See :class:`fedward_client.importer.source.Source`."""

    def __init__(self, pacs: PacsSection, folder: Path, keep: Keep, throttle: Throttle) -> None:
        self._pacs, self._folder, self._keep, self._throttle = pacs, folder, keep, throttle
        self._sessions: list[DicomwebSession] = []
        self._http = open_http(pacs, throttle, ANSWER)
        self._client = open_client(pacs, self._http)

    @contextmanager
    def find(
        self, level: Level, match: Mapping[str, str], want: Sequence[str]
    ) -> Iterator[Iterator[Answer]]:
        """Ask by QIDO-RS."""
        yield self._answers(level, dict(match), want)

    def _answers(
        self, level: Level, match: dict[str, str], want: Sequence[str]
    ) -> Iterator[Answer]:
        study = match.pop("StudyInstanceUID", None) if level != "STUDY" else None
        series = match.pop("SeriesInstanceUID", None) if level == "IMAGE" else None
        offset, before = 0, None
        while True:
            asked: dict[str, Any] = {
                "fields": list(want),
                "search_filters": match,
                "limit": _PAGE,
                "offset": offset,
            }
            with told():
                if level == "STUDY":
                    page = self._client.search_for_studies(**asked)
                elif level == "SERIES":
                    page = self._client.search_for_series(study, **asked)
                else:
                    page = self._client.search_for_instances(study, series, **asked)
                answers = [_plain(one, want) for one in page]
            if not answers or answers == before:  # a server that knows no offset repeats itself
                return
            yield from answers
            if len(answers) < _PAGE:
                return
            offset, before = offset + len(answers), answers

    def session(self) -> DicomwebSession:
        """A connection for WADO-RS."""
        http = open_http(self._pacs, self._throttle, 0)
        made = DicomwebSession(self._pacs, self._folder, self._keep, http)
        self._sessions.append(made)
        return made

    def close(self) -> None:
        """End every connection."""
        self._http.close()
        for one in self._sessions:
            one.close()


class DicomwebSession:
    """See :class:`fedward_client.importer.source.Session`."""

    def __init__(self, pacs: PacsSection, folder: Path, keep: Keep, http: requests.Session) -> None:
        self._pacs, self._folder, self._keep, self._http = pacs, folder, keep, http

    def retrieve(self, study: str, series: str, instances: Mapping[str, str], whole: bool) -> None:
        """Retrieve by WADO-RS."""
        place = f"{self._pacs.url.rstrip('/')}/studies/{study}/series/{series}"
        for url in [place] if whole else [f"{place}/instances/{uid}" for uid in instances]:
            with (
                told(),
                self._http.get(
                    url,
                    headers={"Accept": _ACCEPT},
                    stream=True,
                    timeout=self._pacs.timeout_seconds,
                ) as answer,
            ):
                answer.raise_for_status()
                self._take(answer)

    def _take(self, answer: requests.Response) -> None:
        boundary = _boundary(answer.headers.get("content-type", ""))
        parts = _Parts(answer.iter_content(_CHUNK), boundary, self._pacs.max_object_mib << 20)
        while True:
            path = self._folder / secrets.token_hex(16)
            with path.open("xb", buffering=0) as file:
                try:
                    more = parts.next(file)
                except BaseException:
                    path.unlink()
                    raise
            if not more:
                path.unlink()
                return
            self._keep(path)

    def close(self) -> None:
        """End it."""
        self._http.close()


class _Parts:
    """The parts of a multipart answer (RFC 2046), each written to a file as it comes."""

    def __init__(self, chunks: Iterator[bytes], boundary: bytes, most: int) -> None:
        self._chunks, self._most = chunks, most
        self._data, self._line = b"\r\n", b"\r\n--" + boundary
        self._until(self._line, None)

    def next(self, file: IO[bytes]) -> bool:
        """Write the next part; False when the last was written before."""
        while len(self._data) < 2:
            self._read()
        if self._data[:2] == b"--":
            return False
        while (end := self._data.find(b"\r\n\r\n")) < 0:
            if len(self._data) > _HEADERS:
                raise lost("a part whose headers do not end")
            self._read()
        self._data = self._data[end + 4 :]
        # An empty part has its boundary's line break right here.
        self._until(self._line, file)
        return True

    def _until(self, mark: bytes, file: IO[bytes] | None) -> None:
        total = 0
        while (place := self._data.find(mark)) < 0:
            ready = max(0, len(self._data) - len(mark) + 1)
            total += self._write(self._data[:ready], file, total)
            self._data = self._data[ready:]
            self._read()
        self._write(self._data[:place], file, total)
        self._data = self._data[place + len(mark) :]

    def _write(self, data: bytes, file: IO[bytes] | None, before: int) -> int:
        if before + len(data) > self._most:
            raise lost("an object that is too large", "Raise pacs.max_object_mib if it is right")
        if file is not None:
            file.write(data)
        return len(data)

    def _read(self) -> None:
        chunk = next(self._chunks, b"")
        if not chunk:
            raise lost("half an answer")
        self._data += chunk


def _boundary(kind: str) -> bytes:
    name, *values = (part.strip() for part in kind.split(";"))
    found = dict(part.partition("=")[::2] for part in values)
    boundary = next((v.strip('"') for k, v in found.items() if k.lower() == "boundary"), "")
    if name.lower() != "multipart/related" or not boundary:
        raise lost("no multipart/related answer", "Compare pacs.url with its DICOMweb address")
    return boundary.encode("ascii", "replace")


def say_http(code: int) -> tuple[str, str]:
    """What an HTTP status of the PACS means, and what to do."""
    other = ("its server failed", "Look at its log, and try again later")
    if code < 500:
        other = ("it does not take this", "Look at its log")
    found, fix = _SAY.get(code, other)
    return f"HTTP {code}: {found}", fix


@contextmanager
def told() -> Iterator[None]:
    """Errors of requests as ours, without their texts, which quote addresses and identifiers."""
    try:
        yield
    except PacsError:
        raise
    except requests.HTTPError as error:
        code = error.response.status_code
        raise lost(*say_http(code)) from None
    except requests.exceptions.SSLError:
        raise lost(
            "a certificate that is not of pacs.ca for this name", "fedward-client doctor says why"
        ) from None
    except requests.Timeout:
        raise lost("silence for pacs.timeout_seconds") from None
    except requests.TooManyRedirects:
        raise lost("a redirect", "Put the address that it leads to into pacs.url") from None
    except requests.ConnectionError as error:
        if any(isinstance(one, ReadTimeoutError) for one in error.args):
            raise lost("silence for pacs.timeout_seconds") from None
        raise lost("no connection", "fedward-client doctor says which step fails") from None
    except requests.RequestException:
        raise lost("half an answer") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise lost("an answer that is no DICOM JSON") from None


def _plain(answer: Mapping[str, Any], want: Sequence[str]) -> Answer:
    """Keyword to value of one object in DICOM JSON (PS3.18, F.2)."""
    found = {}
    for name in want:
        tag = DICOMwebClient.lookup_tag(name)
        values = answer.get(tag, {}).get("Value", ())
        found[name] = "\\".join(str(one) for one in values if isinstance(one, str | int | float))
    return found
