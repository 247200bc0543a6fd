"""The hospital's side of Flower: records in, records out, never a traceback."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from fedward.errors import FedwardError, ProtocolError
from fedward.plan.schema import Plan
from fedward.protocol import Record, Refusal, RoundOrder, TrainOutcome
from fedward.rule_codes import EXCEPTIONS, RuleCode
from fedward_client.egress.disclosure import noise_for
from fedward_client.policy.settings import Limits
from fedward_client.training.trainer import Trainer

_LOG = logging.getLogger("fedward.client")
_ADDED_BY_STRATEGIES = ("server-round", "proximal-mu")
SITE_STATE = "site-state"


class Sites(Protocol):
    """Who stands behind a node."""

    def name(self, context: Context) -> str:
        """The site's name."""

    def trainer(self, context: Context, plan: Plan) -> Trainer:
        """Its trainer for a plan, kept warm between messages."""


def client_app(sites: Sites) -> ClientApp:
    """The client application over one or several sites.

    An error costs the site this reply only: it goes back as a refusal that names the rule.
    """
    app = ClientApp()

    @app.query()
    def describe(message: Message, context: Context) -> Message:
        return _answer(sites, message, context, _describe)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return _answer(sites, message, context, _train)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return _answer(sites, message, context, _evaluate)

    return app


Handler = Callable[[Trainer, RoundOrder, Message], RecordDict]


def _answer(sites: Sites, message: Message, context: Context, handle: Handler) -> Message:
    site, round_ = sites.name(context), 0
    try:
        order = _order(message)
        round_ = order.round
        trainer = sites.trainer(context, order.read_plan())
        keeps = handle is _train and bool(trainer.plan.strategy.spec.kept)
        if keeps:
            # A simulation's worker may end: what a site keeps stands in Flower's context.
            trainer.state.from_arrays(_named(context.state.array_records.get(SITE_STATE, {})))
        content = handle(trainer, order, message)
        if keeps:
            context.state[SITE_STATE] = _arrays(trainer.state.to_arrays())
    except FedwardError as error:
        content = _refusal(Refusal.of(error, site=site, round_=round_, kind="error"))
    except Exception as error:
        # What went wrong may quote a path or an identifier: the log stays here, the class goes.
        _LOG.exception("an unexpected error stopped the site in round %d", round_)
        name = type(error).__name__
        values = {"error": name if name in EXCEPTIONS else "Exception"}
        code = RuleCode.UNEXPECTED
        content = _refusal(Refusal(site=site, round=round_, code=code, values=values))
    return Message(content, reply_to=message)


def _describe(trainer: Trainer, order: RoundOrder, message: Message) -> RecordDict:
    return RecordDict({"facts": _config(trainer.describe())})


def _train(trainer: Trainer, order: RoundOrder, message: Message) -> RecordDict:
    arrays, outcome = trainer.train(_model(message), order)
    weight = _weight(trainer.plan, outcome)
    return RecordDict(
        {
            "arrays": _arrays(arrays),
            "metrics": MetricRecord({"num-examples": weight}),
            "outcome": _config(outcome),
        }
    )


def _evaluate(trainer: Trainer, order: RoundOrder, message: Message) -> RecordDict:
    noise = None
    if trainer.runtime.private_counts:
        noise = noise_for(trainer.plan, Limits(), order.part)
    counts, outcome = trainer.evaluate(_model(message), order, noise)
    return RecordDict({"counts": _arrays(counts), "outcome": _config(outcome)})


def _weight(plan: Plan, outcome: TrainOutcome) -> float:
    return float(outcome.patients if plan.strategy.weighting == "patients" else outcome.images)


def _order(message: Message) -> RoundOrder:
    record = message.content.config_records.get("config")
    if record is None:
        raise ProtocolError(RuleCode.ORDER, fix="Send a RoundOrder record")
    flat = {key: value for key, value in record.items() if key not in _ADDED_BY_STRATEGIES}
    return RoundOrder.from_flat(flat)


def _model(message: Message) -> dict[str, NDArray[Any]]:
    """All arrays of the message; the model checks their names and shapes."""
    records = message.content.array_records.values()
    return {name: value for record in records for name, value in _named(record).items()}


def _named(record: Mapping[str, Array]) -> dict[str, NDArray[Any]]:
    return {name: array.numpy() for name, array in record.items()}


def _arrays(arrays: Mapping[str, NDArray[Any]]) -> ArrayRecord:
    return ArrayRecord({name: Array(value) for name, value in arrays.items()})


def _config(record: Record) -> ConfigRecord:
    return ConfigRecord(record.to_flat())  # type: ignore[arg-type]


def _refusal(refusal: Refusal) -> RecordDict:
    return RecordDict({"refusal": _config(refusal)})
