"""How a study's facts are written for the officer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fedward_client.commands.tables import people


def card_lines(card: dict[str, Any]) -> Iterator[str]:
    """Lines of a card of :mod:`fedward_client.trainer.study_card`; nothing is cut short."""
    yield f"{card['study']}: {_line(card['name'])}, {card['state']}"
    for name, value in _facts(card):
        yield f"  {name:<12} {_line(str(value))}"


def _facts(card: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    if "title" in card:
        yield "title", card["title"] or "none given"
        yield "purpose", card["intended_use"] or "none given"
    yield "coordinator", card["coordinator"]
    yield "plan", card["plan_hash"]
    yield "asked", card["seen"] + (f"; settled {card['settled']}" if card["settled"] else "")
    if "network" not in card:
        return
    yield "network", f"{card['network']}, {card['parameters']:,} parameters"
    yield "data", _data(card)
    only = card["evaluate_only"]
    yield "rounds", "none at this site: it only evaluates" if only else card["rounds"]
    yield "privacy", "nothing is trained" if only else _privacy(card["privacy"])
    yield "evaluations", _evaluations(card["privacy"])
    yield "leaves", card["leaves"]
    for place, one in enumerate(card["limits"]):
        yield (
            "" if place else "limits",
            f"{one['limit']}: {_plain(one['asked'])}, policy {_plain(one['allowed'])}",
        )


def _data(card: dict[str, Any]) -> str:
    if not card["dataset"]:
        return "no dataset serves it"
    if not card["cohort"]:
        return f"{card['dataset']}: no frozen cohort yet"
    patients = people(card["patients"], card["per_image"])
    return f"{card['dataset']}: {patients} patients, cohort {card['cohort']}"


def _privacy(found: dict[str, Any]) -> str:
    if found["epsilon"] is None:
        return "none: nothing bounds what the updates tell of a patient"
    return (
        f"ε = {found['epsilon']:g} at δ = {found['delta']:g}; left for a patient now "
        f"{found['left']:g}, at least {found['left_after']:g} after it"
    )


def _evaluations(found: dict[str, Any]) -> str:
    return (
        f"ε = {found['evaluation_epsilon']:g}; left now {found['evaluation_left']:g}, "
        f"{found['evaluation_left_after']:g} after it"
    )


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return (
        f"{value:,}"
        if isinstance(value, int)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def _line(text: str) -> str:
    # A title of several lines could look like other facts.
    return " ".join(text.split())
