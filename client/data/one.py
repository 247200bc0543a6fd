"""One sample from its files to what a model takes, in this process or in another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from client.data import reasons
from client.data.quiet import quiet
from client.data.transform import Prepared, prepare_image
from client.data.types import Sample
from fedward.plan.schema import Preprocessing, Task

Outcome = Prepared | str


@dataclass(frozen=True)
class Job:
    """A sample to prepare."""

    sample: Sample
    task: Task
    prep: Preprocessing


def prepare_sample(job: Job) -> Outcome:
    """The prepared image, or the reason for which it is left out; never raises for a file."""
    sample = job.sample
    try:
        if job.task.kind == "segmentation" and sample.mask is None:
            return reasons.NO_MASK
        if job.task.kind == "classification" and sample.label is None:
            return reasons.NO_LABEL
        with quiet():
            image = sample.load()
            mask = sample.mask() if sample.mask is not None else None
            return prepare_image(image, mask, job.task, job.prep)
    except Exception as error:
        # One bad file must not stop a site, whatever its decoder raises.
        return reasons.reason_of(error)


def prepare_in_worker(job: Job) -> Outcome:
    """The same in a process of its own."""
    with one_torch_thread():
        return prepare_sample(job)


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """One thread for each image.

    Images are small: handing a part of each to other threads cost 25 times the work itself on
    two busy cores. Workers are the way to use more of them.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
