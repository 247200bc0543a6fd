"""Trainers that are kept warm from one order to the next: images prepared, model built."""

from __future__ import annotations

import gc
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final, TypeVar

import torch
from numpy.typing import NDArray

from fedward.errors import DeviceError, OutputError, PolicyError
from fedward.protocol import RoundOrder
from fedward.rule_codes import RuleCode
from fedward_client.cohort.training import Preparers, cache_folder, prepare_cohort
from fedward_client.config import SiteConfig
from fedward_client.kept_models import KeptModels
from fedward_client.ledger import Ledger
from fedward_client.site_state import SiteStates
from fedward_client.trainer.status import StatusBoard
from fedward_client.trainer.study_context import StudyContext
from fedward_client.training.runtime import Runtime
from fedward_client.training.trainer import Trainer

_LOG = logging.getLogger("fedward.trainer")
_MOST: Final = 2
_T = TypeVar("_T")


class TrainerCache:
    """The trainers of the studies that were served last.

    Parameters
    ----------
    config : SiteConfig
        The site.
    ledger : Ledger
        Learns who is in a cohort before an image of it is opened.
    board : Board
        Knows whether the walls hold.
    secret : bytes
        The site's.
    runtime : Runtime
        The machine.
    crew : Preparers
        Prepare the images.

    Attributes
    ----------
    between_steps : callable
        Called after each step; what it raises ends the order.
    """

    def __init__(
        self,
        config: SiteConfig,
        ledger: Ledger,
        board: StatusBoard,
        secret: bytes,
        runtime: Runtime,
        crew: Preparers,
    ) -> None:
        self._config, self._ledger, self._board = config, ledger, board
        self.between_steps: Callable[[], None] = lambda: None
        watched = replace(runtime, watch=lambda step, steps: self._watch(step, steps))
        self._secret, self._runtime, self._crew = secret, watched, crew
        self._kept: OrderedDict[tuple[str, str], Trainer] = OrderedDict()
        self._states = SiteStates(config.site.state)
        self._models = KeptModels(config.site.state)

    def _watch(self, step: int, steps: int) -> None:
        self._board.set(step=step, steps=steps)
        self.between_steps()

    def keep(
        self, case: StudyContext, order: RoundOrder, shared: Mapping[str, NDArray[Any]]
    ) -> None:
        """Keep the model that was tested: the shared one, or the site's own.

        A disk without room for it costs the hospital the file, and no study its answer.
        """
        if order.round == case.plan.alone_round:
            return  # for comparison only
        model = self.use(case, lambda trainer: trainer.model_of(shared, order))
        try:
            self._models.keep(case.study, case.plan, "own" if order.round else "shared", model)
        except OutputError as error:
            _LOG.warning("the model of %s could not be kept: %s", case.study, error)

    def drop(self, case: StudyContext) -> None:
        """Forget what a round that broke off left in a trainer."""
        self._kept.pop(_key(case), None)

    def end(self, study: str) -> None:
        """Remove what the strategy of a study that has ended kept here."""
        self._states.forget(study)

    def use(self, case: StudyContext, act: Callable[[Trainer], _T]) -> _T:
        """Do something with it; where the device's memory ends, with fewer images on it at once.

        A step's patients and images stay the same: they only go through the network in more parts.

        Raises
        ------
        DeviceError
            There is no memory for one image.
        """
        trainer = self.get(case)
        while True:
            try:
                return act(trainer)
            except torch.OutOfMemoryError:
                trainer = self._smaller(trainer, case)

    def _smaller(self, trainer: Trainer, case: StudyContext) -> Trainer:
        smaller = trainer.runtime.physical_batch // 2
        self._kept.pop(_key(case), None)
        gc.collect()
        torch.cuda.empty_cache()
        if not smaller:
            raise DeviceError(RuleCode.MEMORY, fix="Plan a smaller model") from None
        _LOG.warning("out of memory: %d images at once from now on", smaller)
        runtime = replace(trainer.runtime, physical_batch=smaller)
        made = self._kept[_key(case)] = Trainer(case.plan, trainer.site, runtime, trainer.state)
        made.may_choose = trainer.may_choose
        return made

    def get(self, case: StudyContext) -> Trainer:
        """The study's trainer, as its last order left it.

        Raises
        ------
        PolicyError
            This process has a network, or the study has no cohort.
        FedwardError
            The cohort's images cannot be prepared.
        """
        if not (self._board.get()["walls"] or self._config.trainer.allow_networked_trainer):
            raise PolicyError(RuleCode.NETWORKED, fix="See fedward-client doctor")
        key = _key(case)
        if key not in self._kept:
            self._kept[key] = self._open(case)
            while len(self._kept) > _MOST:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        # By the policy as it is now: it may have been edited since the last order.
        self._kept[key].may_choose = case.limits.counts != "private"
        return self._kept[key]

    def _open(self, case: StudyContext) -> Trainer:
        cohort = case.cohort
        if cohort is None:
            raise PolicyError(RuleCode.COHORT)
        people = {item.patient for item in cohort.items}
        self._ledger.register(cohort.sha256, case.dataset, people)
        site = prepare_cohort(
            self._config,
            case.dataset,
            cohort.sha256,
            case.plan,
            secret=self._secret,
            cache=cache_folder(self._config),
            crew=self._crew,
            least=case.limits.minimum_patients,
        )
        # A hospital's noise and sampling come from the system; what needs no secrecy follows the
        # study's seed, so that a study can be told apart from a simulation of it by nothing else.
        private = case.plan.privacy.on
        runtime = replace(self._runtime, randomness="system" if private else "seeded")
        state = self._states.of(case.study, case.plan_hash, cohort.sha256)
        return Trainer(case.plan, site, runtime, state)


def _key(case: StudyContext) -> tuple[str, str]:
    """Studies may share a plan, but never what a round left in the trainer."""
    return case.study, case.plan_hash
