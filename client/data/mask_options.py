"""What the segments of a mask mean, as a site says it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from client.data import reasons
from fedward.errors import ConfigError

Labels = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class MaskOptions:
    """How segments of a DICOM segmentation and regions of a structure set become classes.

    Attributes
    ----------
    segments : mapping
        Segment label or region name (any case), or number, to the name of a class; those without
        an entry take the class of their own name, if there is one.
    threshold : float
        Least share of its largest value at which a fractional segment counts, above 0, at most 1.
    background : tuple of str
        Labels (any case) that mean nothing; they do not count when a file's only segment is taken
        for the only class.
    """

    segments: Mapping[str, str] = field(default_factory=dict)
    threshold: float = 0.5
    background: tuple[str, ...] = ("background",)

    def labels(self, found: Sequence[tuple[int, str]], classes: Sequence[str]) -> Labels:
        """Pairs of a segment's number and its label, 1 being the first class.

        Parameters
        ----------
        found : sequence
            Number and name of each segment of a file.
        classes : sequence of str
            Of the task.

        Raises
        ------
        DataError
            "unknown class in mask": none of the segments is of a class.
        ConfigError
            `segments` names a class that the task does not have.
        """
        names = [plain(name) for name in classes]
        chosen = {name: place for place, name in reversed(list(enumerate(names, start=1)))}
        mapped = {plain(key): self._class(chosen, name) for key, name in self.segments.items()}
        matched = []
        for number, name in found:
            word = plain(name)
            label = mapped.get(word) or mapped.get(str(number)) or chosen.get(word)
            if label:
                matched.append((number, label))
        rest = [number for number, name in found if plain(name) not in map(plain, self.background)]
        if not matched and not mapped and len(rest) == len(names) == 1:
            matched = [(rest[0], 1)]
        if not matched:
            raise reasons.unusable(reasons.MASK_CLASS)
        return tuple(matched)

    def _class(self, chosen: Mapping[str, int], name: str) -> int:
        if plain(name) not in chosen:
            raise ConfigError(
                "a segment must be given a class of the task",
                value=name,
                fix="Name one of the classes",
                where="masks.segments",
            )
        return chosen[plain(name)]


def plain(text: str) -> str:
    """A name without case and space around it."""
    return text.strip().casefold()
