"""Between Flower's messages and the socket's packets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from fedward.errors import FedwardError, ProtocolError
from fedward.protocol import Refusal, RefusalKind, RoundOrder, TrainOutcome
from fedward.rule_codes import RuleCode
from fedward.tensors import FROZEN, PACKED, Arrays, pack, unpack
from fedward_client.connector.frozen import FrozenArrays, Lacking
from fedward_client.link.messages import TrainerMessage

_WHAT: Final = {"query": "describe", "train": "train", "evaluate": "evaluate"}
_ADDED_BY_STRATEGIES: Final = ("server-round", "proximal-mu")


def to_order(
    message: Message, held: FrozenArrays | None = None, *, packed: bool = True
) -> tuple[str, TrainerMessage]:
    """What a message asks for: describe, train or evaluate, and the packet for the trainer.

    Parameters
    ----------
    message : Message
        What came.
    held : FrozenArrays, optional
        Where frozen arrays are kept that come with one order and are named by others.
    packed : bool
        Whether arrays come packed into one, as between hospitals; in a simulation they do not.

    Raises
    ------
    ProtocolError
        It is none of ours.
    Lacking
        It names frozen arrays that are not held here.
    """
    if message.has_error() or not message.has_content():
        raise ProtocolError("a message must have content")
    what = _WHAT.get(message.metadata.message_type.split(".")[0])
    configs = message.content.config_records
    if what is None or list(configs) != ["config"] or message.content.metric_records:
        raise ProtocolError("a message must carry one order of a known kind", code=RuleCode.ORDER)
    config = dict(configs["config"])
    # A strategy's own keys change nothing at the site, which takes its settings from the plan.
    record = {key: value for key, value in config.items() if key not in _ADDED_BY_STRATEGIES}
    if any(isinstance(value, bytes) for value in record.values()):
        raise ProtocolError("an order holds no bytes")
    arrays = _arrays_of(message, str(record.get("frozen", "")), held, packed=packed)
    return what, TrainerMessage("order", record, arrays)


def to_reply(packet: TrainerMessage, order: TrainerMessage, *, packed: bool = True) -> RecordDict:
    """The trainer's answer as the content of a reply; arrays are packed into one, or not."""
    config = ConfigRecord({key: value for key, value in packet.record.items() if value is not None})
    match packet.kind:
        case "facts":
            return RecordDict({"facts": config})
        case "counts":
            return RecordDict({"counts": _record(packet.arrays, packed=packed), "outcome": config})
        case "update":
            weight = MetricRecord({"num-examples": _weight(packet, order)})
            arrays = _record(packet.arrays, packed=packed)
            return RecordDict({"arrays": arrays, "metrics": weight, "outcome": config})
        case "refusal":
            return RecordDict({"refusal": config})
    raise ProtocolError(RuleCode.ANSWER_KIND, value=packet.kind)


def refusal(site: str, order: TrainerMessage | None, error: FedwardError) -> TrainerMessage:
    """A refusal by the connector itself."""
    asked = order.record.get("round", 0) if order else 0
    round_ = asked if isinstance(asked, int) and asked >= 0 else 0
    made = Refusal.of(error, site=site, round_=round_, kind=_kind(error))
    return TrainerMessage("refusal", dict(made.to_flat()))


def _kind(error: FedwardError) -> RefusalKind:
    if isinstance(error, Lacking):
        return "arrays"
    return "protocol" if isinstance(error, ProtocolError) else "error"


def _weight(packet: TrainerMessage, order: TrainerMessage) -> float:
    outcome = TrainOutcome.from_flat(packet.record)
    plan = RoundOrder.from_flat(order.record).read_plan()
    return float(outcome.patients if plan.strategy.weighting == "patients" else outcome.images)


def _arrays_of(message: Message, frozen: str, held: FrozenArrays | None, *, packed: bool) -> Arrays:
    """All arrays of an order, those included that it only names; their names must differ."""
    parts: dict[str, Arrays] = {}
    for key, record in message.content.array_records.items():
        if not packed:
            parts[key] = {name: _decoded(array) for name, array in record.items()}
            continue
        if list(record) != [PACKED]:
            raise ProtocolError("a model's arrays must be packed")
        parts[key] = unpack(_decoded(record[PACKED]))
    if frozen and held is not None:
        if FROZEN in parts:
            held.keep(frozen, parts[FROZEN])
        else:
            parts[FROZEN] = held.get(frozen)
    found: Arrays = {}
    for part in parts.values():
        if found.keys() & part.keys():
            raise ProtocolError("a model's arrays must have different names")
        found |= part
    return found


def _decoded(array: Array) -> Any:
    try:
        value: Any = array.numpy()
        bad = value.dtype.kind not in "fiub"
    except Exception as error:  # bytes from outside break this parser in undocumented ways
        raise ProtocolError("an array must be readable", value=type(error).__name__) from None
    if bad:
        raise ProtocolError("an array must hold numbers", value=str(value.dtype)[:20])
    return value


def _record(arrays: Mapping[str, NDArray[Any]], *, packed: bool) -> ArrayRecord:
    if not packed or not arrays:  # of a model of the site's own nothing is sent
        return ArrayRecord({name: Array(value) for name, value in arrays.items()})
    return ArrayRecord({PACKED: Array(pack(arrays))})
