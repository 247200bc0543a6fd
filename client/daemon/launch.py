"""Start one of the two processes within its walls: ``python -m client.daemon.launch WHICH …``.

A step of its own between the supervisor and the process: capabilities fall away when the program
is replaced, and what the supervisor is stays out of it.
"""

from __future__ import annotations

import os
import pwd
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from client.config import SiteConfig, load_config
from client.daemon.isolation import cover, drop_privileges, enter_no_network

NO_WALLS: Final = "FEDWARD_NO_WALLS"


def hidden_places(config: SiteConfig) -> list[Path]:
    """What the connector must not see."""
    return [config.site.state, *(one.root for one in config.datasets.values())]


def main(arguments: Sequence[str]) -> None:
    """Build the walls and become the process; without walls where the kernel refuses.

    Whether they stand is not decided here: each process finds out for itself, and the trainer
    opens no dataset without.
    """
    which, config_path = arguments[0], Path(arguments[1])
    try:
        if which == "trainer":
            enter_no_network()
        else:
            config = load_config(config_path, datasets_here=False)
            cover(hidden_places(config))
            _become(config.server.user if config.server else "")
    except OSError as error:
        os.environ[NO_WALLS] = os.strerror(error.errno or 0)
    drop_privileges()
    command = [sys.executable, "-m", "client.cli", which, "--config", str(config_path)]
    os.execv(command[0], command)


def _become(user: str) -> None:
    """Be another user, if one is named and this one may."""
    if not user or os.geteuid() != 0:
        return
    entry = pwd.getpwnam(user)
    os.setgroups([])
    os.setgid(entry.pw_gid)
    os.setuid(entry.pw_uid)


if __name__ == "__main__":
    main(sys.argv[1:])
