"""Entry points of the commands: exit codes and messages instead of tracebacks."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from importlib.metadata import requires, version
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn

import click
import typer
from rich import console as rich_console
from rich import table as rich_table
from rich.segment import Segment
from rich.text import Text

from fedward.errors import FedwardError, Interrupted
from fedward.printable import printable, printable_json

# Where a module's name is not that of the distribution that an extra lists.
_DISTRIBUTIONS: Final = {"PIL": "pillow", "ray": "flwr[simulation]"}
_PIPE_WIDTH: Final = 160
_OURS: Final = frozenset(
    {"fedward", "fedward_client", "fedward_server", "fedward_strategies", "fedward_simulation"}
)


def run_command(app: Callable[..., Any]) -> None:
    """Run a command line; a failure is printed and ends with its exit code.

    Parameters
    ----------
    app : callable
        A typer application.
    """
    # Nobody but the owner writes what a command made, whatever the umask was.
    os.umask(os.umask(0o022) | 0o022)
    try:
        app(standalone_mode=True)
    except KeyboardInterrupt:
        fail(Interrupted("the command was interrupted", fix="Run it again"))
    except FedwardError as error:
        fail(error)
    except SystemExit as ended:
        # Typer has printed a mistake in the command's words by now, for people.
        if isinstance(ended.__context__, click.ClickException):
            _tell_program("UsageError", ended.__context__.exit_code, ended.__context__.message)
        raise
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in _OURS:
            raise
        fail(_missing(error))


def fail(error: FedwardError) -> NoReturn:
    """Tell the user, and any program that asked with ``--json``, and end."""
    _tell_program(type(error).__name__, error.exit_code, str(error))
    say(f"error: {error}", err=True, fg="red")
    raise SystemExit(error.exit_code)


def say(text: str, *, err: bool = False, fg: str | None = None) -> None:
    """Print a line; what is unsafe for a terminal in it is shown as an escape."""
    typer.secho(printable(text), err=err, fg=fg)


def moment(text: str) -> str:
    """A time in ISO 8601 to the second, with its offset; what is none is shown as it is."""
    try:
        return datetime.fromisoformat(text).isoformat(sep=" ", timespec="seconds")
    except ValueError:
        return text


def _tell_program(error: str, exit_code: int, message: str) -> None:
    if "--json" in sys.argv:
        print_json({"error": error, "exit_code": exit_code, "message": message})


def _show_version(asked: bool) -> None:
    if asked:
        say(f"fedward {version('fedward')}")
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option("--version", help="The version.", is_eager=True, callback=_show_version),
]


def _missing(error: ModuleNotFoundError) -> FedwardError:
    """A container, and an extra of the package, hold what their own processes need and no more."""
    fix = "run it in the container, or on the machine, whose work it is"
    if extra := _extra_of((error.name or "").partition(".")[0]):
        fix = f"install it with `pip install 'fedward[{extra}]'`, or {fix}"
    return FedwardError(
        "this command needs a package that is not installed here",
        value=error.name,
        fix=fix[0].upper() + fix[1:],
    )


def _extra_of(module: str) -> str:
    """The extra that installs a module; of several, that of the running program."""
    distribution = _DISTRIBUTIONS.get(module, module.replace("_", "-")).lower()
    pattern = re.compile(rf"{re.escape(distribution)}(?![\w.-]).* extra == ['\"](\w+)['\"]")
    lines = requires("fedward") or ()
    found = [match[1] for line in lines if (match := pattern.match(line)) and match[1] != "dev"]
    own = Path(sys.argv[0]).name.removeprefix("fedward-").replace("simulate", "simulation")
    return own if own in found else next(iter(found), "")


def stop_on_signals(stop: threading.Event) -> None:
    """SIGTERM and Ctrl-C set an event, on which everything ends cleanly."""
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: stop.set())


@contextmanager
def interruptible() -> Iterator[None]:
    """Within it, the first SIGINT, SIGTERM or SIGHUP raises KeyboardInterrupt, once.

    A shell starts background jobs with SIGINT ignored, and Python then leaves it so; here it counts
    all the same. SIGHUP stays ignored where `nohup` had it so. Later signals are ignored, since
    results are being written then.
    """
    names = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        names.append(signal.SIGHUP)

    def interrupt(*_: object) -> NoReturn:
        for name in names:
            signal.signal(name, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {name: signal.signal(name, interrupt) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def wait_until(stop: threading.Event) -> None:
    """Wait for the event of :func:`stop_on_signals` in the main thread.

    A process that was frozen may hand the signal to another thread when it goes on. Python acts
    on it in the main thread alone, once that wakes: so it wakes.
    """
    while not stop.wait(1.0):
        pass


def leave() -> NoReturn:
    """End this process, well and at once: no thread that is still at something is waited for."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)


class Console(rich_console.Console):
    """A console that shows text as text: no escape sequence and no markup of a value has an effect.

    Whoever wants markup in one print says ``markup=True`` and escapes the values in it.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, **options})
        if not self.is_terminal and "COLUMNS" not in os.environ and "width" not in options:
            self.width = _PIPE_WIDTH  # nobody's window, but a file or another program

    def render_str(self, text: str, **options: Any) -> Text:
        """A string, before its width is measured."""
        return super().render_str(printable(text), **options)

    def render(
        self, renderable: Any, options: rich_console.ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Render; every piece of text passes here, the styles around it do not."""
        for one in super().render(renderable, options):
            yield one if one.control else Segment(printable(one.text), one.style)


class Table(rich_table.Table):
    """A table that cuts nothing short: ids, times and hashes go on in the next line instead."""

    def add_column(self, *arguments: Any, **options: Any) -> None:
        """Add a column."""
        super().add_column(*arguments, **{"overflow": "fold", **options})


class _Formatter(logging.Formatter):
    """Log lines quote what others sent."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def private_files() -> None:
    """Let this process and its children make files and folders for their owner alone.

    What others may read says so where it is made.
    """
    os.umask(0o077)


def log_to_stderr(level: str = "info") -> None:
    """Our own log lines from a level on, and nobody else's below errors.

    Libraries quote what they work on.

    Parameters
    ----------
    level : str
        ``debug``, ``info``, ``warning`` or ``error``.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("fedward")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(level.upper())
    for noisy in ("flwr", "httpx", "httpcore", "alembic"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on standard output, on one line."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, allow_nan=False)
    typer.echo(printable_json(text))
