"""Task identity and message ids for the in-process engine.

Flower builds a message from the identity of the running task, and gives it an id when it is
stored. In Flower's own runtimes a task process sets both; without one, this module does.
"""

from __future__ import annotations

import logging
import os
import uuid

from flwr.app import Message
from flwr.supercore import telemetry
from flwr.supercore.task_identity import TaskIdentity

RUN_ID = 1
SERVER_NODE = 1


def become_server() -> None:
    """Take the identity of a server task in this process."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN_ID, SERVER_NODE


def stamp(message: Message) -> str:
    """Give a message its id, as the link does when it stores one."""
    message.metadata.__dict__["_message_id"] = identifier = uuid.uuid4().hex
    return identifier


def disable_telemetry() -> None:
    """Send nothing to Flower's authors unless the environment asks for it.

    Flower reads the environment at its import, which is too early for a script that uses Fedward
    as a library.
    """
    telemetry.FLWR_TELEMETRY_ENABLED = os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")


def quiet() -> None:
    """Keep Flower's own log lines off the terminal; Fedward reports progress itself."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
