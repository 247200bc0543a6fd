"""``fedward-client``: what a hospital does with its own data."""

from __future__ import annotations

import sys

import typer

from client.commands.data import data_app
from client.commands.work import print_json
from fedward.errors import FedwardError, Interrupted

app = typer.Typer(
    help="Work with a hospital's images, at the hospital.", no_args_is_help=True,
    add_completion=False, pretty_exceptions_enable=False,
)  # fmt: skip
app.add_typer(data_app, name="data")


@app.callback()
def _top() -> None:
    """Work with a hospital's images, at the hospital."""


def main() -> None:
    """Entry point: every failure ends with its own exit code and a message, not a traceback."""
    try:
        app(standalone_mode=True)
    except KeyboardInterrupt:
        _fail(Interrupted("the command was interrupted", fix="Run it again"))
    except FedwardError as error:
        _fail(error)


def _fail(error: FedwardError) -> None:
    if "--json" in sys.argv:
        print_json(
            {"error": type(error).__name__, "exit_code": error.exit_code, "message": str(error)}
        )
    typer.secho(f"error: {error}", err=True, fg="red")
    raise SystemExit(error.exit_code)


if __name__ == "__main__":
    main()
