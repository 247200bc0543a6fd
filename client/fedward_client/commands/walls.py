"""The importer's walls: built before a command talks to the PACS, and looked at from inside."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedward.child_process import end_with_parent
from fedward.console import say
from fedward.errors import ConfigError, Interrupted
from fedward_client.daemon.isolation import find_readable
from fedward_client.daemon.launch import WALLED

if TYPE_CHECKING:
    from fedward_client.config import SiteConfig


def build_walls(config: Path) -> None:
    """Become a process within walls, where the kernel lets this user build them."""
    if WALLED not in os.environ:
        words = [sys.executable, "-m", "fedward_client.daemon.launch", "importer"]
        os.execv(words[0], [*words, str(config), *sys.argv[1:]])


def check_walls(site: SiteConfig) -> None:
    """See that this process is within the importer's walls.

    Raises
    ------
    ConfigError
        It is not, and the site does not allow that.
    """
    from fedward_client.config import importer_hidden_places

    found = find_readable(importer_hidden_places(site))
    if found.holds:
        return
    if not site.importer.allow_unconfined:
        raise ConfigError(
            "the importer must see neither the site's state nor the trainer's socket",
            value=found.text,
            fix="Run it as a user of its own, under systemd or in a container, or set "
            "importer.allow_unconfined = true",
            where="importer",
        )
    say(f"warning: the importer is not confined: {found.text}", err=True, fg="yellow")


@contextmanager
def kept_on_ctrl_c(rule: str) -> Iterator[None]:
    """Ctrl-C and SIGTERM end a command that goes on when it is given again."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(rule, fix="Give the command again to go on") from None


def run_apart(words: Sequence[str], config: Path) -> tuple[int, dict[str, Any]]:
    """Run a command that talks to the PACS in a process of its own, within the walls.

    Parameters
    ----------
    words : sequence of str
        The command; its paths are absolute.
    config : Path
        The site's configuration.

    Returns
    -------
    int
        Its exit code; it has said on standard error why it is not 0.
    dict
        The object that it prints; empty where it failed.
    """
    command = [sys.executable, "-m", "fedward_client.cli", *words]
    process = subprocess.Popen(
        [*command, "--config", str(config.absolute()), "--json"],
        stdout=subprocess.PIPE,
        preexec_fn=end_with_parent(signal.SIGTERM),
    )
    try:
        said, _ = process.communicate()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    try:
        told: dict[str, Any] = json.loads(said)
    except ValueError:
        told = {}
    return process.returncode, {} if "error" in told else told
