"""``fedward-client``: a hospital's data, and its part in studies."""

from __future__ import annotations

import typer

from fedward.console import Version, run_command
from fedward.startup import prepare
from fedward_client.commands.audit import audit_app
from fedward_client.commands.daemon import add_to
from fedward_client.commands.data import data_app
from fedward_client.commands.explain import explain
from fedward_client.commands.model import model_app
from fedward_client.commands.predict import predict
from fedward_client.commands.store import store
from fedward_client.commands.watch import watch

app = typer.Typer(
    help="A hospital's images and its part in studies, at the hospital.",
    epilog="First steps: fedward-client data report NAME --config site.toml | doctor | pending",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data")
app.add_typer(audit_app, name="audit")
app.add_typer(model_app, name="model")
add_to(app)
app.command(
    "predict",
    epilog="Example: fedward-client predict model.safetensors scans --out answers",
)(predict)
app.command("store", epilog="Example: fedward-client store answers --pacs main --config site.toml")(
    store
)
app.command(
    "watch",
    epilog="Example: fedward-client watch model.safetensors chest --out answers --store",
)(watch)
app.command(
    "explain",
    epilog="Example: fedward-client explain model.safetensors scans --out reasons",
)(explain)


@app.callback()
def _top(version: Version = False) -> None:
    """A hospital's images and its part in studies, at the hospital."""


def main() -> None:
    """Entry point."""
    prepare()
    run_command(app)


if __name__ == "__main__":
    main()
