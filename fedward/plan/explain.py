"""Explain a plan in words for clinicians and IT engineers."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator

from fedward.compression import METHODS
from fedward.networks import MODELS
from fedward.plan.image_filter import ATTRIBUTES
from fedward.plan.load import plan_hash, schema_needed
from fedward.plan.schema import (
    CENTERING_STEPS,
    Channel,
    Column,
    Compression,
    Patch,
    Plan,
    Stage,
    TableInput,
)
from fedward.plan.versions import used

_LABEL, _WIDTH = 15, 100
_FLOAT32 = 4
_INTENSITY = {
    "unit": "scaled to 0 to 1",
    "zscore": "each image shifted and scaled to mean 0 and deviation 1",
    "imagenet": "scaled to 0 to 1, then by ImageNet's mean and deviation",
}


def explain(
    plan: Plan, parameters: int | None = None, traffic: tuple[int, int] | None = None
) -> str:
    """The plan in plain words, without markup.

    Parameters
    ----------
    plan : Plan
        A valid plan.
    parameters : int, optional
        Parameters of its model; with it the model's size and the traffic are told.
    traffic : tuple of int, optional
        Most bytes that a site sends and receives in a round (see
        :func:`fedward.models.most_traffic`).

    Returns
    -------
    str
        Lines of at most 100 characters; the last one holds the plan's SHA-256.
    """
    return "\n".join(
        line for label, text in _parts(plan, parameters, traffic) for line in _wrap(label, text)
    )


def _wrap(label: str, text: str) -> list[str]:
    # Hyphens stand in names here, where a break would mislead.
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=label.ljust(_LABEL),
        subsequent_indent=" " * _LABEL,
        break_on_hyphens=False,
        break_long_words=False,
    )


def _parts(
    plan: Plan, parameters: int | None, traffic: tuple[int, int] | None = None
) -> Iterator[tuple[str, str]]:
    title = f": {plan.study.title}" if plan.study.title else ""
    yield "Study", f"{plan.study.name}{title}"
    if plan.study.intended_use:
        yield "Intended use", plan.study.intended_use
    if (version := schema_needed(plan)) > 1:
        yield "Needs", f"plan schema {version} at every site: {', '.join(sorted(used(plan)))}"
    yield "Learns", _task(plan)
    yield "From", _data(plan)
    if any(plan.images.model_dump().values()):
        yield "Takes", _images(plan)
    yield "Prepares", _preprocessing(plan)
    if plan.preprocessing.patch is not None:
        yield "Patches", _patches(plan)
    if plan.table is not None:
        yield "Reads", _table(plan.table)
    if plan.preprocessing.augmentation.active:
        yield "Augments", _augmentation(plan)
    yield "Model", _model(plan, parameters)
    if plan.model.feature_centering:
        yield "Centres", _centering(plan)
    yield from _schedule(plan)
    yield from _delivered(plan)
    yield "Each site", _site_work(plan)
    yield "Server", _server(plan)
    yield from _own_models(plan)
    if plan.compression is not None:
        yield "Compresses", _compression(plan, plan.compression)
    yield "Exchanges", exchange(plan, parameters, traffic)
    yield "Privacy", _privacy(plan)
    yield "Sites", _participation(plan)
    yield "Measures", _metrics(plan)
    yield "SHA-256", plan_hash(plan)


def count(number: int, word: str) -> str:
    """``1 round``, ``2 rounds``, ``2 classes``, ``2 passes``."""
    if number == 1:
        return f"1 {word}"
    return f"{number:,} {word}{'es' if word.endswith(('s', 'ch')) else 's'}"


def _listed(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:12])
    return shown if len(names) <= 12 else f"{shown} and {len(names) - 12} more"


def _task(plan: Plan) -> str:
    task, what = plan.task, "2D images" if plan.task.dimensions == 2 else "3D volumes"
    number = count(len(task.classes), "class")
    return task.spec.goal(task, number, what, _listed(task.classes))


def _data(plan: Plan) -> str:
    kinds, split = plan.task.modality, plan.split
    accepted = "images of any modality" if kinds == ("any",) else f"{', '.join(kinds)} images only"
    shares = (
        f"of each site's patients {split.validation:.0%} serve validation, {split.test:.0%} the "
        f"test, the others training; a patient is in one part only (seed {split.seed})"
    )
    given = "; where the data brings its own division, that one holds" if split.given else ""
    return f"{accepted}; {shares}{given}"


def _images(plan: Plan) -> str:
    parts = [
        f"{ATTRIBUTES[key]} fits {', '.join(patterns)}"
        for key, patterns in plan.images.model_dump().items()
        if patterns
    ]
    return f"of DICOM images only those whose {'; '.join(parts)}"


def _preprocessing(plan: Plan) -> str:
    prep = plan.preprocessing
    size = " × ".join(map(str, prep.size))
    spacing = " × ".join(f"{step:g}" for step in prep.spacing or ())
    if prep.patch is not None:
        shape = f"resampled to {spacing} mm" if spacing else "on the grid that they have"
        shape += ", each at its own size"
    elif spacing:
        shape = f"resampled to {spacing} mm, then centrally cropped or padded to {size}"
    else:
        shape = f"{'stretched' if prep.resize == 'stretch' else 'fitted and padded'} to {size}"
    steps = [shape, "grey" if prep.channels == 1 else "three channels"]
    if prep.channel:
        steps[1] = f"channels {', '.join(map(_channel, prep.channel))}, each scaled by itself"
    if prep.window:
        steps.append(f"intensities {prep.window[0]:g} to {prep.window[1]:g} kept")
    if prep.percentiles:
        low, high = prep.percentiles
        steps.append(f"percentiles {low:g} to {high:g} of each image kept")
    return "; ".join([*steps, _INTENSITY[prep.intensity]])


def _channel(channel: Channel) -> str:
    window = f" from {channel.window[0]:g} to {channel.window[1]:g}" if channel.window else ""
    lacking = "zeros where it is missing"
    if channel.missing == "leave-out":
        lacking = "images without it are left out"
    return f"{channel.name}{window} ({lacking})"


def column_words(column: Column) -> str:
    """A column of the table beside the images, in words."""
    if column.range is not None:
        unit = f" {column.unit}" if column.unit else ""
        what = f"{column.range[0]:g} to {column.range[1]:g}{unit}"
    else:
        what = f"one of {_listed(column.values)}"
    return f"{column.name} ({what}{', may be missing' if column.missing else ''})"


def _table(table: TableInput) -> str:
    hidden = "the last layer reads"
    if table.hidden is not None:
        hidden = f"a layer of {table.hidden} with a ReLU reads"
    columns = "; ".join(map(column_words, table.column))
    return (
        f"beside each image from the site's table: {columns}; {hidden} these with the image's "
        "features. An image with another value, or without one that may not be missing, is left "
        "out. The values stay at the site"
    )


def _patches(plan: Plan) -> str:
    prep, patch = plan.preprocessing, plan.preprocessing.patch or Patch()
    size = " × ".join(map(str, prep.size))
    megabytes = _FLOAT32 * prep.channels * math.prod(prep.size) / 1e6
    step = math.prod(max(1.0, side * (1 - patch.overlap)) for side in prep.size)
    work = 2 ** len(patch.flips) * math.prod(prep.size) / step
    mirrored = f", each also mirrored ({', '.join(patch.flips)})" if patch.flips else ""
    drawn = count(patch.per_image, "random patch")
    return (
        f"trains on {drawn} of {size} ({megabytes:.3g} MB) of each image in a step, "
        f"{patch.foreground:.0%} of them about a marked pixel; smaller images are padded. Whole "
        f"images are answered by windows of that size that overlap by {patch.overlap:.0%}"
        f"{mirrored}, weighted by a Gaussian: about {work:.3g} times the work of one look at each "
        "pixel. Figures are of whole images on the grid of their files"
    )


def _augmentation(plan: Plan) -> str:
    random = plan.preprocessing.augmentation
    parts = [f"mirrored ({', '.join(random.flip)})"] if random.flip else []
    for value, words in (
        (random.rotate, "turned by up to {:g}°"),
        (random.scale, "zoomed by up to {:.0%}"),
        (random.shift, "shifted by up to {:.0%} of the side"),
        (random.contrast, "contrast changed by up to {:.0%}"),
        (random.brightness, "brightness changed by up to {:g}"),
        (random.noise, "noise added with deviation {:g}"),
        (random.gamma, "gamma changed by up to {:.0%}"),
        (random.blur, "blurred by up to {:g} pixels"),
        (random.low_resolution, "resolution lowered by up to {:.0%}"),
        (random.drop_channel, "each channel dropped with a chance of {:.0%}"),
        (random.bias_field, "multiplied with a smooth field of up to {:g}"),
    ):
        if value:
            parts.append(words.format(value))
    return f"training images at random: {', '.join(parts)}"


def _model(plan: Plan, parameters: int | None) -> str:
    model = plan.model
    text = f"{model.name} ({MODELS[model.name].summary})"
    if model.channels:
        text += f" with widths {', '.join(map(str, model.channels))}"
    if parameters is not None:
        text += f", {count(parameters, 'parameter')}"
    if model.dropout:
        text += f", dropout {model.dropout:g}"
    if model.deep_supervision:
        text += ", whose levels learn to answer by themselves as well"
    if model.feature_centering:
        text += ", whose last layer reads features without their mean, brought to one length"
    if model.initial_weights is None:
        return f"{text}; starts from fresh weights"
    return f"{text}; starts from public weights (SHA-256 {model.initial_weights.sha256[:12]}…)"


def _schedule(plan: Plan) -> Iterator[tuple[str, str]]:
    if not plan.stages:
        (only,) = plan.training_stages
        yield "Runs", f"{count(only.rounds, 'round')}, {_rate(plan, only)}"
        return
    rounds = sum(stage.rounds for stage in plan.stages)
    yield "Runs", f"{count(rounds, 'round')} in {count(len(plan.stages), 'stage')}"
    for stage in plan.stages:
        what = (
            "all parameters train" if stage.train == ("*",) else f"trains {', '.join(stage.train)}"
        )
        yield "", f"{stage.name}: {count(stage.rounds, 'round')}, {_rate(plan, stage)}; {what}"


def _delivered(plan: Plan) -> Iterator[tuple[str, str]]:
    train, primary = plan.training, plan.metrics.primary
    if train.patience is not None:
        after = count(train.patience, "evaluation")
        yield "", f"ends after {after} without a better {primary} on validation patients"
    if train.keep == "best":
        yield "", f"delivers the model of the round with the best {primary} on validation patients"
    elif train.averaged_rounds is not None:
        yield "", f"delivers the mean of the models of the last {train.averaged_rounds} rounds"


def _centering(plan: Plan) -> str:
    text = (
        "first a round without training: each site measures the mean of its features, the server "
        "averages them, and the model subtracts that mean from then on, at every site"
    )
    if not plan.privacy.on:
        return f"{text}; the mean is exact"
    steps = count(plan.privacy.centering_steps or CENTERING_STEPS, "private step")
    return f"{text}; it takes {steps}, with the noise of the others and inside the same ε"


def _rate(plan: Plan, stage: Stage) -> str:
    how = {"cosine": ", falling along a cosine", "polynomial": ", falling as (1 − t)^0.9"}
    text = f"learning rate {stage.learning_rate:g}{how.get(plan.training.schedule, '')}"
    if warmup := plan.training.warmup_rounds:
        text += f", after rising for {count(warmup, 'round')}"
    return text


def _site_work(plan: Plan) -> str:
    train = plan.training
    how = f"{train.optimizer} on {train.loss}"
    if train.gradient_clipping is not None:
        how += f", gradients clipped to {train.gradient_clipping:g}"
    if plan.privacy.on:
        return f"{_private_steps(plan)}, {how}"
    if train.local_steps is not None:
        images = count(train.batch_size, "image")
        return f"{count(train.local_steps, 'step')} of {images} in a round, {how}"
    passes = count(train.local_epochs or 1, "pass")
    return f"{passes} over its training images in a round, in batches of {train.batch_size}, {how}"


def _private_steps(plan: Plan) -> str:
    rate, train = plan.privacy.sampling_rate, plan.training
    chance = f"{rate:g}" if rate is not None else f"{train.batch_size} / its training patients"
    if train.local_steps is not None:
        steps = count(train.local_steps, "step")
    else:
        steps = f"{count(train.local_epochs or 1, 'pass')} over its patients"
    images = count(plan.privacy.images_per_patient, "image")
    return f"{steps} in a round; a step draws each patient with chance {chance}, {images} of each"


def _server(plan: Plan) -> str:
    strategy, spec = plan.strategy, plan.strategy.spec
    text = f"{strategy.name}: {spec.summary}"
    if spec.weighted:
        text += f", weighted by {strategy.weighting}"
    if spec.by_figures:
        text += (
            f" and by {plan.metrics.primary} on each site's validation patients, as this plan's "
            "evaluations release it: nothing more leaves a site"
        )
    if spec.needs_all:
        text += "; the server holds all updates of a round in memory"
    if strategy.settings:
        text += f" ({', '.join(f'{key} = {value:g}' for key, value in strategy.settings.items())})"
    if strategy.averaging:
        text += f"; delivers a moving average of the global models (decay {strategy.averaging:g})"
    return text


def _own_models(plan: Plan) -> Iterator[tuple[str, str]]:
    personal = plan.personal
    if personal is None:
        return
    if personal.alone:
        yield (
            "Alone",
            "each site also trains a model on its own patients alone: one local training in each "
            "round, of which only the figures leave",
        )
    if personal.method is None:
        return
    local = ", ".join(personal.local) or "its head"
    what = {
        "fine-tuning": "after the last round it trains the delivered model on by itself, for "
        f"{count(personal.rounds or 0, 'round')}",
        "ditto": "in each round it trains a second model, held near the shared one "
        f"(λ = {personal.weight or 0:g}); a round takes twice as long",
        "fedbn": "its normalisation layers train and are never sent",
        "fedper": f"what trains and is never sent: {local}",
        "fedrep": f"what is never sent: {local}; in each round it trains first by itself, then the "
        "rest; a round takes twice as long",
    }[personal.method]
    text = f"each site keeps a model of its own, which never leaves it: {what}"
    if plan.privacy.on:
        text += "; this training is inside the same ε"
    elif personal.choose:
        others = "the shared one or the one trained alone" if personal.alone else "the shared one"
        text += f"; it takes {others} where that is better on its own validation patients"
    yield "Own models", text


def _compression(plan: Plan, how: Compression) -> str:
    text = f"what a site sends of an update: {how.method} ({METHODS[how.method].summary})"
    if how.share is not None:
        text += f", {how.share:.3g} of all"
    if how.rounding == "stochastic":
        text += ", rounded up and down by chance"
    if how.error_feedback:
        text += "; a site keeps what this leaves out and adds it to its next update"
    else:
        text += "; what this leaves out is lost"
    if how.download is not None:
        text += f"; the model travels to training as {how.download}"
    if plan.privacy.on:
        text += ". All of it has its noise before, so that compression costs no ε"
    return text


def exchange(plan: Plan, parameters: int | None, traffic: tuple[int, int] | None = None) -> str:
    """What a site sends, in words; with the parameters of the model how much."""
    spec = plan.strategy.spec
    besides = "".join(f", {meaning}" for meaning in spec.sent.values())
    text = (
        f"model parameters{besides} and the counts of this plan's metrics; never an image, name or "
        "path"
    )
    if spec.kept:
        text += f"; a site keeps {', '.join(spec.kept.values())}"
    if parameters is None:
        return text
    size = parameters * _FLOAT32 / 1e6 * (1 + max(len(spec.received), len(spec.sent)))
    if plan.compression is not None and traffic is not None:
        up, down = traffic
        return (
            f"{text}; in a round of training a site sends at most {up:,} bytes and receives at "
            f"most {down:,}; what does not train, and models to be measured, come as they are: at "
            f"most about {size:.2g} MB"
        )
    return f"{text}; at most about {size:.2g} MB each way per site and round"


def _privacy(plan: Plan) -> str:
    target = plan.privacy
    if target.epsilon is None or target.delta is None or target.clipping_norm is None:
        return "none: updates are exchanged as they are, and nothing bounds what they tell"
    return (
        f"each site's updates over the whole study are (ε = {target.epsilon:g}, "
        f"δ = {target.delta:g}) differentially private for each of its patients (high risk where "
        "images name no patients: then for each image, and only sites that set "
        "images_are_patients take part): what one patient "
        f"adds to a step is clipped to {target.clipping_norm:g} and Gaussian noise is added; the "
        "noise is set from each site's own sampling rate and the planned steps. Evaluations have "
        f"an ε of their own, {plan.metrics.epsilon:g}, about validation and test patients"
    )


def _participation(plan: Plan) -> str:
    part = plan.participation
    return (
        f"starts with {count(part.sites, 'site')} that each bring at least "
        f"{count(part.minimum_patients, 'patient')}; a round counts with "
        f"{count(part.needed, 'update')}, waits at most {part.deadline:g} s and is repeated "
        f"{count(part.retries, 'time')} at most"
    )


def _metrics(plan: Plan) -> str:
    metrics = plan.metrics
    every = (
        "every round" if metrics.evaluate_every == 1 else f"every {metrics.evaluate_every} rounds"
    )
    return f"{', '.join(metrics.report)}; {metrics.primary} leads; on validation patients {every}"
