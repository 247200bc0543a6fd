"""The command line's way to the operator API."""

from __future__ import annotations

import hashlib
import json
from base64 import b64encode
from collections.abc import Iterator
from typing import Any

import httpx

from fedward import errors
from fedward.errors import AccessError, FedwardError, ServiceError
from server.place import Place


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

    def __init__(self, place: Place) -> None:
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
    return ServiceError(
        "the aggregator's service must be reachable",
        value=type(error).__name__,
        fix="Start it with `fedward-server run`; check --url and --ca",
    )
