"""A table as the second input of a classifier: its columns stand beside the image's features.

The columns are late: nothing before the last layers depends on them, so that frozen layers are
still computed once per image, and privacy bounds nothing but linear layers more.
"""

from __future__ import annotations

import torch
from torch import nn

from fedward.errors import PlanError
from fedward.models.prefix import TableChain, TableJoin, steps_of
from fedward.plan.schema import TableInput
from fedward.rule_codes import RuleCode


def with_table(model: nn.Module, table: TableInput) -> TableChain:
    """The same network, whose last layer reads the columns of a table beside the features.

    Parameters
    ----------
    model : nn.Module
        A chain of blocks that ends in a linear layer; its blocks are used, not copied, under the
        names that they have.
    table : TableInput
        ``width`` numbers of each image join the features. With ``hidden`` a linear layer
        ``table.hidden`` and a ReLU stand between them and the last layer, which keeps its name.

    Returns
    -------
    TableChain
        Takes images ``(N, C, *S)`` and their rows ``(N, width)``. Without ``hidden`` it starts as
        the network that reads no table: the weights of the columns are 0.

    Raises
    ------
    PlanError
        It is no such chain.
    """
    steps = steps_of(model)
    name, head = steps[-1] if steps else ("", None)
    if not isinstance(head, nn.Linear):
        raise PlanError(
            RuleCode.TABLE_HEAD, fix="Choose another model, or remove the table", where="table"
        )
    joined, outputs = head.in_features + table.width, head.out_features
    join = ("table.join", TableJoin())
    if table.hidden is None:
        last = nn.Linear(joined, outputs)
        with torch.no_grad():
            last.weight[:, : head.in_features] = head.weight
            last.weight[:, head.in_features :] = 0.0
            last.bias.copy_(head.bias)
        return TableChain([*steps[:-1], join, (name, last)])
    hidden = [("table.hidden", nn.Linear(joined, table.hidden)), ("table.relu", nn.ReLU())]
    return TableChain([*steps[:-1], join, *hidden, (name, nn.Linear(table.hidden, outputs))])
