"""HTTPS connections of a hospital: TLS, proxy, and limits on answers."""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Protocol
from urllib.request import getproxies, proxy_bypass

import httpx

from fedward.errors import ConfigError, ProtocolError

_VARIABLES: Final = ("https_proxy", "all_proxy", "no_proxy")


class Endpoint(Protocol):
    """Where the aggregator is, and how it is reached."""

    @property
    def address(self) -> str:
        """``host:port``."""

    @property
    def proxy(self) -> str:
        """The proxy's URL; empty for that of the environment."""

    @property
    def ca(self) -> Path:
        """The file of the authority's certificates."""


def tls_context(ca: bytes) -> ssl.SSLContext:
    """Trust one authority, for the name that was asked for, by TLS 1.2 or newer.

    Raises
    ------
    ConfigError
        The bytes are no certificates in PEM.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_verify_locations(cadata=ca.decode("ascii", "ignore"))
    except (ssl.SSLError, ValueError):
        raise ConfigError(
            "the aggregator's authority must be certificates in PEM",
            fix="Ask the coordinator for them",
            where="server.ca",
        ) from None
    return context


# X509_V_ERR_CERT_NOT_YET_VALID and X509_V_ERR_CERT_HAS_EXPIRED: what a wrong clock makes of a
# certificate that is right.
_BY_THE_CLOCK: Final = {9: "is not valid yet", 10: "has expired"}


def why_untrusted(error: BaseException | None) -> tuple[str, str] | None:
    """Why a certificate was not accepted, and what to do; None for errors of another kind.

    Where validity in time was the reason, this machine's clock is told: it may be the one that is
    wrong.
    """
    while error is not None and not isinstance(error, ssl.SSLCertVerificationError):
        error = error.__cause__ or error.__context__
    if error is None:
        return None
    if (found := _BY_THE_CLOCK.get(error.verify_code)) is None:
        return error.verify_message, "Compare authority and address with the coordinator's"
    clock = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    if error.verify_code == min(_BY_THE_CLOCK):
        fix = "Set this machine's clock (NTP): it is behind, or the certificate was made ahead"
    else:
        fix = "Set this machine's clock (NTP) if it is ahead; else have the certificate renewed"
    return f"it {found} by this machine's clock, {clock}", fix


def reason_of(error: BaseException) -> str:
    """Why a connection failed, in the words of the operating system or of TLS; they name no place.

    httpx gives one name, such as ``ConnectError``, to a refused connection, an unknown host and a
    broken handshake.
    """
    words, cause = type(error).__name__, error.__cause__ or error.__context__
    while cause is not None:
        if isinstance(cause, OSError):
            words = (cause.reason if isinstance(cause, ssl.SSLError) else cause.strerror) or words
        cause = cause.__cause__ or cause.__context__
    return words


def read_ca(server: Endpoint) -> bytes:
    """The authority's certificates.

    Raises
    ------
    ConfigError
        The file cannot be read, or holds none.
    """
    try:
        content = server.ca.read_bytes()
    except OSError as error:
        raise ConfigError(
            "the aggregator's authority must be a readable file",
            value=os.strerror(error.errno or 0),
            fix="Ask the coordinator for it",
            where="server.ca",
        ) from None
    tls_context(content)
    return content


def use_proxy(server: Endpoint) -> None:
    """Have this process use the site's own proxy, whatever the environment says of proxies."""
    if not server.proxy:
        return
    for name in _VARIABLES:
        os.environ.pop(name, None)
        os.environ.pop(name.upper(), None)
    os.environ["HTTPS_PROXY"] = server.proxy


def proxy_of(server: Endpoint) -> str:
    """The proxy that the aggregator is reached through, "" for none; it may hold a password."""
    if server.proxy:
        return server.proxy
    if proxy_bypass(server.address.rpartition(":")[0].strip("[]")):
        return ""
    known = getproxies()
    return known.get("https") or known.get("all") or ""


def restrict_responses(client: httpx.Client, most_bytes: int) -> None:
    """Take no answer that is larger, is compressed, or sends the call elsewhere.

    Parameters
    ----------
    client : httpx.Client
        Changed.
    most_bytes : int
        Of one answer; more is not read.
    """
    client.follow_redirects = False
    # What is small on the way may be any size once it is unpacked.
    client.headers["accept-encoding"] = "identity"

    def look(response: httpx.Response) -> None:
        if response.headers.get("content-encoding", "identity") != "identity":
            raise ProtocolError("an answer must not be compressed")
        stream = response.stream
        if isinstance(stream, httpx.SyncByteStream):
            response.stream = _Bounded(stream, most_bytes)

    client.event_hooks = {"response": [look]}


class _Bounded(httpx.SyncByteStream):
    """A stream that ends in an error where it is too long."""

    def __init__(self, stream: httpx.SyncByteStream, most: int) -> None:
        self._stream, self._most = stream, most

    def __iter__(self) -> Iterator[bytes]:
        total = 0
        for part in self._stream:
            total += len(part)
            if total > self._most:
                raise ProtocolError(
                    f"an answer has at most {self._most} bytes", fix="Raise server.max_download_mib"
                )
            yield part

    def close(self) -> None:
        self._stream.close()
