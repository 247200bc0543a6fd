"""Released updates, kept so that a repeated order gets the same update."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

from fedward.errors import BudgetError
from fedward.files import sweep_partial, write_private
from fedward.rule_codes import RuleCode

_KEEP: Final = 2


class Releases:
    """A folder of updates.

    Parameters
    ----------
    folder : Path
        Made when it is missing, for the owner alone.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        sweep_partial(folder)

    def keep(self, study: str, round_: int, content: bytes) -> str:
        """Put an update safely on the disk; gives its SHA-256. Only a study's last two are kept.

        Raises
        ------
        OutputError
            It cannot be written; then it must not leave either.
        """
        write_private(self._folder / f"{study}.{round_:06d}", content)
        for old in sorted(self._folder.glob(f"{study}.[0-9]*"))[:-_KEEP]:
            old.unlink(missing_ok=True)
        return hashlib.sha256(content).hexdigest()

    def again(self, study: str, round_: int, digest: str) -> bytes:
        """The update that was released.

        Raises
        ------
        BudgetError
            It is kept no longer, or was changed.
        """
        try:
            content = (self._folder / f"{study}.{round_:06d}").read_bytes()
        except OSError:
            content = b""
        if hashlib.sha256(content).hexdigest() != digest:
            raise BudgetError(
                RuleCode.UPDATE_KEPT,
                values={"round": round_},
                fix="Order the next round",
            )
        return content
