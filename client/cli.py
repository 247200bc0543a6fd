"""``fedward-client``: what a hospital does with its own data."""

from __future__ import annotations

import typer

from client.commands.data import data_app
from fedward.console import run_command

app = typer.Typer(
    help="Work with a hospital's images, at the hospital.", no_args_is_help=True,
    add_completion=False, pretty_exceptions_enable=False,
)  # fmt: skip
app.add_typer(data_app, name="data")


@app.callback()
def _top() -> None:
    """Work with a hospital's images, at the hospital."""


def main() -> None:
    """Entry point."""
    run_command(app)


if __name__ == "__main__":
    main()
