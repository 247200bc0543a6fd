"""Which images could not be prepared: what is prepared counts them and forgets their names."""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from fedward import rule_codes
from fedward.plan.schema import Plan
from fedward_client.cohort.records import files_of
from fedward_client.cohort.training import Preparers
from fedward_client.data.readers.npz import ArrayImage
from fedward_client.data.sample import PreparedSite, Sample
from fedward_client.data.transforms import Job, Outcome, one_torch_thread, prepare_sample
from fedward_client.data.volumes import file_of
from fedward_client.worker_pool import WorkerPool
from fedward_simulation.left_out import Missed

_NOT_KNOWN = "(not known)"
_FOR_SLICE = 0.5  # seconds more for each slice of a volume

Lost = tuple[str, Sample]


class WatchedCrew(WorkerPool[Job, Outcome]):
    """A crew that remembers what could not be prepared.

    Parameters
    ----------
    crew : Crew
        Does the work; who made it ends it.
    """

    def __init__(self, crew: Preparers) -> None:
        super().__init__(crew.work, crew.limits)
        self.crew = crew
        self.lost: list[Lost] = []

    def in_order(
        self, items: Iterable[Job], seconds: Callable[[Job], float] = lambda _: 0.0
    ) -> Iterator[Outcome | None]:
        """As :meth:`Crew.in_order`."""
        given: deque[Job] = deque()
        for outcome in self.crew.in_order(_remembered(items, given), seconds):
            sample = given.popleft().sample
            if outcome is None or isinstance(outcome, str):
                self.lost.append((outcome or rule_codes.DECODER_FAILED, sample))
            yield outcome


def _remembered(items: Iterable[Job], given: deque[Job]) -> Iterator[Job]:
    for item in items:
        given.append(item)
        yield item


def unprepared(
    site: PreparedSite, samples: Sequence[Sample], plan: Plan, root: Path, crew: WatchedCrew
) -> list[Missed]:
    """Which of a site's images could not be prepared.

    What the crew saw; of images that lay in the cache what was kept beside them; else they are
    looked for.
    """
    if not site.left_out:
        return []
    kept = _kept(site)
    found = None if crew.lost else _read(kept)
    if found is None:
        lost = crew.lost or _look(samples, plan, crew)
        found = [(reason, _name(one, root)) for reason, one in lost]
        _write(kept, found)
    return _all_of([Missed(site.name, reason, name) for reason, name in found], site)


def _kept(site: PreparedSite) -> Path | None:
    file = file_of(site.images)
    return None if file is None else file.with_name("left-out.json")


def _read(path: Path | None) -> list[tuple[str, str]] | None:
    if path is None:
        return None
    try:
        return [(str(reason), str(name)) for reason, name in json.loads(path.read_text("utf-8"))]
    except (OSError, ValueError, TypeError):
        return None


def _write(path: Path | None, found: Sequence[tuple[str, str]]) -> None:
    if path is not None:
        with suppress(OSError):
            path.write_text(json.dumps(found), "utf-8")


def _look(samples: Sequence[Sample], plan: Plan, crew: WatchedCrew) -> list[Lost]:
    jobs = [Job(sample, plan.task, plan.preprocessing) for sample in samples]
    if not isinstance(samples[0].load, ArrayImage):
        for _ in crew.in_order(jobs, _patience):
            pass
        return crew.lost
    with one_torch_thread():
        tried = [(prepare_sample(job), job.sample) for job in jobs]
    return [(outcome, sample) for outcome, sample in tried if isinstance(outcome, str)]


def _patience(job: Job) -> float:
    return _FOR_SLICE * len(getattr(job.sample.load, "frames", ()))


def _name(sample: Sample, root: Path) -> str:
    """A sample's file under `root`; of an archive also its place there, or its patient."""
    file = files_of(sample, root)[0]
    name = file.name if file == root else file.relative_to(root).as_posix()
    if not isinstance(sample.load, ArrayImage):
        return name
    return f"{name}: {sample.patient.removeprefix(f'{sample.site}/')}"


def _all_of(found: Sequence[Missed], site: PreparedSite) -> list[Missed]:
    """As many as the site counts: a decoder that failed then may not fail now."""
    rest = Counter(site.left_out) - Counter(one.reason for one in found)
    return [*found, *(Missed(site.name, reason, _NOT_KNOWN) for reason in rest.elements())]
