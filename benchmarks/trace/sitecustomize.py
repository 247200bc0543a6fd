"""Notes when chosen functions begin and end, in processes that the deployment benchmark starts.

Python imports this file by its name when its folder is on ``PYTHONPATH``. Without
``FEDWARD_BENCH_TRACE`` it does nothing. A line per call: the function, the process's arguments,
begin and end on the machine's monotonic clock, whether it gave something.
"""

import functools
import importlib.abc
import importlib.machinery
import json
import os
import sys
import time
from pathlib import Path

CHOSEN = {
    "fedward_server.round_loop": ("StudyRun._round", "StudyRun._aggregate", "StudyRun._validate"),
    "fedward_server.study_persistence": ("StudyPersistence.keep",),
    "fedward_server.checkpoints": ("Checkpoints.save",),
    "fedward.flower.runtime_client": ("RuntimeClient.deliver", "RuntimeClient.collect"),
    "fedward_client.trainer.service": ("TrainerService.answer",),
    "fedward_client.training.trainer": ("Trainer.train", "Trainer.evaluate"),
}


def noted(name, call, file):
    @functools.wraps(call)
    def wrapper(*given, **named):
        began, result = time.monotonic(), None
        try:
            result = call(*given, **named)
            return result
        finally:
            line = [name, began, time.monotonic(), bool(result)]
            os.write(file, json.dumps(line).encode() + b"\n")

    return wrapper


class Loader(importlib.abc.Loader):
    def __init__(self, inner, file):
        self.inner, self.file = inner, file

    def create_module(self, spec):
        return self.inner.create_module(spec)

    def exec_module(self, module):
        self.inner.exec_module(module)
        for path in CHOSEN[module.__name__]:
            owner, name = path.split(".")
            kind = getattr(module, owner)
            setattr(kind, name, noted(path, getattr(kind, name), self.file))


class Finder(importlib.abc.MetaPathFinder):
    def __init__(self, file):
        self.file = file

    def find_spec(self, name, path, target=None):
        spec = importlib.machinery.PathFinder.find_spec(name, path) if name in CHOSEN else None
        if spec is not None:
            spec.loader = Loader(spec.loader, self.file)
        return spec


if where := os.environ.get("FEDWARD_BENCH_TRACE"):
    Path(where).touch(0o666)
    sys.meta_path.insert(0, Finder(os.open(where, os.O_WRONLY | os.O_APPEND)))
