"""The command line's way to the operator API."""

from __future__ import annotations

import json
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from fedward import errors
from fedward.errors import FedwardError, ServiceError
from server.config import load_config


@dataclass(frozen=True)
class Place:
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
    def find(cls, config: Path, url: str, token: str, ca: Path | None) -> Place:
        """What the options say; for the rest, what the configuration of this machine says.

        Raises
        ------
        ConfigError
            There is neither.
        """
        if url:
            return cls(url.rstrip("/"), token, ca)
        here = load_config(config)
        own = token or here.local_token.read_text().strip()
        return cls(here.api_url, own, ca or here.tls.ca, here=True)


class ApiClient:
    """Calls the API; its problems come back as the errors that they are.

    Parameters
    ----------
    place : Place
        Where it is.
    """

    def __init__(self, place: Place) -> None:
        context = ssl.create_default_context(cafile=str(place.ca) if place.ca else None)
        context.check_hostname = not place.here
        self._http = httpx.Client(
            base_url=place.url, verify=context, timeout=30.0,
            headers={"Authorization": f"Bearer {place.token}"} if place.token else {},
        )  # fmt: skip

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """A call and its JSON answer."""
        return self._send(method, path, body).json()

    def fetch(self, path: str) -> bytes:
        """A file."""
        return self._send("GET", path).content

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

    def _send(self, method: str, path: str, body: Any = None) -> httpx.Response:
        try:
            # A body of its own length also where there is nothing to say.
            content = b"" if body is None else json.dumps(body).encode()
            answer = self._http.request(
                method, path, content=content if method != "GET" else None,
                headers={"Content-Type": "application/json"} if body is not None else {},
            )  # fmt: skip
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
        return ServiceError(
            "the address must be that of an aggregator's API", value=answer.status_code,
            fix="Check --url",
        )  # fmt: skip
    return made


def _unreachable(error: httpx.HTTPError) -> ServiceError:
    return ServiceError(
        "the aggregator's service must be reachable", value=type(error).__name__,
        fix="Start it with `fedward-server run`; check --url and --ca",
    )  # fmt: skip
