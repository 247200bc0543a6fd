"""Start a process of a hospital within its walls.

Usage: ``python -m fedward_client.daemon.launch WHICH CONFIG …``; the importer is given the words of
its command.

A step of its own between the supervisor and the process: capabilities fall away when the program
is replaced, and what the supervisor is stays out of it.
"""

from __future__ import annotations

import os
import pwd
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fedward.console import run_command
from fedward.errors import ConfigError
from fedward_client.daemon.isolation import (
    READ_OTHERS,
    cover,
    drop_privileges,
    enter_no_network,
    keep_from_writing,
)

if TYPE_CHECKING:
    from fedward_client.config import SiteConfig

NO_WALLS: Final = "FEDWARD_NO_WALLS"
WALLED: Final = "FEDWARD_WALLED"


def main(arguments: Sequence[str]) -> None:
    """Build the walls and become the process; without walls where the kernel refuses.

    Whether they stand is not decided here: each process finds out for itself, and the trainer
    opens no dataset without.

    Raises
    ------
    ConfigError
        ``server.user`` is nobody.
    """
    which, config_path = arguments[0], Path(arguments[1])
    try:
        if which == "trainer":
            enter_no_network()
        else:
            from fedward_client.config import load_config

            config = load_config(config_path, datasets_here=False)
            if which == "importer":
                _wall_off_importer(config, fetches=list(arguments[2:4]) == ["data", "fetch"])
            else:
                _wall_off(config)
    except OSError as error:
        os.environ[NO_WALLS] = os.strerror(error.errno or 0)
    drop_privileges(frozenset() if which == "connector" else READ_OTHERS)
    words = [which, "--config", str(config_path)]
    if which == "importer":
        words, os.environ[WALLED] = list(arguments[2:]), "importer"
    os.execv(sys.executable, [sys.executable, "-m", "fedward_client.cli", *words])


def _wall_off(config: SiteConfig) -> None:
    """Hide the images from what becomes the connector, and let it change its own folder alone."""
    from fedward_client.config import hidden_places

    server = config.server
    cover(hidden_places(config))
    with suppress(OSError):  # an older kernel; the connector finds out, and says so
        if server is not None:
            server.state.mkdir(mode=0o700, parents=True, exist_ok=True)
            keep_from_writing([server.state])
    _become(server.user if server else "")


def _wall_off_importer(config: SiteConfig, *, fetches: bool) -> None:
    """Hide all but the datasets, and let it change its own folder, and what it fetches into."""
    from fedward_client.config import importer_hidden_places

    cover(importer_hidden_places(config))
    places = [config.importer.state]
    if fetches:
        places += [one.root for one in config.datasets.values() if one.fetch]
    with suppress(OSError):  # an older kernel
        for place in places:
            place.mkdir(mode=0o750, parents=True, exist_ok=True)
        keep_from_writing(places)


def _become(user: str) -> None:
    """Be another user, if one is named and this one may."""
    if not user or os.geteuid() != 0:
        return
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        raise ConfigError(
            "the connector's user must exist on this machine",
            value=user,
            fix="Make it, or name another",
            where="server.user",
        ) from None
    os.setgroups([])
    os.setgid(entry.pw_gid)
    os.setuid(entry.pw_uid)


if __name__ == "__main__":
    run_command(lambda **_: main(sys.argv[1:]))
