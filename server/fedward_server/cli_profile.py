"""Where the operator API is, for the command line."""

from __future__ import annotations

import hashlib
import json
import ssl
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from fedward import errors
from fedward.errors import AccessError, ConfigError, FedwardError, ServiceError
from fedward.https import why_untrusted
from fedward_server.config import load_config


@dataclass(frozen=True)
class CliProfile:
    """Where the API is, and with what it is called.

    Attributes
    ----------
    url, token : str
        Base address and bearer token.
    ca : Path or None
        The authority; None: the machine's.
    here : bool
        Whether it is this machine, whose certificate may stand for other names only.
    """

    url: str
    token: str
    ca: Path | None
    here: bool = False

    @classmethod
    def find(cls, config: Path, url: str, token: str, ca: Path | None) -> CliProfile:
        """What the options say; for the rest, what the configuration of this machine says.

        Raises
        ------
        ConfigError
            There is neither, or this machine's token cannot be read.
        """
        if url:
            return cls(url.rstrip("/"), token, ca)
        here = load_config(config)
        return cls(here.api_url, token or _own(here.local_token), ca or here.tls.ca, here=True)

    def trust(self) -> ssl.SSLContext:
        """What the API's certificate is held against.

        Raises
        ------
        ConfigError
            The authority's file is none.
        """
        try:
            context = ssl.create_default_context(cafile=str(self.ca) if self.ca else None)
        except OSError as error:  # of ssl too
            raise ConfigError(
                "the aggregator's authority must be a readable PEM file",
                value=type(error).__name__,
                fix="Give the aggregator's ca.crt with --ca",
                where="--ca",
            ) from None
        context.check_hostname = not self.here
        return context


def _own(path: Path) -> str:
    try:
        return path.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError):
        raise ConfigError(
            "this machine's own token must be readable",
            value=path.name,
            fix="Run it as the aggregator's user, give --token, or restore the keys",
            where="server.keys",
        ) from None


def at(*parts: str) -> str:
    """A path of the API; what people typed stays one part of it, whatever is in it.

    Raises
    ------
    ConfigError
        A part is no name.
    """
    for part in parts:
        if part in ("", ".", "..") or "/" in part:
            raise ConfigError(
                "a name must not be empty, nor have a slash in it",
                value=part or "nothing",
                fix="Take one of `site list`, `study list` or `token list`",
            )
    return "/v1/" + "/".join(quote(part, safe="", errors="replace") for part in parts)


# The command line's way to the operator API.


class ApiClient:
    """Calls the API; its problems come back as the errors that they are.

    Parameters
    ----------
    place : Place
        Where it is.

    Raises
    ------
    ConfigError, AccessError, ServiceError
        The authority, the token or the address is none.
    """

    def __init__(self, place: CliProfile) -> None:
        if not place.token.isascii() or not place.token.isprintable() or " " in place.token:
            raise AccessError(
                "a token must be the text that `token create` showed",
                fix="Copy it anew",
                where="--token",
            )
        try:
            self._http = httpx.Client(
                base_url=place.url,
                verify=place.trust(),
                timeout=30.0,
                headers={"Authorization": f"Bearer {place.token}"} if place.token else {},
            )
        except httpx.InvalidURL:
            raise _no_api() from None

    def close(self) -> None:
        """Close its connections."""
        self._http.close()

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """A call and its JSON answer."""
        answer = self._send(method, path, body)
        try:
            return answer.json()
        except ValueError:
            raise _no_api(answer.status_code) from None

    def fetch(self, path: str) -> bytes:
        """A file; where the answer states a SHA-256 (RFC 9530), it is checked.

        Raises
        ------
        ServiceError
            It did not arrive as it was sent.
        """
        answer = self._send("GET", path)
        stated = answer.headers.get("Repr-Digest", "")
        found = b64encode(hashlib.sha256(answer.content).digest()).decode()
        if stated and stated != f"sha-256=:{found}:":
            raise ServiceError(
                "a file must arrive as it was sent", fix="Fetch it again; look at what is between"
            )
        return answer.content

    def ready(self) -> tuple[bool, dict[str, str]]:
        """Whether a study could run, and how each part is.

        Raises
        ------
        ServiceError
            The service does not answer.
        """
        try:
            answer = self._http.get("/readyz")
            parts = dict(answer.json()["parts"])
        except httpx.HTTPError as error:
            raise _unreachable(error) from None
        except (ValueError, KeyError, TypeError):
            raise _problem(answer) from None
        return answer.is_success, parts

    def lines(self, path: str) -> Iterator[dict[str, Any]]:
        """Objects of a stream, as they come."""
        try:
            with self._http.stream("GET", path, timeout=httpx.Timeout(30.0, read=None)) as answer:
                if answer.is_error:
                    answer.read()
                    raise _problem(answer)
                for line in answer.iter_lines():
                    yield json.loads(line)
        except httpx.HTTPError as error:
            raise _unreachable(error) from None
        except ValueError:
            raise _no_api() from None

    def _send(self, method: str, path: str, body: Any = None) -> httpx.Response:
        try:
            # A body of its own length also where there is nothing to say.
            content = b"" if body is None else json.dumps(body).encode()
            answer = self._http.request(
                method,
                path,
                content=content if method != "GET" else None,
                headers={"Content-Type": "application/json"} if body is not None else {},
            )
        except httpx.HTTPError as error:
            raise _unreachable(error) from None
        if answer.is_error:
            raise _problem(answer)
        return answer


def _problem(answer: httpx.Response) -> FedwardError:
    try:
        told = answer.json()
        kind = getattr(errors, told["error"], FedwardError)
        made: FedwardError = kind(
            told["rule"], value=told["value"] or None, fix=told["fix"], where=told["where"]
        )
        made.exit_code = int(told["exit_code"])
    except (ValueError, KeyError, TypeError):
        return _no_api(answer.status_code)
    return made


def _no_api(status: int | None = None) -> ServiceError:
    return ServiceError(
        "the address must be that of an aggregator's API", value=status, fix="Check --url"
    )


def _unreachable(error: httpx.HTTPError) -> ServiceError:
    if why := why_untrusted(error):
        return ServiceError(
            "the aggregator's certificate must be valid, for its name and by this clock",
            value=why[0],
            fix=why[1],
            where="--ca",
        )
    return ServiceError(
        "the aggregator's service must be reachable",
        value=type(error).__name__,
        fix="Start it with `fedward-server run`; check --url and --ca",
    )
