"""Configs made at random: each gives objects that a run begins with, or one line that says what is wrong."""

import random
from pathlib import Path

import config_cases
import pytest
import torch
import yaml
from cases import outcome
from small_models import categorical

from callbacks import build_training_callbacks
from lit_parallel.checkpoint import build_model
from lit_parallel.config import SampleConfig, TrainConfig, from_container, load_config, save_config, to_container
from lit_parallel.data.datasets import build_data
from lit_parallel.errors import UserError
from lit_parallel.modules.autoregressive import AutoregressiveModule
from lit_parallel.sampling.sampler import What, check_sampler
from lit_parallel.trainer import check_sampling, check_trainer

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's, about what a case asks it for

CASES, MORE_CASES = 500, 10_000
MEMORY = 1 << 26  # bytes that the machine is said to have: no case takes more

_IMAGES = ["data.side=8"]
BASES = [
    ["model.hidden_sizes=[8]", *_IMAGES],
    ["model.hidden_sizes=[8,8]", "data.name=photos32", "model.order=random", *_IMAGES],
    ["model.name=pixelcnnpp", "model.filters=2", "model.resnets=1", "model.mixtures=2", *_IMAGES],
    ["model.name=rnn", "model.hidden_size=4", "callbacks.jacobi_backprop.enabled=true", *_IMAGES],
    ["model.name=rnn", "model.hidden_size=4", "model.task=classification", *_IMAGES],
    ["model.name=rnn", "model.hidden_size=4", "model.task=regression", "data.name=adding", "data.length=8"],
    ["model.name=rnn", "model.hidden_size=4", "model.task=next_character", "data.name=characters"],
    ["model.name=densenet", "model.architecture=custom", "model.block_config=[2,2]", "model.growth_rate=4", *_IMAGES],
    ["model.name=densenet", "model.architecture=cifar", "model.depth=10", "data.name=image_folder", "data.crop=32"],
    ["model.name=densenet", "model.architecture=cifar", "model.depth=10", "callbacks.jacobi_evaluation.enabled=true"],
]


@pytest.fixture(autouse=True)
def _contained(monkeypatch, tmp_path):
    """Cases see an empty folder and a small machine, and leave nothing switched on."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lit_parallel.memory.machine_memory", lambda: MEMORY)
    monkeypatch.setattr("lit_parallel.checkpoint.machine_memory", lambda: MEMORY)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False


def build_training(config):
    """All that train.py builds before it makes a run folder."""
    check_trainer(config.trainer)
    data = build_data(config.data, config.seed)
    model = build_model(config, data.sample_shape)
    model.check_data(data)
    if isinstance(model, AutoregressiveModule) and config.callbacks.sample_grid.enabled:
        check_sampler(model, config.solver, What(config.seed, config.sampling))
    build_training_callbacks(config, Path(), model)


def build_sampling(config):
    check_sampling(config.trainer)
    check_trainer(config.trainer)
    check_sampler(categorical(), config.solver, What(config.seed, config.sampling))


def try_config(seed, folder):
    """One case; returns whether it was a correct run."""
    randomness = random.Random(seed)
    schema, build = randomness.choice([(TrainConfig, build_training)] * 3 + [(SampleConfig, build_sampling)])
    base = randomness.choice(BASES) if schema is TrainConfig else []
    made = config_cases.assignments(randomness, schema, randomness.randint(1, 4))
    overrides = [assignment.override() for assignment in made]
    if randomness.random() < 0.5:
        how = "overrides"
        load = lambda: load_config(schema, None, [*base, *overrides])  # noqa: E731
    else:
        how = "a file"
        file = folder / "mine.yaml"
        file.write_text(yaml.safe_dump(config_cases.nested(made), allow_unicode=True), encoding="utf-8")
        load = lambda: load_config(schema, file, base)  # noqa: E731
    case = f"{schema.__name__} by {how}, seed {seed}: {base} {overrides}"
    config = outcome(load, case)
    if isinstance(config, UserError):
        return False
    assert from_container(schema, to_container(config)) == config, case
    save_config(config, folder / "config.yaml")
    assert load_config(schema, folder / "config.yaml") == config, case
    return not isinstance(outcome(lambda: build(config), case), UserError)


@pytest.mark.parametrize("chunk", range(12))
def test_a_config_gives_objects_or_one_line(chunk, tmp_path):
    built = [try_config(seed, tmp_path) for seed in range(chunk, CASES, 12)]
    assert 0.1 < sum(built) / len(built) < 0.9  # the cases are neither all wrong nor all harmless


@pytest.fixture(scope="module")
def keys_of_bases():
    """The options that each of the small configs has."""
    return [set(flat(to_container(load_config(TrainConfig, None, base)))) for base in BASES]


def flat(container, prefix=""):
    for name, value in container.items():
        key = f"{prefix}{name}"
        yield from flat(value, f"{key}.") if isinstance(value, dict) else (key,)


@pytest.mark.parametrize("chunk", range(4))
def test_an_option_at_its_limit_gives_objects_or_one_line(chunk, keys_of_bases):
    """Sizes at their largest meet what memory there is; nothing at a limit is refused by the schema itself."""
    for assignment in config_cases.limits(TrainConfig)[chunk::4]:
        base = next(base for base, keys in zip(BASES, keys_of_bases, strict=True) if assignment.key in keys)
        config = load_config(TrainConfig, None, [*base, assignment.override()])
        outcome(lambda c=config: build_training(c), f"{base} {assignment.override()}")


@pytest.mark.fuzz
@pytest.mark.parametrize("chunk", range(MORE_CASES // 100))
def test_more_configs(chunk, tmp_path):
    for seed in range(CASES + 100 * chunk, CASES + 100 * (chunk + 1)):
        try_config(seed, tmp_path)
