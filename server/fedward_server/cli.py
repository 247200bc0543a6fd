"""``fedward-server``: the aggregator."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedward.console import (
    Version,
    log_to_stderr,
    moment,
    print_json,
    private_files,
    run_command,
    say,
    stop_on_signals,
)
from fedward.startup import prepare
from fedward_server.cli_profile import at
from fedward_server.commands.options import SERVER, Ca, Config, Json, Token, Url, api
from fedward_server.commands.site import site_app
from fedward_server.commands.study import study_app

if TYPE_CHECKING:
    from fedward_server.certificates import Facts

app = typer.Typer(
    help="Run an aggregator: enrol hospitals, submit studies.",
    epilog="First steps: fedward-server init agg --host agg.example.org | "
    "fedward-server run --config agg/server.toml",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
token_app = typer.Typer(help="Tokens of operators.", no_args_is_help=True)
certificate_app = typer.Typer(help="The server's certificate.", no_args_is_help=True)
app.add_typer(site_app, name="site")
app.add_typer(study_app, name="study")
app.add_typer(token_app, name="token")
app.add_typer(certificate_app, name="certificate")


@app.callback()
def _top(version: Version = False) -> None:
    """Run an aggregator: enrol hospitals, submit studies."""


@app.command(epilog="Example: fedward-server init agg --host agg.example.org")
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="a new or empty folder")],
    host: Annotated[
        list[str] | None, typer.Option(help="name or address that hospitals use; repeatable")
    ] = None,
    name: Annotated[str, typer.Option(help="what people call it")] = "aggregator",
    database: Annotated[str, typer.Option(help="PostgreSQL URL; without it SQLite")] = "",
    certificate: Annotated[Path | None, typer.Option(help="your own certificate, PEM")] = None,
    key: Annotated[Path | None, typer.Option(help="its key, PEM")] = None,
    ca: Annotated[Path | None, typer.Option(help="its authority, PEM")] = None,
    as_json: Json = False,
) -> None:
    """Make an aggregator's folder: configuration, certificates, keys, the first token."""
    from fedward_server.setup import OwnCertificate, SetupOptions, initialise

    own = (certificate, key, ca)
    if any(own) and not all(own):
        raise typer.BadParameter("give --certificate, --key and --ca together, or none")
    brought = OwnCertificate(certificate, key, ca) if certificate and key and ca else None
    made = initialise(folder, SetupOptions(name, tuple(host or ()), brought, database))
    if as_json:
        print_json(
            {
                "config": str(made.config),
                "token": made.token,
                "coordinator": made.coordinator,
                "expires": str(made.certificate.expires),
            }
        )
        return
    say(f"Made {made.config}.")
    say(f"Admin token, shown this once: {made.token}")
    say(f"Coordinator's fingerprint, for the policies of hospitals: {made.coordinator}")
    say(f"The certificate ends {made.certificate.expires}.")
    say(f"Next: fedward-server run --config {made.config}")


@app.command()
def fingerprint(config: Config = SERVER, as_json: Json = False) -> None:
    """The coordinator's fingerprint, which hospitals name in `policy.coordinators`."""
    from fedward_server.config import load_config
    from fedward_server.setup import coordinator_fingerprint

    found = coordinator_fingerprint(load_config(config))
    if as_json:
        print_json({"coordinator": found})
    else:
        say(found)


@app.command()
def run(config: Config = SERVER) -> None:
    """Run the SuperLink, the studies and the operator API, and keep them running."""
    from fedward.files import alone
    from fedward_server.config import load_config
    from fedward_server.supervise import run_aggregator

    settings = load_config(config)
    log_to_stderr(settings.server.log_level)
    private_files()
    stop = threading.Event()
    stop_on_signals(stop)
    with alone(settings.server.state, "run"):
        raise typer.Exit(run_aggregator(settings, config.absolute(), stop))


@app.command()
def health(
    config: Config = SERVER,
    url: Url = "",
    token: Token = "",
    ca: Ca = None,
    as_json: Json = False,
) -> None:
    """Whether a study could run now; for containers and monitoring."""
    ready, parts = api(config, url, token, ca).ready()
    if as_json:
        print_json({"ready": ready, "parts": parts})
    else:
        for part, found in parts.items():
            say(f"{part}: {found}")
    raise typer.Exit(0 if ready else 1)


@app.command(epilog="Example: fedward-server backup agg.tar --keys")
def backup(
    target: Annotated[Path, typer.Argument(metavar="FILE", help="the archive to write")],
    keys: Annotated[bool, typer.Option("--keys", help="the keys and certificates too")] = False,
    config: Config = SERVER,
    as_json: Json = False,
) -> None:
    """Copy studies, weights and registry into one archive; the service may run."""
    from fedward_server.backup import backup as write_backup
    from fedward_server.config import load_config

    size = write_backup(load_config(config), target, keys=keys)
    if as_json:
        print_json({"backup": target.name, "bytes": size, "keys": keys})
    else:
        say(f"{target}: {size / 2**20:.1f} MiB{', with keys' if keys else ''}")


@app.command(epilog="Example: fedward-server restore agg.tar")
def restore(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="an archive of `backup`")],
    config: Config = SERVER,
    as_json: Json = False,
) -> None:
    """Put an archive back; the service must not run, and enrols the sites anew at its start."""
    from fedward_server.config import load_config
    from fedward_server.restore import restore as put_back

    done = put_back(load_config(config), source)
    if as_json:
        print_json({"restored": done.parts, "before": done.aside})
    else:
        say(f"Restored {', '.join(done.parts)}; what was there is in {done.aside}.")


@token_app.command("create", epilog="Example: fedward-server token create anna --role coordinator")
def create_token(
    name: Annotated[str, typer.Argument(help="whose")],
    role: Annotated[str, typer.Option(help="viewer, coordinator or admin")] = "viewer",
    config: Config = SERVER,
    url: Url = "",
    token: Token = "",
    ca: Ca = None,
    as_json: Json = False,
) -> None:
    """Make a token; its text is shown this once."""
    made = api(config, url, token, ca).call("POST", "/v1/tokens", {"name": name, "role": role})
    if as_json:
        print_json(made)
    else:
        say(made["text"])


@token_app.command("list")
def list_tokens(
    config: Config = SERVER,
    url: Url = "",
    token: Token = "",
    ca: Ca = None,
    as_json: Json = False,
) -> None:
    """All tokens, without what opens the door."""
    found = api(config, url, token, ca).call("GET", "/v1/tokens")
    if as_json:
        print_json({"tokens": found})
        return
    for one in found:
        ended = f", revoked {moment(one['revoked'])}" if one["revoked"] else ""
        say(f"{one['name']}: {one['role']}, made {moment(one['created'])}{ended}")


@token_app.command("revoke", epilog="Example: fedward-server token revoke anna")
def revoke_token(
    name: Annotated[str, typer.Argument(help="whose")],
    config: Config = SERVER,
    url: Url = "",
    token: Token = "",
    ca: Ca = None,
    as_json: Json = False,
) -> None:
    """End a token, at once."""
    made = api(config, url, token, ca).call("DELETE", at("tokens", name))
    if as_json:
        print_json(made)
    else:
        say(f"{name} is revoked.")


@certificate_app.command("show")
def show_certificate(config: Config = SERVER, as_json: Json = False) -> None:
    """Names and end of the server's certificate."""
    from fedward_server.certificates import read_facts
    from fedward_server.config import load_config

    _print_certificate(read_facts(load_config(config).tls.certificate), as_json=as_json)


@certificate_app.command("renew")
def renew_certificate(
    host: Annotated[list[str] | None, typer.Option(help="names; without it the old ones")] = None,
    config: Config = SERVER,
    as_json: Json = False,
) -> None:
    """A new certificate of init's own authority; restart the service to use it."""
    from fedward_server.config import load_config
    from fedward_server.setup import renew

    _print_certificate(renew(load_config(config), tuple(host or ())), as_json=as_json)


def _print_certificate(facts: Facts, *, as_json: bool) -> None:
    times = {"begins": str(facts.begins), "expires": str(facts.expires)}
    told = {**vars(facts), "hosts": list(facts.hosts), **times}
    if as_json:
        print_json(told)
    else:
        say(f"hosts: {', '.join(facts.hosts)}")
        say(f"expires: {facts.expires}")
        # No fingerprint: that word is for keys, which people compare by telephone.
        say(f"SHA-256 of the certificate: {facts.fingerprint}")


def main() -> None:
    """Entry point."""
    prepare()
    run_command(app)


if __name__ == "__main__":
    main()
