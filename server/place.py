"""Where the operator API is, for the command line."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from fedward.errors import ConfigError
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
