"""Options that the commands of ``fedward-client`` share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

SITE: Final = Path("site.toml")
Config = Annotated[
    Path, typer.Option("--config", envvar="FEDWARD_SITE", help="the site's site.toml")
]
Json = Annotated[bool, typer.Option("--json", help="one JSON object on standard output")]
