"""Of whom each figure is: which hospitals gave it, how many patients, what is missing and why."""

from __future__ import annotations

from fedward_server.report.formatting import counted, listed, metric_name
from fedward_server.report.stats import at_site, site_names, together
from fedward_server.results import Arm, Failure, StudyResults
from fedward_strategies.robust import dominates


def contributing(arm: Arm, metric: str) -> list[str]:
    """The sites whose counts are in a metric of all sites together."""
    if arm.test is None:
        return []
    if arm.test.contributors:
        return arm.test.contributors.get(metric, [])
    return [site for site in arm.test.per_site if at_site(arm, site, metric) is not None]


def tested_sites(results: StudyResults) -> list[str]:
    """The sites of the study, but for those that say that they have no test patients."""
    without = {facts.site for facts in results.sites if not facts.test_patients}
    return [site for site in site_names(results) if site not in without]


def is_whole(results: StudyResults, arm: Arm, metric: str) -> bool:
    """Whether every site with test patients is in a metric of all together."""
    return set(tested_sites(results)) <= set(contributing(arm, metric))


def whom(results: StudyResults, arm: Arm, metric: str) -> str:
    """``all test patients together (547 patients of 4 hospitals)``, or of how many of them."""
    sites = contributing(arm, metric)
    patients = patients_of(arm, metric)
    if is_whole(results, arm, metric):
        told = f" ({counted(patients, 'patient')} of {_hospitals(len(sites))})" if patients else ""
        return f"all test patients together{told}"
    whose = f"{share_of(results, arm, metric)} ({listed(sites)})"
    return f"the {counted(patients, 'test patient') if patients else 'test patients'} of {whose}"


def share_of(results: StudyResults, arm: Arm, metric: str) -> str:
    """``2 of 3 hospitals``."""
    return f"{len(contributing(arm, metric))} of {_hospitals(len(tested_sites(results)))}"


def patients_of(arm: Arm, metric: str) -> int:
    """Test patients behind a metric of all together; 0 where the results do not tell."""
    known = arm.test.patients if arm.test else {}
    return sum(known.get(site, 0) for site in contributing(arm, metric))


def missing_words(results: StudyResults, arm: Arm, metric: str) -> str:
    """Who is not in a metric of all together, and why; empty where nobody is missing."""
    given = set(contributing(arm, metric))
    missing = [site for site in tested_sites(results) if site not in given]
    if not missing:
        return ""
    told = "; ".join(f"{site} ({_short(arm, site, metric)})" for site in missing)
    return f"Not in it: {told}."


def _short(arm: Arm, site: str, metric: str) -> str:
    failed = why_not_measured(arm, site)
    if failed is not None:
        return failed.reason.rstrip(".")
    if arm.test and site in arm.test.per_site:
        return f"its policy withholds {metric_name(metric)}"
    return "not measured"


def why_not_measured(arm: Arm, site: str) -> Failure | None:
    """Why a site sent no counts: in the test, or, where it never took part, in the last round."""
    if arm.test is None or site in arm.test.per_site:
        return None
    last = arm.rounds[-1].failures if arm.rounds else []
    told = [one for one in (*arm.test.not_measured, *last) if one.site == site]
    return told[0] if told else None


def measured(results: StudyResults, arm: Arm) -> list[str]:
    """The metrics that some site gave, the primary one first."""
    names = list(dict.fromkeys([results.primary, *(arm.test.pooled if arm.test else ())]))
    return [
        name
        for name in names
        if together(arm, name) is not None
        or any(at_site(arm, site, name) is not None for site in contributing(arm, name))
    ]


def dominant(arm: Arm, metric: str) -> tuple[str, float] | None:
    """The site that dominates the test images behind a metric of several sites, and its share.

    The figure on all of them together is mostly that site's.
    """
    given = contributing(arm, metric)
    images = {s: n for s, n in arm.test.images.items() if s in given} if arm.test else {}
    total = sum(images.values())
    if not total:
        return None
    site = max(images, key=lambda name: images[name])
    share = images[site] / total
    return (site, share) if dominates(share, len(images)) else None


def _hospitals(number: int) -> str:
    return counted(number, "hospital")
