"""The client application in Flower's terms: a message in, the site's reply out."""

from __future__ import annotations

from typing import Protocol

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedward.errors import ConfigError, ProtocolError
from fedward.protocol import Refusal
from fedward.rule_codes import RuleCode
from fedward_client.link.messages import TrainerMessage
from fedward_client.messages import to_order, to_reply


class Sites(Protocol):
    """Who answers for a node: each site's :class:`fedward_client.trainer.service.OrderService`."""

    def answer(self, context: Context, what: str, order: TrainerMessage) -> TrainerMessage:
        """Answer an order; a refusal is an answer too."""

    def garbage(self, context: Context, error: ProtocolError) -> TrainerMessage:
        """Refuse what was no order at all."""


def client_app(sites: Sites) -> ClientApp:
    """The client application over one or several sites in this process.

    It turns messages into orders and answers into replies, as a hospital's connector does, and
    decides nothing.
    """
    made = ClientApp()

    def answer(message: Message, context: Context) -> Message:
        order = TrainerMessage("order", {})
        try:
            what, order = to_order(message, packed=False)
        except ProtocolError as error:
            reply = sites.garbage(context, error)
        else:
            reply = sites.answer(context, what, order)
        try:
            content = to_reply(reply, order, packed=False)
        except ProtocolError as error:
            content = to_reply(sites.garbage(context, error), order, packed=False)
        return Message(content, reply_to=message)

    made.query()(answer)
    made.train()(answer)
    made.evaluate()(answer)
    return made


class _Nobody:
    """No site: between hospitals the connector answers, and a simulation brings its own sites."""

    def answer(self, context: Context, what: str, order: TrainerMessage) -> TrainerMessage:
        return self.garbage(context, ConfigError(RuleCode.TRAINER_GONE))

    def garbage(self, context: Context, error: ProtocolError | ConfigError) -> TrainerMessage:
        made = Refusal.of(error, site=f"node {context.node_id}", round_=0, kind="error")
        return TrainerMessage("refusal", dict(made.to_flat()))


app = client_app(_Nobody())
