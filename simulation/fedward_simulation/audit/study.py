"""The audit of a study: from its options to ``audit.json``, the report and the release gate."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from numpy.typing import NDArray

from fedward.console import Console
from fedward.errors import FedwardError, Interrupted, PlanError, ReleaseError
from fedward.files import write_text
from fedward.models import load_model
from fedward.plan.load import plan_hash
from fedward_server.memorisation import Audit
from fedward_server.report import read_metrics, write_metrics, write_report
from fedward_simulation.audit.audit import Auditor, Sizes
from fedward_simulation.audit.federation import Federation
from fedward_simulation.audit.progress import AuditProgress
from fedward_simulation.audit.store import Store
from fedward_simulation.sites import digest_of_sites
from fedward_simulation.study import Study

FILE: Final = "audit.json"
PARTS: Final = "audit"
GATE: Final = Sizes(shadows=4, canaries=24, steps=200)


def audit_study(study: Study, sizes: Sizes, progress: AuditProgress, *, fresh: bool) -> Audit:
    """Attack a study, and write ``audit.json`` into its folder.

    Parameters
    ----------
    study : Study
        Run already, or not: then it is trained here.
    fresh : bool
        Whether to leave aside what an earlier audit finished.

    Raises
    ------
    Interrupted
        KeyboardInterrupt (see :func:`fedward.console.interruptible`); finished parts are kept.
    PlanError
        The plan trains on patches.
    """
    if study.plan.preprocessing.patch is not None:
        raise PlanError(
            "an audit attacks whole images, not patches",
            fix="Audit a plan without [preprocessing.patch]",
            where="preprocessing.patch",
        )
    out = study.options.out
    try:
        if fresh:
            shutil.rmtree(out / PARTS, ignore_errors=True)
        audit = _auditor(study, sizes, progress).run(study.plan.study.name, _hash(study))
    except KeyboardInterrupt as error:
        study.stop.set()
        raise Interrupted(
            "the audit was interrupted", fix="The same command goes on after its last finished part"
        ) from error
    write_text(out / FILE, audit.model_dump_json(indent=1) + "\n")
    return audit


def gate(study: Study, console: Console) -> None:
    """Audit a study that has run, and let its model go only if the promise held.

    A study without privacy promises nothing: of it the audit only tells.

    Raises
    ------
    ReleaseError
        An attack found more than was promised. Then, and when the audit does not come to its end,
        the study has no model.
    """
    try:
        with AuditProgress(console) as progress:
            study.results.audit = audit_study(study, GATE, progress, fresh=not study.resumed)
        check_release(study.results.audit)
    except BaseException as error:
        study.model = None  # also of an audit that was interrupted: nothing speaks for the model
        if isinstance(error, ReleaseError):
            study.checkpoints.clear()  # they hold it too
        raise


def check_release(audit: Audit) -> None:
    """The release gate: no lower bound may be above the ε that was promised.

    Raises
    ------
    ReleaseError
        One is.
    """
    if not audit.broken:
        return
    worst = max(audit.broken, key=lambda bound: bound.epsilon)
    raise ReleaseError(
        f"no attack may find more than the ε of {worst.promised:g} that the plan promises",
        value=f"ε of at least {worst.epsilon:.2f} at δ = {audit.delta:g}, by {worst.attack}",
        fix="Do not use the model; find out why updates are less private than planned",
        where=worst.site or "privacy.epsilon",
    )


def add_to_report(audit: Audit, out: Path) -> bool:
    """Put an audit into the report of the same study in a folder; whether one is there."""
    results = _earlier(out)
    if results is None or not any(one.plan_sha256 == audit.plan_sha256 for one in results):
        return False
    for one in results:
        if one.plan_sha256 == audit.plan_sha256:
            one.audit = audit
    write_metrics(results, out / "metrics.json")
    write_report(results, out / "report.html")
    return True


def _auditor(study: Study, sizes: Sizes, progress: AuditProgress) -> Auditor:
    study.note = progress.note
    arrays = study.initial()
    sites = study.sites or study.prepare()
    runtime, workers = study.machine(len(sites))
    about = {
        "plan": _hash(study),
        "seed": study.options.seed,
        "canaries": sizes.canaries,
        "steps": sizes.steps,
        "data": digest_of_sites(sites),
        "versions": study.results.versions,
    }
    return Auditor(
        federation=Federation(study.plan, arrays, runtime, workers, progress.listen, study.stop),
        sites=sites,
        seed=study.options.seed,
        sizes=sizes,
        delivered=study.model if study.model is not None else _delivered(study),
        store=Store(study.options.out / PARTS, about),
        folder=study.options.out,
        tell=progress.part,
    )


def _delivered(study: Study) -> Mapping[str, NDArray[Any]] | None:
    """The model of the same plan and seed that an earlier run left in the folder."""
    for one in _earlier(study.options.out) or []:
        same = (one.plan_sha256, one.seed) == (_hash(study), study.options.seed)
        if same and one.complete and one.partition == study.options.division:
            with suppress(FedwardError):
                return load_model(study.options.out / "model.safetensors")[0]
    return None


def _earlier(out: Path) -> list[Any] | None:
    with suppress(FedwardError):
        return list(read_metrics(out / "metrics.json"))
    return None


def _hash(study: Study) -> str:
    return plan_hash(study.plan)
