"""What a running study shows on a terminal."""

from __future__ import annotations

from types import TracebackType

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fedward.console import Console
from fedward_server.events import Event, RoundEnded, SiteAnswered, StudyStarted


class StudyProgress:
    """A bar per arm: rounds, sites that answered, loss, leading figure, time to go.

    Parameters
    ----------
    console : Console
        Where it draws; on something that is no terminal it prints a line per round instead.
    primary : str
        The metric shown.
    """

    def __init__(self, console: Console, primary: str) -> None:
        self.console, self.primary = console, primary
        self._bars: dict[str, TaskID] = {}
        self._answers: dict[str, int] = {}
        self._sites: dict[str, int] = {}
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<24}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]:<34}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=False,
        )
        self._note: TaskID | None = None

    def __enter__(self) -> StudyProgress:
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
        """Say what is being done outside the rounds."""
        self.console.print(text, style="dim", highlight=False)

    def listen(self, event: Event) -> None:
        """Take a study's event."""
        if isinstance(event, StudyStarted):
            self._sites[event.arm] = len(event.sites)
            self._bars[event.arm] = self._progress.add_task(event.arm, total=event.rounds, state="")
        elif isinstance(event, SiteAnswered):
            self._answered(event)
        elif isinstance(event, RoundEnded):
            self._ended(event)

    def _answered(self, event: SiteAnswered) -> None:
        if event.what != "train" or event.arm not in self._bars:
            return
        count = self._answers[event.arm] = self._answers.get(event.arm, 0) + 1
        state = f"{count} of {self._sites[event.arm]} sites"
        self._progress.update(self._bars[event.arm], state=state)

    def _ended(self, event: RoundEnded) -> None:
        self._answers[event.arm] = 0
        state = self._state(event)
        self._progress.update(self._bars[event.arm], completed=event.result.round, state=state)
        if not self.console.is_terminal:
            seconds = f"{event.result.seconds:.1f} s"
            told = ", ".join(filter(None, (f"round {event.result.round} of {event.rounds}", state)))
            self.console.print(f"{event.arm}: {told}, {seconds}", highlight=False)

    def _state(self, event: RoundEnded) -> str:
        loss, value = event.result.train_loss, event.result.validation.get(self.primary)
        parts = [f"loss {loss:.3f}" if loss is not None else ""]
        parts.append(f"{self.primary} {value:.3f}" if value is not None else "")
        parts.append(f"{len(event.result.failures)} failed" if event.result.failures else "")
        return ", ".join(part for part in parts if part)
