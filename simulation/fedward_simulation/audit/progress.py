"""What a running audit shows on a terminal."""

from __future__ import annotations

from types import TracebackType

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from fedward.console import Console
from fedward_server.events import Event, RoundEnded, StudyStarted


class AuditProgress:
    """A bar per federation; on something that is no terminal a line per part.

    Parameters
    ----------
    console : Console
        Where it draws.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress = Progress(
            TextColumn("{task.description:<24}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        self._bars: dict[str, TaskID] = {}

    def __enter__(self) -> AuditProgress:
        if self.console.is_terminal:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def note(self, text: str) -> None:
        """Say what is being done outside the federations."""
        self.console.print(text, style="dim", highlight=False)

    def part(self, name: str) -> None:
        """A part of the audit begins."""
        self.note(f"audit: {name}")

    def listen(self, event: Event) -> None:
        """Take a federation's event."""
        if isinstance(event, StudyStarted):
            self._bars[event.arm] = self._progress.add_task(event.arm, total=event.rounds)
        elif isinstance(event, RoundEnded) and event.arm in self._bars:
            self._progress.update(self._bars[event.arm], completed=event.result.round)
