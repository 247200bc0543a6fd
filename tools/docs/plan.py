"""The plan reference, from the schema: ``python -m tools.docs.plan > docs/plan.md``."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator, Sequence

from pydantic import BaseModel

from fedward.networks import MODELS
from fedward.plan import schema
from fedward.ready_studies import shipped_study
from fedward.strategies import STRATEGIES, Setting
from fedward.tasks.registry import TASKS
from tools.docs.schema_tables import anchor, fields_table, summary

_SECTIONS: tuple[tuple[str, type[BaseModel]], ...] = (
    ("[study]", schema.Study),
    ("[task]", schema.Task),
    ("[images]", schema.Images),
    ("[preprocessing]", schema.Preprocessing),
    ("[[preprocessing.channel]]", schema.Channel),
    ("[preprocessing.patch]", schema.Patch),
    ("[preprocessing.augmentation]", schema.Augmentation),
    ("[table]", schema.TableInput),
    ("[[table.column]]", schema.Column),
    ("[split]", schema.Split),
    ("[model]", schema.Model),
    ("[model.initial_weights]", schema.InitialWeights),
    ("[training]", schema.Training),
    ("[[stages]]", schema.Stage),
    ("[strategy]", schema.Strategy),
    ("[personal]", schema.Personal),
    ("[compression]", schema.Compression),
    ("[privacy]", schema.Privacy),
    ("[participation]", schema.Participation),
    ("[metrics]", schema.Metrics),
)

_HEAD = """\
# The study plan

A plan is a TOML file. It is data, never code: it says what is learnt, from which images, with which
network, for how long, with how much privacy and with which sites. A coordinator writes it once;
every site reads the same text and can refuse it. `fedward-simulate plan check PLAN.toml` validates
a plan and explains it in words.

- An unknown key, a wrong type or an impossible combination is refused; the message names the key,
  the rule, the value and what to do (exit code 10, see [errors](errors.md)).
- Values are not converted: `rounds = "20"` and `rounds = true` are refused. A whole number may
  stand where a number is meant (`rotate = 10`). `nan` and `inf` are refused everywhere.
- The plan's SHA-256 is taken over its canonical form: sorted keys, without those
  that have their default value. Order, comments and writing a default out do not change it; every
  value does.

This page is generated from the schema (`python -m tools.docs.plan > docs/plan.md`) and a
test holds it.

## An example

`fedward-simulate init --data FOLDER` writes a plan for your images, with comments; `studies/` has
ready ones, whose names the commands take. This one, `studies/demo/private.toml`, is private and
suits a hospital's default policy:

```toml
EXAMPLE```
"""

_RULES = """\
## Rules between keys

Task and preprocessing

- `task.classes`: names differ; classification that is not multi-label has at least two.
- `task.multi_label` belongs to classification.
- `task.modality`: `any` stands alone.
- `preprocessing.size` has as many entries as `task.dimensions`; `preprocessing.spacing` as many as
  `size`.
- `preprocessing.window` and `preprocessing.percentiles` exclude each other; each rises from low to
  high; percentiles lie within 0 and 100.
- `preprocessing.intensity = "imagenet"` needs `channels = 3`.
- `preprocessing.channels` is 1 or 3, or the number of `[[preprocessing.channel]]`, whose names
  differ; they go without `intensity = "imagenet"`. `preprocessing.augmentation.drop_channel` is for
  two of them or more.
- `[preprocessing.patch]` is for segmentation, without `preprocessing.resize` and `privacy.audit`;
  `preprocessing.size` is then the size of a patch. `flips` has `"depth"` only with
  `task.dimensions = 3`.
- `preprocessing.augmentation.flip` has `"depth"` only with `task.dimensions = 3`.
- `[table]` is for classification, with a network whose last layer is a linear one. A `number` has
  a `range`, a `category` two `values` or more. Names of columns differ, and so do values, in
  whatever case. `?`, `-`, `na`, `n/a`, `nan`, `null`, `none`, `unknown` and an empty cell mean that
  the value is missing, unless `values` list them.
- `split.validation` and `split.test` together are below 1.

Model

- What each network takes stands in [Models](#models).

Training

- Exactly one of `training.local_epochs` and `training.local_steps` is given.
- `training.rounds` and `training.learning_rate` go together; a plan with `[[stages]]` has neither,
  a plan without has both. Stage names differ.
- `training.loss`: LOSSES.
- `training.class_weights` has one entry per model output (segmentation: the background first).
- `training.warmup_rounds` are fewer than the rounds of each stage. `training.gradient_clipping`
  goes without privacy only.
- `training.momentum` belongs to `sgd`, `training.label_smoothing` to `cross_entropy`.

Privacy

- `mechanism = "dp-sgd"` needs `epsilon`, `delta` and `clipping_norm`; `mechanism = "none"` takes
  none of them and no `sampling_rate`.
- With `training.local_steps`, `dp-sgd` needs `sampling_rate`: what a step costs depends on it.

Compression

- `compression.share` belongs to `top-k`, which needs it; `compression.rounding` to
  `int8` to `int3`.
- `[compression]` does not go with a strategy that sends something besides the update, nor `top-k`
  with one that compares single parameters.

Participation and metrics

- `participation.quorum` is at most `participation.sites`.
STRATEGIES
- `keep` is at most the quorum.
- `metrics.primary` is one of `metrics.report`. METRICS.
"""


def _rules() -> str:
    """The rules, with what the registry of tasks lists filled in."""
    losses = ", ".join(
        f"{_code(names, 'or')} for {name}"
        for spec in TASKS.values()
        for name, names in spec.losses.items()
    )
    metrics = "; ".join(
        f"{kind} has {_code(spec.metric_names, 'and')}" for kind, spec in TASKS.items()
    )
    rules = _RULES.replace("STRATEGIES", "\n".join(_strategy_rules()))
    lines = (_wrapped(line, losses, metrics) for line in rules.splitlines())
    return "\n".join(lines) + "\n"


def _code(names: Sequence[str], joint: str) -> str:
    *first, last = (f"`{name}`" for name in names)
    return f"{', '.join(first)} {joint} {last}" if first else last


def _wrapped(line: str, losses: str, metrics: str) -> str:
    filled = line.replace("LOSSES", losses).replace("METRICS", metrics[0].upper() + metrics[1:])
    return line if filled == line else textwrap.fill(filled, 100, subsequent_indent="  ")


def plan_reference() -> str:
    """The text of ``docs/plan.md``."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    yield _HEAD.replace("EXAMPLE", shipped_study("demo/private").read_text("utf-8"))
    yield from ("## Top level", "", summary(schema.Plan), "", *fields_table(schema.Plan), "")
    for title, model in _SECTIONS:
        yield from (f"## `{title}`", "", f'<a id="{anchor(model.__name__)}"></a>', "")
        yield from (summary(model), "", *fields_table(model), "")
    yield from _models()
    yield from _strategies()
    yield _rules()


def _models() -> Iterator[str]:
    yield from ("## Models", "", '<a id="models"></a>', "")
    yield from ("Without `model.channels` a network has its default widths.", "")
    yield "| model | what it is | task | images | sides: multiples of | `model.channels` | others |"
    yield "|---|---|---|---|---|---|---|"
    for spec in MODELS.values():
        images = " and ".join(f"{number}D" for number in spec.dimensions)
        if len(spec.colours) == 1:
            images += f", `channels = {spec.colours[0]}`"
        widths = "fixed"
        if spec.widths is not None:
            widths = f"{spec.widths.meaning}; default {', '.join(map(str, spec.widths.default))}"
        others = {
            "`dropout`": spec.dropout,
            "`taps`": spec.taps,
            "`initial_weights` needed": spec.frozen_statistics,
        }
        cells = (
            f"`{spec.name}`",
            spec.summary,
            " or ".join(spec.tasks),
            images,
            spec.sides.meaning if spec.sides else "",
            widths,
            ", ".join(word for word, holds in others.items() if holds),
        )
        yield f"| {' | '.join(cells)} |"
    yield ""


def _strategies() -> Iterator[str]:
    yield from ("## Strategies", "", "Settings stand in `[strategy.settings]`.", "")
    yield from ("| strategy | what it does | setting | default | limits | meaning |",)
    yield "|---|---|---|---|---|---|"
    for spec in STRATEGIES.values():
        head = f"| `{spec.name}` | {spec.summary} "
        if not spec.settings:
            yield f"{head}| none | | | |"
        for name, setting in spec.settings.items():
            yield f"{head}| {_setting(name, setting)} |"
            head = "| | "
    yield ""


def _strategy_rules() -> Iterator[str]:
    for spec in STRATEGIES.values():
        if spec.updates_per_malicious:
            needed = f"{spec.updates_per_malicious} × `malicious` + {spec.updates_least}"
            yield f"- `{spec.name}` needs a quorum of {needed} updates."
        if spec.sgd or spec.plain_sgd:
            without = " without `training.momentum`" if spec.plain_sgd else ""
            yield f"- `{spec.name}` needs `training.optimizer` `sgd`{without}."
        if spec.minimum_sites > 1:
            yield f"- `{spec.name}` needs {spec.minimum_sites} `participation.sites`."
        if not spec.private:
            yield (
                f"- `{spec.name}` goes without privacy only: noise does not cover what it sends "
                "besides the update."
            )


def _setting(name: str, setting: Setting) -> str:
    default = "required" if setting.default is None else f"`{setting.default:g}`"
    return f"`{name}` | {default} | {setting.limits} | {setting.meaning}"


if __name__ == "__main__":
    sys.stdout.write(plan_reference())
