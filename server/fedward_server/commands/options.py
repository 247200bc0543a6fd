"""Options that most commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import click
import typer

from fedward_server.cli_profile import ApiClient, CliProfile

Config = Annotated[
    Path, typer.Option("--config", envvar="FEDWARD_SERVER", help="server.toml, on its machine")
]
Url = Annotated[str, typer.Option("--url", envvar="FEDWARD_URL", help="the API, from elsewhere")]
Token = Annotated[
    str, typer.Option("--token", envvar="FEDWARD_TOKEN", help="a token; local ones have their own")
]
Ca = Annotated[
    Path | None, typer.Option("--ca", envvar="FEDWARD_CA", help="the aggregator's authority, PEM")
]
Json = Annotated[bool, typer.Option("--json", help="one JSON object on standard output")]
SERVER = Path("server.toml")


def api(config: Path, url: str, token: str, ca: Path | None) -> ApiClient:
    """The API that the options mean; its connections close with the command."""
    client = ApiClient(CliProfile.find(config, url, token, ca))
    click.get_current_context().call_on_close(client.close)
    return client
