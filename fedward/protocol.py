"""Records exchanged between aggregator and hospital, besides the tensors.

Each is versioned, typed and strict: a wrong type or a value out of range is a
:class:`fedward.errors.ProtocolError`, on either end. Nothing in them can hold a path, an
identifier or a date: texts are plan vocabulary, site names and fixed rules.

A later release may add a field that an earlier one may ignore: ``Annotated[int | None, OPTIONAL] =
None``. A record on the wire names such fields in ``optional``; a reader refuses every unknown field
that it does not name. The default None is left out, so that records without the field, and the
bytes of an order that are signed, stay as they were. A field that must not be ignored has no mark:
an earlier release refuses records that hold it. What leaves a site is made of known fields only.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, Self, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)

from fedward.errors import FedwardError, ProtocolError
from fedward.plan.load import from_canonical
from fedward.plan.schema import Plan
from fedward.printable import Printable
from fedward.rule_codes import GENERAL, RECORDS, RuleCode, Value

SITE_NAME = r"^\w[\w. -]{0,63}$"
SiteName = Annotated[str, Field(pattern=SITE_NAME)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]
Reason = Annotated[Printable, Field(max_length=64)]
Figure = Annotated[float, Field(allow_inf_nan=False)]
STUDY_ID = r"^[a-z0-9][a-z0-9-]{0,63}$"
RefusalKind = Literal[
    "policy",
    "pending",
    "paused",
    "budget",
    "privacy",
    "data",
    "protocol",
    "busy",
    "error",
    "arrays",
    "schema",
]
Release = Annotated[str, Field(pattern=r"^[0-9A-Za-z.+!-]{0,32}$")]
SchemaVersion = Annotated[int, Field(ge=1, le=9999)]
OPTIONAL: Final = "optional"
"""The mark of a field that readers of an earlier release may ignore, and the key that names it."""
Flat = dict[str, bool | int | float | str | list[int] | list[float] | list[str]]

_Unknown = bool | int | float | Annotated[str, Field(max_length=1000)]


class Record(BaseModel):
    """A record on the wire; flat, so that it fits Flower's config records."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    version: Literal[1] = 1

    def to_flat(self) -> Flat:
        """The record as scalars and lists; what is None is left out."""
        flat: Flat = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in self.model_dump(exclude_none=True).items()
        }
        marked = [k for k, f in type(self).model_fields.items() if OPTIONAL in f.metadata]
        if held := [key for key in marked if key in flat]:
            flat.setdefault(OPTIONAL, held)
        return flat

    @classmethod
    def from_flat(cls, flat: Mapping[str, Any]) -> Self:
        """Validate what arrived, without the unknown fields that it names as optional.

        Raises
        ------
        ProtocolError
            The mapping is not a valid record of this kind.
        """
        ignored = cls._ignored(flat)
        value = {
            key: tuple(item) if isinstance(item, list) else item
            for key, item in flat.items()
            if key not in ignored
        }
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            key = ".".join(str(part) for part in first["loc"])
            key = key if key in cls.model_fields else ""
            values = {"record": cls.__name__, "field": key or "record"}
            raise ProtocolError(
                f"a {cls.__name__} record must be valid: {first['msg']}",
                fix="Run the same Fedward release on both ends",
                where=key,
                code=RuleCode.RECORD if cls.__name__ in RECORDS else None,
                values=values,
            ) from None

    @classmethod
    def _ignored(cls, flat: Mapping[str, Any]) -> set[str]:
        named = flat.get(OPTIONAL)
        if not isinstance(named, list) or not all(isinstance(key, str) for key in named):
            return set()
        return {OPTIONAL, *named} - cls.model_fields.keys()


class RoundOrder(Record):
    """Down: what a site is asked to do.

    Attributes
    ----------
    plan : str
        The plan in canonical form; ``plan_hash`` is its SHA-256.
    round : int
        From 1; 0 for the description and the test.
    task : str
        What is asked for.
    part : str
        Evaluation: which part of the division.
    arrays : str
        Between hospitals: SHA-256 of the model that comes with the order (see
        :func:`fedward.tensors.digest`); "" where none does.
    frozen : str
        Between hospitals: SHA-256 of those of them that do not train in the round's stage. A site
        keeps these, and they come with the order only where it does not hold them; "" where all
        come.
    seed : int
        Base of the random draws of a simulation; a hospital draws its noise from the system.
    account : bool
        Whether the reply must state the privacy spent.
    sites : int
        How many sites are asked: in this round of training, those included whose update is there;
        in this evaluation; in the whole study where a site is to describe itself. 0: not told.
    evaluate_only : bool or None
        True where the site takes no part in training: it describes itself and evaluates the
        delivered model on its test patients. A site of an earlier release ignores it, and holds
        the order against what training would cost.
    study : str
        Between hospitals: the study's id; "" in a simulation, and so the next two.
    coordinator : str
        Base64 of the coordinator's Ed25519 public key.
    signature : str
        Base64 of its signature over all other fields (see :mod:`fedward.signing`).
    optional : tuple of str or None
        Fields that a site may ignore; kept with them, because the signature covers them.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, _Unknown | Annotated[tuple[_Unknown, ...], Field(max_length=64)]]

    plan: str = Field(max_length=1_000_000)
    plan_hash: Digest
    round: Count
    task: Literal["describe", "train", "evaluate"] = "train"
    part: Literal["validation", "test"] = "validation"
    arrays: str = Field(default="", pattern=r"^$|^[0-9a-f]{64}$")
    frozen: str = Field(default="", pattern=r"^$|^[0-9a-f]{64}$")
    seed: Count = 0
    account: bool = True
    sites: Count = 0
    evaluate_only: Annotated[Literal[True] | None, OPTIONAL] = None
    study: str = Field(default="", pattern=rf"^$|{STUDY_ID}")
    coordinator: str = Field(default="", max_length=64)
    signature: str = Field(default="", max_length=128)
    optional: tuple[Annotated[str, Field(max_length=64)], ...] | None = Field(
        default=None, max_length=16
    )

    @classmethod
    def _ignored(cls, flat: Mapping[str, Any]) -> set[str]:
        return set()

    @model_validator(mode="after")
    def _hash_fits(self) -> RoundOrder:
        if hashlib.sha256(self.plan.encode()).hexdigest() != self.plan_hash:
            raise ValueError("the plan does not have the hash that came with it")
        return self

    @model_validator(mode="after")
    def _unknown_fields_are_optional(self) -> RoundOrder:
        if not set(self.model_extra or ()) <= set(self.optional or ()):
            raise ValueError("a field that is not known must be one that the order calls optional")
        return self

    def read_plan(self) -> Plan:
        """The plan that the order carries, validated."""
        return from_canonical(self.plan)


class SiteFacts(Record):
    """Up: what a site says of itself before a study."""

    site: SiteName
    patients: Count
    images: Count
    train_patients: Count
    validation_patients: Count
    test_patients: Count
    train_images: Count
    validation_images: Count
    test_images: Count
    class_counts: tuple[Count, ...] = Field(default=(), max_length=256)
    left_out_reasons: tuple[Reason, ...] = Field(default=(), max_length=64)
    left_out_counts: tuple[Count, ...] = Field(default=(), max_length=64)
    synthetic: bool = False
    images_are_patients: bool = False
    release: Release = ""
    plan_schema: SchemaVersion = 1
    dataset: str = Field(default="", pattern=rf"^$|{SITE_NAME}")


class TrainOutcome(Record):
    """Up, beside the updated arrays: what the update was made of and what it cost."""

    site: SiteName
    round: Count
    patients: Count
    images: Count
    steps: Count
    loss: Figure | None = None
    seconds: Figure
    cpu_seconds: Figure = 0.0
    epsilon: Figure | None = None
    delta: Figure | None = None
    noise_multiplier: Figure | None = None
    sampling_rate: Figure | None = None


class EvaluateOutcome(Record):
    """Up, beside the counts: what they were counted on.

    Attributes
    ----------
    site, round, part : str, int, str
        Whose answer to which order.
    images : int
        Images of the part.
    seconds : float
        How long it took.
    unit, noise : int, float or None
        Noisy tables: what a patient (or else an image) weighs, and the scale of the Laplace noise
        on each cell in these units. None: exact counts.
    epsilon : float or None
        What this evaluation cost each patient of the part; None where that has no bound.
    """

    site: SiteName
    round: Count
    part: Literal["validation", "test"]
    images: Count
    seconds: Figure
    unit: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    noise: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    epsilon: Figure | None = None


def _code(name: object) -> object:
    return RuleCode.from_wire(name) if isinstance(name, str) else name


class Refusal(Record):
    """Up, in place of an outcome: a site could not or would not; never a traceback.

    It holds no text: a code of this release's list, and the numbers and words of closed lists that
    the code declares. On the wire each value has a key of its own, ``value.NAME``.

    Attributes
    ----------
    site, round : str, int
        Whose refusal it is, and in which round (0 outside rounds).
    kind : str
        Whose turn it is: a hospital's officer (policy, pending, paused), the privacy budget, the
        data, or whoever runs the software; ``arrays`` asks for the frozen arrays that an order
        names and that the site does not hold; ``schema`` says that the site's release cannot read
        the plan.
    code, values : RuleCode, dict
        Which rule did not hold, and what was found.
    charged : bool or None
        False where the site's ledger holds no charge for the round; where it is absent, the round
        may have cost privacy.
    release, plan_schema : str, int or None
        With ``schema``: the site's release, and the schema version that it knows.
    """

    site: SiteName
    kind: RefusalKind = "error"
    round: Count
    code: Annotated[RuleCode, BeforeValidator(_code), PlainSerializer(lambda code: code.wire)]
    values: Mapping[str, Value] = Field(default_factory=dict)
    charged: Literal[False] | None = None
    release: Release | None = None
    plan_schema: SchemaVersion | None = None

    @model_validator(mode="after")
    def _as_declared(self) -> Refusal:
        self.code.checked(self.values)
        return self

    @property
    def rule(self) -> str:
        """What must hold, in words."""
        return self.code.rule(self.values)

    @property
    def value(self) -> str:
        """What was found, in words; "" where that is not told."""
        return self.code.found(self.values)

    @classmethod
    def of(cls, error: FedwardError, *, site: str, round_: int, kind: RefusalKind) -> Refusal:
        """The refusal for an error: its code and values, or what its kind says in general."""
        code = error.code or GENERAL[kind]
        return cls(site=site, round=round_, kind=kind, code=code, values=dict(error.values))

    def to_flat(self) -> Flat:
        """The record as scalars and lists."""
        flat = {key: value for key, value in super().to_flat().items() if key != "values"}
        values = {f"{_VALUE}{name}": value for name, value in self.values.items()}
        return flat | {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_flat(cls, flat: Mapping[str, Any]) -> Self:
        """Validate what arrived.

        A code that this release does not know, and the sentence of a release before codes, become
        what the refusal's kind says in general, and an unknown kind reads as ``error``: a site may
        run another release.

        Raises
        ------
        ProtocolError
            The mapping is not a valid refusal.
        """
        kind = flat.get("kind")
        later = isinstance(kind, str) and _KIND.fullmatch(kind) is not None
        if later and kind not in get_args(RefusalKind):
            flat = {**flat, "kind": "error"}
        if "rule" in flat and "code" not in flat:
            old = _Sentence.from_flat(flat).model_dump(include={"site", "kind", "round", "charged"})
            return cls(**old, code=GENERAL[old["kind"]])
        record = {key: value for key, value in flat.items() if not key.startswith(_VALUE)}
        values = {key.removeprefix(_VALUE): flat[key] for key in flat.keys() - record.keys()}
        name, general = record.get("code"), GENERAL.get(str(record.get("kind", "error")))
        named = isinstance(name, str) and _NAME.fullmatch(name) is not None
        if general and named and RuleCode.from_wire(str(name)) is None:
            record, values = {**record, "code": general.wire}, {}
        if "values" in record:  # not in one piece: as unknown as any other key
            record = {f"{key}." if key == "values" else key: one for key, one in record.items()}
        tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return super().from_flat({**record, "values": tuples})


_VALUE: Final = "value."
_NAME: Final = re.compile(r"[a-z0-9-]{1,64}")
_KIND: Final = re.compile(r"[a-z_-]{1,32}")


class _Sentence(Record):
    """A refusal of a release before codes; its text is not shown."""

    site: SiteName
    kind: RefusalKind = "error"
    round: Count
    rule: Printable = Field(max_length=500)
    value: Printable = Field(default="", max_length=200)
    charged: Literal[False] | None = None
