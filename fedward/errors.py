"""The exception tree of Fedward, and the exit code of each error.

::

    FedwardError                1   anything below
    ├── PlanError              10   the study plan breaks a rule
    │   └── SchemaError        28   a received plan is not one that this release knows
    ├── DataError              11   the data cannot serve the plan
    ├── ModelError             12   a model or its arrays do not fit
    │   └── WeightsError       13   an initial-weights file cannot be used
    ├── PrivacyError           14   a privacy target cannot be met
    ├── DeviceError            15   the asked-for device is not there
    ├── ProtocolError          16   a message is not a known, valid record
    ├── StudyError             17   a study cannot go on (quorum, no update)
    │   └── DivergenceError    27   training diverged at most sites
    ├── OutputError            18   results cannot be written
    ├── ConfigError            19   a site's or the server's configuration breaks a rule
    ├── BudgetError            20   the privacy budget does not allow it
    ├── AuditError             21   the audit log is not whole, or cannot be written
    ├── PolicyError            22   the site's policy does not allow it
    ├── EgressError            23   something was about to leave a site that may not
    ├── AccessError            24   a token is missing, invalid, or not enough
    ├── ServiceError           25   the aggregator's service cannot be reached or is not ready
    ├── PacsError              29   the PACS cannot be reached, refuses, or sends what is wrong
    ├── ReleaseError           26   an audit found more than the plan promises
    └── Interrupted           130   Ctrl-C or SIGTERM; what was finished is kept

A message states the rule, the value that breaks it and the next step. Exit code 2 is the command
line's own (unknown option, missing argument).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar

if TYPE_CHECKING:
    from fedward.rule_codes import RuleCode, Values


class FedwardError(Exception):
    """Base of all errors raised on purpose.

    Parameters
    ----------
    rule : str or RuleCode
        What must hold, as a sentence without its full stop; or its code, whose text that is.
    value : object, optional
        What was found instead; left out of the message when None. By default what the code's text
        says was found.
    fix : str
        What to do next, as a sentence without its full stop.
    where : str
        The key, argument or site that the rule is about.
    code : RuleCode, optional
        Of a rule that may leave a hospital, where ``rule`` says more than the code's text: rule,
        value, fix and where stay at the hospital, code and values may leave it.
    values : mapping, optional
        The values that the code declares.

    Raises
    ------
    ValueError
        The values are not those that the code declares.
    """

    exit_code = 1

    def __init__(
        self,
        rule: str | RuleCode,
        *,
        value: object = None,
        fix: str = "",
        where: str = "",
        code: RuleCode | None = None,
        values: Values | None = None,
    ) -> None:
        if not isinstance(rule, str):
            code = rule
        self.code = code
        self.values: Values = code.coarse(values or {}) if code else {}
        if code and not isinstance(rule, str):
            rule, found = code.rule(self.values), code.found(self.values)
            value = found or None if value is None else value
        self.rule, self.value, self.fix, self.where = str(rule), value, fix, where
        super().__init__(self._message())

    def _message(self) -> str:
        text = f"{self.where}: {self.rule}" if self.where else self.rule
        if self.value is not None:
            text += (
                f" (got {self.value!r})"
                if not isinstance(self.value, str)
                else f" (got {self.value})"
            )
        return f"{text}. {self.fix}." if self.fix else f"{text}."

    def __reduce__(self) -> tuple[object, ...]:
        # Worker processes send errors back; keyword-only arguments need this help.
        return _rebuild, (type(self), self.rule, _parts(self))


def _parts(error: FedwardError) -> dict[str, Any]:
    """The keyword arguments that make the same error again."""
    names = ("value", "fix", "where", "code", "values")
    return {name: getattr(error, name) for name in names}


_Error = TypeVar("_Error", bound=FedwardError)


def _rebuild(kind: type[_Error], rule: str, parts: dict[str, Any]) -> _Error:
    return kind(rule, **parts)


_MOST: Final = 100  # broken rules that are told one by one


def together(errors: Sequence[_Error], line: Callable[[str], int | None] | None = None) -> _Error:
    """The first of several errors, whose message tells all of them, a line each.

    Parameters
    ----------
    errors : sequence of FedwardError
        At least one.
    line : callable, optional
        From a key to its line in the file that they are about.
    """
    first, *others = (_placed(one, line and line(one.where)) for one in errors)
    if not others:
        return first
    told = [f"  {str(one).rstrip('.')}" for one in others[:_MOST]]
    told += [f"  and {len(others) - _MOST} more"] if len(others) > _MOST else []
    parts = _parts(first)
    parts["fix"] = f"{first.fix}. {len(others)} more to mend after this one:\n" + ".\n".join(told)
    return _rebuild(type(first), first.rule, parts)


def _placed(error: _Error, line: int | None) -> _Error:
    if line is None:
        return error
    where = f"line {line}, {error.where}"
    return _rebuild(type(error), error.rule, _parts(error) | {"where": where})


class PlanError(FedwardError):
    """The study plan breaks a rule."""

    exit_code = 10


class SchemaError(PlanError):
    """A plan from another machine needs a newer schema, or is none that this release knows."""

    exit_code = 28


class DataError(FedwardError):
    """The data cannot serve the plan."""

    exit_code = 11


class ModelError(FedwardError):
    """A model or its arrays do not fit."""

    exit_code = 12


class WeightsError(ModelError):
    """An initial-weights file cannot be used."""

    exit_code = 13


class PrivacyError(FedwardError):
    """A privacy target cannot be met."""

    exit_code = 14


class DeviceError(FedwardError):
    """The asked-for device is not there."""

    exit_code = 15


class ProtocolError(FedwardError):
    """A message is not a known, valid record."""

    exit_code = 16


class StudyError(FedwardError):
    """A study cannot go on."""

    exit_code = 17


class DivergenceError(StudyError):
    """Training diverged at half of the sites or more: the plan is at fault, and no site."""

    exit_code = 27


class OutputError(FedwardError):
    """Results cannot be written."""

    exit_code = 18


class ConfigError(FedwardError):
    """The site's configuration breaks a rule."""

    exit_code = 19


class BudgetError(FedwardError):
    """The privacy budget of a cohort does not allow it."""

    exit_code = 20


class AuditError(FedwardError):
    """The audit log is not whole, or cannot be written."""

    exit_code = 21


class PolicyError(FedwardError):
    """The site's policy does not allow it."""

    exit_code = 22


class EgressError(FedwardError):
    """Something was about to leave a site that may not."""

    exit_code = 23


class AccessError(FedwardError):
    """A token is missing, invalid, or its role is not enough."""

    exit_code = 24


class ServiceError(FedwardError):
    """The aggregator's service cannot be reached, or is not ready."""

    exit_code = 25


class PacsError(FedwardError):
    """The PACS cannot be reached, refuses, or sends something else than was asked for."""

    exit_code = 29


class ReleaseError(FedwardError):
    """An attack on a study's updates found more than its plan promises."""

    exit_code = 26


class Interrupted(FedwardError):
    """Ctrl-C, SIGTERM or SIGHUP; finished work was kept."""

    exit_code = 130
