"""Keys of a config that follow from files which other keys name; a run's config.json has both.

train.epochs                   -> train.steps, from the sequences of the corpus
train.trainable.most_used_in   -> train.trainable.experts, from the results of an evaluation
train.start_from               -> data.tokenizer, for conversations that are not prepared yet
model.moe.router.name          -> model.moe.router.tasks, the domains of the corpus, if by task

A mixture of domains (data.mixture) must be of domains that the corpus has.

The same command gives the same values again, as long as the files are the same; where they are not,
a run that has begun is refused, since its config would be another.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from dsmoe_jax.config import Config, replace, stages_of
from dsmoe_jax.config.checks import require
from dsmoe_jax.data import opening
from dsmoe_jax.data.mixture import mixture_of
from dsmoe_jax.moe.routers import ROUTERS
from dsmoe_jax.parallel import hosts
from dsmoe_jax.runs import json_files
from dsmoe_jax.runs import workdir as workdirs
from dsmoe_jax.storage.places import place_of
from dsmoe_jax.training import freezing


def derive(config: Config) -> Config:
    """The config with all keys that follow from others.

    Raises:
      ValueError: naming the key, if a file is not there or does not fit.
    """
    for step in _STEPS:
        config = step(config)
    return config


def _tokenizer(config: Config) -> Config:
    """Conversations for a trained model are read in its tokens."""
    start = config.train.start_from
    wanted = start is not None and config.data.tokenizer is None
    if not wanted or not opening.is_unprepared_chat(config.data):
        return config
    file = place_of("train.start_from", str(start)) / workdirs.TOKENIZER
    return replace(config, **{"data.tokenizer": str(file)}) if file.exists() else config


def _steps(config: Config) -> Config:
    """As many steps as the passes over the training text take."""
    epochs = config.train.epochs
    if epochs is None:
        return config
    key = "train.global_batch_size"
    fixed = config.train.stages is None or key not in config.train.stages
    require(fixed, "train.epochs", epochs, f"needs a {key} that stages do not change")
    corpus = hosts.first_then_all(lambda: opening.open_corpus(config.data))
    sequences = Fraction(epochs).limit_denominator(10**6) * corpus.num_records("train")
    return replace(config, **{"train.steps": math.ceil(sequences / config.train.global_batch_size)})


def _experts(config: Config) -> Config:
    """The experts that a task uses most."""
    trainable = config.train.trainable
    name = trainable.most_used_in
    if name is None:
        return config
    key = "train.trainable.most_used_in"
    path = place_of(key, name)
    require(path.is_file(), key, name, "no such file; evaluate --out=FILE writes one")
    load = json_files.read(path).get("load")
    require(_is_load(load), key, name, "has no load by layer; must be results of evaluate --out")
    ids = freezing.most_used(load, trainable.share)
    same = trainable.experts in (None, ids)
    require(same, "train.trainable.experts", trainable.experts, f"{key}={name} says {ids}")
    return replace(config, **{"train.trainable.experts": ids})


def _is_load(load: Any) -> bool:
    """Whether JSON is a load by layer and expert, with a load in each layer."""
    if not isinstance(load, list) or not load:
        return False

    def is_of_layer(layer: Any) -> bool:
        numbers = isinstance(layer, list) and all(isinstance(x, int | float) for x in layer)
        return numbers and sum(layer) > 0

    return all(map(is_of_layer, load))


def _tasks(config: Config) -> Config:
    """A router by task has the domains of the corpus to choose by, if no others are named."""
    router = config.model.moe.router
    by_task = router.name in ROUTERS and ROUTERS[router.name].by_task
    if router.tasks or not by_task:
        return config
    domains = hosts.first_then_all(lambda: opening.open_corpus(config.data)).domains
    require(
        len(domains) > 1,
        "data.corpus",
        config.data.corpus,
        f"has the one domain {domains[0]}, and the {router.name} router chooses by task; must have"
        " two or more, or the router be another",
    )
    return replace(config, **{"model.moe.router.tasks": tuple(domains)})


def _mixture(config: Config) -> Config:
    """The config as it is, whose mixture of domains the corpus can give."""
    stage, *_ = stages_of(config)
    if stage.mixtures:
        mixture_of(stage, hosts.first_then_all(lambda: opening.open_corpus(config.data)))
    return config


_STEPS: tuple[Callable[[Config], Config], ...] = (_tokenizer, _steps, _experts, _tasks, _mixture)
