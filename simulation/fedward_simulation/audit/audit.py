"""Audit a study: train it again with other patients, and attack model and updates."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedward.errors import DataError
from fedward.plan.schema import Plan
from fedward_client.data.sample import PreparedSite
from fedward_client.training.batches import seed_for
from fedward_client.training.runtime import Runtime
from fedward_client.training.trainer import Trainer
from fedward_server.memorisation import Audit, Inverted, LowerBound, Membership
from fedward_simulation.audit import bounds, canaries, inversion, membership
from fedward_simulation.audit.federation import Federation, Outcome, TrainerOf
from fedward_simulation.audit.people import Mask, People
from fedward_simulation.audit.store import Store
from fedward_simulation.audit.updates import Seen, WatchedTrainer, steps_in_all
from fedward_simulation.study import with_privacy

PICTURE: Final = "inversion.png"
_CONFIDENCE = 0.95
_DELTA = 1e-5  # where a plan has none
_FEWEST_SHADOWS = 3  # for an attack on one of them with the others
_FEWEST_PATIENTS = 4

Parts = dict[str, NDArray[Any]]
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Sizes:
    """How thorough an audit is.

    Attributes
    ----------
    shadows : int
        Federations on random halves of the patients.
    canaries : int
        Canaries at each site.
    steps : int
        Of the gradient inversion.
    """

    shadows: int = 8
    canaries: int = 40
    steps: int = inversion.STEPS


@dataclass
class Auditor:
    """One audit.

    Attributes
    ----------
    federation : Federation
        How its federations are trained.
    sites : sequence of PreparedSite
        The hospitals.
    seed : int
        The study's.
    delivered : mapping or None
        The study's model, where it was trained already.
    store : Store
        Finished parts.
    folder : Path
        Where the picture goes.
    tell : callable
        Hears which part begins.
    """

    federation: Federation
    sites: Sequence[PreparedSite]
    seed: int
    sizes: Sizes
    delivered: Mapping[str, NDArray[Any]] | None
    store: Store
    folder: Path
    tell: Tell

    def run(self, study: str, plan_sha256: str) -> Audit:
        """Train, attack, and bound ε from below."""
        started, plan = time.perf_counter(), self.federation.plan
        self._check()
        made = [self._with_canaries(site) for site in self.sites]
        self._sites, self._images = [one[0] for one in made], [one[1] for one in made]
        self._people = People.of(self._sites, self._images)
        model = self._part("delivered", self._delivered)
        shadows = self._shadows()
        planted = self._part("canaries", self._planted) if self.sizes.canaries else None
        audit = Audit(
            study=study,
            plan_sha256=plan_sha256,
            seed=self.seed,
            shadows=self.sizes.shadows,
            canaries=self.sizes.canaries,
            delta=plan.privacy.delta or _DELTA,
            confidence=_CONFIDENCE,
            memberships=list(self._memberships(model, shadows)),
            inversions=self._inversions(),
        )
        audit.bounds = self._bounds(audit, shadows, planted)
        audit.seconds = time.perf_counter() - started
        return audit

    def _check(self) -> None:
        for site in self.sites:
            if site.patients_in("train") < _FEWEST_PATIENTS:
                raise DataError(
                    f"an audit needs {_FEWEST_PATIENTS} training patients at each site",
                    value=site.patients_in("train"),
                    fix="Bring more data, or fewer sites",
                    where=site.name,
                )

    def _with_canaries(self, site: PreparedSite) -> tuple[PreparedSite, NDArray[np.int64]]:
        return canaries.with_canaries(
            self.federation.plan,
            site,
            self.sizes.canaries,
            self.federation.arrays,
            self.federation.runtime,
            seed_for(self.seed, site.name, "canaries"),
        )

    def _part(self, name: str, make: Callable[[], Parts]) -> Parts:
        found = self.store.get(name)
        if found is None:
            self.tell(name)
            found = make()
            self.store.put(name, found)
        return found

    def _train(
        self, name: str, sites: Sequence[PreparedSite], make: TrainerOf = Trainer
    ) -> Outcome:
        return self.federation.run(name, sites, seed_for(self.seed, "audit", name), make)

    def _delivered(self) -> Parts:
        if self.delivered is not None:
            return self._signals(
                self.federation.look("delivered", self._sites, dict(self.delivered))
            )
        return self._signals(self.federation.run("delivered", self._sites, self.seed))

    def _signals(self, outcome: Outcome) -> Parts:
        people = self._people
        return {
            "loss": people.scores(outcome.losses),
            "confidence": people.scores(outcome.confidences),
        }

    def _shadows(self) -> list[Parts]:
        return [
            self._part(f"shadow-{place}", partial(self._shadow, f"shadow-{place}"))
            for place in range(self.sizes.shadows)
        ]

    def _shadow(self, name: str) -> Parts:
        """One federation on a random half: each training patient by a fair coin of its own."""
        people = self._people
        rng = np.random.default_rng(seed_for(self.seed, "audit", name, "half"))
        inside = people.trained & (rng.random(len(people.trained)) < 0.5)
        for place in range(len(self._sites)):  # a site without anybody could not take part
            own = np.flatnonzero(people.trained & (people.site == place))
            while not inside[own].any():
                inside[own] = rng.random(len(own)) < 0.5
        halves = [
            replace(site, split={**site.split, "train": people.images_of(place, inside)})
            for place, site in enumerate(self._sites)
        ]
        return {"inside": inside, **self._signals(self._train(name, halves))}

    def _planted(self) -> Parts:
        """The study with canaries, each put in by a fair coin, every update watched."""
        rng = np.random.default_rng(seed_for(self.seed, "audit", "coins"))
        coins = {
            site.name: rng.random(len(images)) < 0.5
            for site, images in zip(self._sites, self._images, strict=True)
        }
        planted = [
            canaries.included(site, images[coins[site.name]])
            for site, images in zip(self._sites, self._images, strict=True)
        ]
        images = {site.name: one for site, one in zip(self._sites, self._images, strict=True)}

        def make(plan: Plan, site: PreparedSite, runtime: Runtime) -> Trainer:
            return WatchedTrainer(plan, site, runtime, images[site.name], coins[site.name])

        outcome = self._train("canaries", planted, make)
        parts: Parts = {"inside": np.concatenate(list(coins.values())), **self._signals(outcome)}
        for place, site in enumerate(self._sites):
            seen: Seen = outcome.trainers[site.name]
            parts |= {
                f"score-{place}": seen.score,
                f"in-{place}": np.array(seen.inside),
                f"out-{place}": np.array(seen.outside),
                f"mechanism-{place}": np.array([seen.noise_multiplier, seen.sampling_rate]),
            }
        return parts

    def _memberships(self, model: Parts, shadows: list[Parts]) -> Iterable[Membership]:
        people = self._people
        asked = people.trained | people.held_out
        members = people.trained[asked]
        if members.all():
            return
        yield _membership("loss, delivered model", -model["loss"][asked], members)
        if shadows:
            known = _known(shadows, asked)
            scores = membership.lira_offline(model["confidence"][asked], known)
            yield _membership("LiRA, delivered model", scores, members)
        if len(shadows) >= _FEWEST_SHADOWS:
            yield _mean_membership("LiRA, random halves", *self._online(shadows))

    def _online(self, shadows: list[Parts]) -> tuple[list[membership.Scores], list[Mask]]:
        """Each shadow attacked with the others."""
        known = _known(shadows, self._people.trained)
        scores = [
            membership.lira_online(known.confidence[place], known.without(place))
            for place in range(len(shadows))
        ]
        return scores, list(known.inside)

    def _bounds(
        self, audit: Audit, shadows: list[Parts], planted: Parts | None
    ) -> list[LowerBound]:
        asked: list[Callable[[float], LowerBound]] = []
        if len(shadows) >= _FEWEST_SHADOWS:
            scores, inside = self._online(shadows)
            # The first one, and not the best: it was chosen before looking.
            told = "members of a random half"
            asked.append(partial(self._one_run, told, "", scores[0], inside[0], audit.delta))
        if planted is not None:
            asked += self._of_canaries(planted, shadows, audit.delta)
        jointly = 1.0 - (1.0 - audit.confidence) / max(1, len(asked))
        return [
            bound(audit.confidence).model_copy(update={"epsilon_jointly": bound(jointly).epsilon})
            for bound in asked
        ]

    def _of_canaries(
        self, planted: Parts, shadows: list[Parts], delta: float
    ) -> list[Callable[[float], LowerBound]]:
        inside, people = planted["inside"], self._people
        confidence = planted["confidence"][people.canaries]
        if shadows:
            known = _known(shadows, people.canaries)
            confidence = membership.lira_offline(confidence, known)
        updates = [planted[f"score-{place}"] for place in range(len(self._sites))]
        told = "canaries, all updates"
        asked: list[Callable[[float], LowerBound]] = [
            partial(self._one_run, "canaries, delivered model", "", confidence, inside, delta),
            partial(self._one_run, told, "", _ranked(updates), inside, delta),
        ]
        start = 0
        for place, site in enumerate(self._sites):
            own = inside[start : start + len(updates[place])]
            start += len(own)
            asked.append(partial(self._one_run, told, site.name, updates[place], own, delta))
            if len(planted[f"in-{place}"]) and len(planted[f"out-{place}"]):
                asked.append(partial(self._steps, planted, place, delta))
        return asked

    def _one_run(
        self,
        attack: str,
        site: str,
        scores: NDArray[np.float64],
        inside: Mask,
        delta: float,
        confidence: float,
    ) -> LowerBound:
        found = bounds.best_guesses(np.nan_to_num(scores), inside, delta, confidence)
        return LowerBound(
            attack=attack,
            site=site,
            epsilon=found.epsilon,
            epsilon_jointly=found.epsilon,
            guesses=found.guesses,
            correct=found.correct,
            ceiling=found.ceiling,
            promised=self.federation.plan.privacy.epsilon,
        )

    def _steps(self, planted: Parts, place: int, delta: float, confidence: float) -> LowerBound:
        inside, outside = planted[f"in-{place}"], planted[f"out-{place}"]
        promised_noise, rate = map(float, planted[f"mechanism-{place}"])
        noise = bounds.noise_of_shares(inside, outside, rate, promised_noise, confidence)
        steps = steps_in_all(self.federation.plan, rate)
        # Half of the promised noise is enough to break any promise.
        least = min(0.7, promised_noise / 2)
        epsilon = bounds.steps_epsilon(noise, rate, steps, delta, least)
        return LowerBound(
            attack="canaries, single steps",
            site=self._sites[place].name,
            epsilon=epsilon,
            epsilon_jointly=epsilon,
            guesses=len(inside) + len(outside),
            promised=self.federation.plan.privacy.epsilon,
        )

    def _inversions(self) -> list[Inverted]:
        picture = self.folder / PICTURE
        found = self.store.get("inversion")
        if found is None or not picture.exists():
            self.tell("inversion")
            found = self._invert(picture)
            self.store.put("inversion", found)
        return [
            Inverted(private=bool(row[0]), mse=row[1], ssim=row[2], correlation=row[3])
            for row in found["rows"]
        ]

    def _invert(self, picture: Path) -> Parts:
        plan, site, arrays = self.federation.plan, self.sites[0], self.federation.arrays
        rng = np.random.default_rng(seed_for(self.seed, "inversion"))
        image = int(rng.choice(site.split["train"]))
        plans = [with_privacy(plan, None), plan] if plan.privacy.on else [plan]
        pictures, rows = {"original": np.asarray(site.images[image], np.float32)}, []
        self.federation.runtime.enter()
        for one in plans:
            drawn = inversion.invert(
                one, site, image, arrays, self.federation.runtime, self.seed, self.sizes.steps
            )
            name = (
                f"from an update, ε = {one.privacy.epsilon:g}"
                if one.privacy.on
                else ("from an update, no privacy")
            )
            pictures[name] = drawn.image
            rows.append([float(one.privacy.on), drawn.mse, drawn.ssim, drawn.correlation])
        inversion.write_picture(picture, pictures)
        return {"rows": np.array(rows)}


def _known(shadows: list[Parts], chosen: Mask) -> membership.Shadows:
    return membership.Shadows(
        np.stack([one["confidence"][chosen] for one in shadows]),
        np.stack([one["inside"][chosen] for one in shadows]),
    )


def _membership(attack: str, scores: NDArray[np.float64], members: Mask) -> Membership:
    found = membership.separation(scores, members)
    return Membership(
        attack=attack,
        members=int(members.sum()),
        others=int((~members).sum()),
        auc=found.auc,
        auc_error=found.auc_error,
        true_positives={f"{rate:g}": told for rate, told in found.true_rates.items()},
    )


def _mean_membership(
    attack: str, scores: list[membership.Scores], inside: list[Mask]
) -> Membership:
    """Over several attacked models: the error is that of the mean of their AUC."""
    aucs = [
        membership.separation(one, members).auc for one, members in zip(scores, inside, strict=True)
    ]
    found = _membership(attack, np.concatenate(scores), np.concatenate(inside))
    error = float(np.std(aucs, ddof=1) / np.sqrt(len(aucs)))
    return found.model_copy(update={"auc": float(np.mean(aucs)), "auc_error": error})


def _ranked(scores: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Sites' scores on one scale: those of each by their median and spread."""
    return np.concatenate(
        [
            (one - np.median(one)) / max(float(np.median(np.abs(one - np.median(one)))), 1e-12)
            for one in scores
        ]
    )
