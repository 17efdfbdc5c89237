import dataclasses
import inspect
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from pytorch_lightning import Trainer

from lit_parallel.config import (
    SampleConfig,
    TrainConfig,
    TrainerOptions,
    from_container,
    load_config,
    save_config,
    to_container,
)
from lit_parallel.errors import UserError
from lit_parallel.modules.options import MODEL_OPTIONS, MadeOptions
from lit_parallel.options import check_options, iterate_groups, option

CONFIGS = Path(__file__).parents[1] / "configs"

# Set by train.py and sample.py themselves, or meaningful only as Python objects.
LEFT_OUT = {
    *("logger", "callbacks", "plugins", "default_root_dir", "enable_checkpointing"),
    *("use_distributed_sampler", "enable_autolog_hparams", "model_registry"),
}


def refusal(*overrides: str, schema: type = TrainConfig, path: Path | None = None) -> str:
    """Return the one line with which a config is refused."""
    with pytest.raises(UserError) as caught:
        load_config(schema, path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_config_loads_and_names_itself(path):
    assert load_config(TrainConfig, path).experiment == path.stem


def test_default_config_is_the_default_of_the_schema():
    assert load_config(TrainConfig, CONFIGS / "made_mnist5k.yaml") == load_config(TrainConfig) == TrainConfig()


def test_shipped_colour_configs_use_the_papers_squeeze():
    for name in ("made_cifar10", "made_photos32"):
        assert load_config(TrainConfig, CONFIGS / f"{name}.yaml").model.logit_lambda == 0.05


@pytest.mark.parametrize("schema", [TrainConfig, SampleConfig])
def test_defaults_satisfy_their_own_choices_and_limits(schema):
    check_options(schema())


@pytest.mark.parametrize("schema", [TrainConfig, SampleConfig])
def test_every_option_is_explained_in_one_line(schema):
    for key, member in iterate_groups(schema()):
        for item in dataclasses.fields(member):
            text = item.metadata["spec"].help
            assert text, f"{key}.{item.name}"
            assert "\n" not in text, f"{key}.{item.name}"


def test_trainer_options_are_the_trainers_own():
    parameters = inspect.signature(Trainer.__init__).parameters
    schema = {item.name: item.default for item in dataclasses.fields(TrainerOptions)}
    assert schema.keys() == parameters.keys() - LEFT_OUT - {"self"}
    for name, default in schema.items():
        assert default == parameters[name].default, name


def test_trainer_options_reach_the_trainer():
    config = load_config(
        TrainConfig, None, ["trainer.limit_train_batches=5", "trainer.precision=64", "trainer.devices=1"]
    )
    options = dataclasses.asdict(config.trainer) | {"accelerator": "cpu", "enable_model_summary": False}
    trainer = Trainer(**options, logger=False, enable_checkpointing=False)
    assert (trainer.limit_train_batches, trainer.precision, trainer.max_epochs) == (5, "64-true", 50)


def test_later_sources_win(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("seed: 1\noptimizer: {lr: 0.5}\n")
    config = load_config(TrainConfig, file, ["seed=2", "seed=3", "model.hidden_sizes=[8, 9]", "data.folder='a b'"])
    assert (config.seed, config.optimizer.lr, config.model.hidden_sizes, config.data.folder) == (3, 0.5, [8, 9], "a b")
    assert config.optimizer.beta1 == TrainConfig().optimizer.beta1
    assert isinstance(config.model, MadeOptions)


def test_override_reaches_into_a_list_of_the_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("model: {hidden_sizes: [1, 2]}\n")
    assert load_config(TrainConfig, file, ["model.hidden_sizes[1]=7"]).model.hidden_sizes == [1, 7]


def test_empty_file_means_defaults(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    assert load_config(TrainConfig, tmp_path / "empty.yaml") == TrainConfig()


def test_references_are_resolved():
    assert load_config(TrainConfig, None, ["seed=7", "model.mask_seed=${seed}"]).model.mask_seed == 7


AWKWARD = [
    *("wandb.name='1e-3'", "wandb.project='null'", "wandb.tags=['true', 'a: b', '#', 'é', '']", "data.folder='x  y'"),
    *("trainer.precision=32", "trainer.devices=[0, 1]", "trainer.max_time={hours: 1}", "trainer.limit_val_batches=1.0"),
    *("trainer.limit_train_batches=1", "trainer.deterministic=warn", "optimizer.weight_decay=0", "optimizer.lr=1e-12"),
]


def test_save_and_load_round_trip(tmp_path):
    config = load_config(TrainConfig, None, AWKWARD)
    assert config.wandb.tags == ["true", "a: b", "#", "é", ""]
    save_config(config, tmp_path / "config.yaml")
    loaded = load_config(TrainConfig, tmp_path / "config.yaml")
    assert loaded == config
    # 1 batch and the whole of them are equal as numbers, but not to the Trainer.
    assert (type(loaded.trainer.limit_train_batches), type(loaded.trainer.limit_val_batches)) == (int, float)


def test_container_survives_a_checkpoint(tmp_path):
    config = load_config(TrainConfig, None, AWKWARD)
    torch.save({"config": to_container(config)}, tmp_path / "last.ckpt")
    container = torch.load(tmp_path / "last.ckpt", weights_only=True)["config"]
    assert from_container(TrainConfig, container) == config


def test_container_of_another_version_is_refused():
    with pytest.raises(UserError, match=r"Unknown option 'optimizer\.dampening'"):
        from_container(TrainConfig, {"optimizer": {"dampening": 0.9}})


def test_instances_share_nothing():
    first, second = load_config(TrainConfig), load_config(TrainConfig)
    first.model.hidden_sizes.append(1)
    assert second.model.hidden_sizes == TrainConfig().model.hidden_sizes == [512, 512]


@dataclass
class OtherModelOptions:
    """Another model."""

    name: str = option("other", "the kind of model")
    filters: int = option(160, "channels", minimum=1)


@pytest.fixture
def two_models(monkeypatch):
    monkeypatch.setitem(MODEL_OPTIONS, "other", OtherModelOptions)


@pytest.mark.usefixtures("two_models")
def test_model_name_chooses_the_dataclass(tmp_path):
    config = load_config(TrainConfig, None, ["model.filters=3", "model.name=other"])
    assert config.model == OtherModelOptions(filters=3)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(TrainConfig, tmp_path / "config.yaml") == config
    assert from_container(TrainConfig, to_container(config)) == config
    assert "'model.filters' must be >= 1" in refusal("model.name=other", "model.filters=0")
    other = "Option 'model.hidden_sizes' does not belong to model.name=other"
    assert other in refusal("model.name=other", "model.hidden_sizes=[1]")
    assert "Option 'model.filters' does not belong to model.name=made" in refusal("model.filters=3")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        # unknown
        ("optimizer.lrr=3", "Unknown option 'optimizer.lrr'. Did you mean 'lr'?"),
        ("optimiser.lr=3", "Unknown option 'optimiser'. Did you mean 'optimizer'?"),
        ("lr=3", "Unknown option 'lr'. Did you mean 'optimizer.lr'?"),
        ("callbacks.ema.decai=0", "Unknown option 'callbacks.ema.decai'. Did you mean 'decay'?"),
        # type
        ("seed=1.5", "Option 'seed' must be of type integer, not 1.5."),
        ("seed=true", "Option 'seed' must be of type integer, not true."),
        ("seed=null", "Option 'seed' must be of type integer, not null."),
        ("seed.x=1", "Option 'seed' must be of type integer, not {\"x\": 1}."),
        ("optimizer.lr=fast", "Option 'optimizer.lr' must be of type number, not 'fast'."),
        ("model.hidden_sizes=3", "Option 'model.hidden_sizes' must be of type list of integers, not 3."),
        ("model.hidden_sizes=[1,x]", 'must be of type list of integers, not [1, "x"].'),
        ("trainer.devices=0.5", "must be of type integer, text or list of integers, not 0.5."),
        ("trainer.deterministic=maybe", "must be of type true/false, 'warn' or null, not 'maybe'."),
        ("wandb.tags=null", "must be of type list of texts, not null."),
        # groups
        ("model=3", "'model' is a group of options and cannot be 3. Set one of its options, such as model.name=..."),
        ("model=null", "'model' is a group of options and cannot be null."),
        ("callbacks.ema=false", "'callbacks.ema' is a group of options and cannot be false."),
        ("callbacks.jacobi_backprop=true", "Set one of its options, such as callbacks.jacobi_backprop.enabled=..."),
        # choices
        ("model.name=mode", "Option 'model.name' cannot be 'mode'. Did you mean 'made'?"),
        ("model.name=[made]", "Option 'model.name' cannot be [\"made\"]."),
        ("data.name=mnist5", "Option 'data.name' cannot be 'mnist5'. Did you mean 'mnist5k'?"),
        (
            "callbacks.jacobi_backprop.solver=jakobi",
            "jacobi_backprop.solver' cannot be 'jakobi'. Did you mean 'jacobi'?",
        ),
        ("solver.name=jakobi", "Option 'solver.name' cannot be 'jakobi'. Did you mean 'jacobi'?"),
        ("trainer.precision=33", "Option 'trainer.precision' cannot be '33'."),
        # ranges
        ("seed=-1", "Option 'seed' must be from 0 to 4294967295, not -1."),
        ("seed=4294967296", "Option 'seed' must be from 0 to 4294967295"),
        ("data.batch_size=0", "Option 'data.batch_size' must be >= 1, not 0."),
        ("data.validation_fraction=0.51", "Option 'data.validation_fraction' must be from 0 to 0.5, not 0.51."),
        ("solver.absolute_tolerance=-1e-9", "Option 'solver.absolute_tolerance' must be >= 0, not -1e-09."),
        ("optimizer.beta1=1", "Option 'optimizer.beta1' must be >= 0 and < 1, not 1.0."),
        ("model.logit_lambda=0", "Option 'model.logit_lambda' must be > 0 and < 0.5, not 0.0."),
        ("optimizer.lr=nan", "Option 'optimizer.lr' must be a finite number, not nan."),
        ("optimizer.lr=.inf", "Option 'optimizer.lr' must be a finite number, not inf."),
        ("model.hidden_sizes=[]", "Option 'model.hidden_sizes' must not be empty."),
        ("model.hidden_sizes=[3,0]", "Option 'model.hidden_sizes[1]' must be from 1 to 1048576, not 0."),
        ("experiment=''", "Option 'experiment' must not be empty."),
        ("trainer.limit_train_batches=-1", "Option 'trainer.limit_train_batches' must be >= 0, not -1."),
        # form
        ("seed", "'seed' is not of the form key=value"),
        ("=3", "'=3' is not of the form key=value"),
        ("seed=", "The override 'seed=' has no value. Write 'seed=null' for none"),
        ("seed=[", "Cannot read the value of the override 'seed=['"),
        ("seed=${", "Cannot read the override 'seed=${'"),
        # values that are not there
        ("seed=???", "Option 'seed' needs a value."),
        ("seed=${nowhere}", "Cannot resolve option 'seed': Interpolation key 'nowhere' not found."),
        ("seed=${optimizer.lr}", "Cannot resolve option 'seed': "),
        ("data.folder=${oc.env:NO_SUCH_VARIABLE}", "Cannot resolve option 'data.folder': "),
    ],
)
def test_mistake_is_told_in_one_line(override, message):
    assert message in refusal(override)


def test_choices_hold_for_the_items_of_a_list():
    assert load_config(SampleConfig, None, ["compare.baselines=[sequential]"]).compare.baselines == ["sequential"]
    assert load_config(SampleConfig, None, ["compare.baselines=[]"]).compare.baselines == []
    message = refusal("compare.baselines=[sequential,cached]", schema=SampleConfig)
    assert message.startswith("Option 'compare.baselines[1]' cannot be 'cached'.")


@pytest.mark.parametrize(
    "override", ["data.validation_fraction=0.5", "data.validation_fraction=0", "optimizer.beta1=0", "seed=4294967295"]
)
def test_ends_of_a_range_are_allowed(override):
    load_config(TrainConfig, None, [override])


def test_missing_file_names_the_near_one(tmp_path):
    (tmp_path / "made_cifar10.yaml").touch()
    message = refusal(path=tmp_path / "made_cifar.yaml")
    assert "There is no config file" in message
    assert message.endswith("Did you mean 'made_cifar10.yaml'?")
    assert "There is no config file" in refusal(path=tmp_path / "nowhere" / "made.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"seed: 1\nmodel: [1\nx: 2\n", ", line 3, is not valid YAML"),
        (b"seed: 1\nseed: 2\n", ", line 2, is not valid YAML: found duplicate key seed."),
        (b"seed: 1\n\tmodel: 2\n", ", line 2, is not valid YAML"),
        (b"- seed\n- 1\n", "must hold 'key: value' lines at its top level"),
        (b"seed:1\n", "must hold 'key: value' lines at its top level"),
        (b"PK\x03\x04\xff\xfe", "is not a text file"),
        (b"seed: \x00\n", "Cannot read the config file"),
        (b"seed: ${\n", "Cannot read the config file"),
        (b"3: 4\n", "Unknown option '3'."),
    ],
)
def test_unreadable_file_is_told_in_one_line(tmp_path, content, message):
    file = tmp_path / "mine.yaml"
    file.write_bytes(content)
    line = refusal(path=file)
    assert message in line
    if content != b"3: 4\n":
        assert str(file) in line


def test_folder_as_config_file(tmp_path):
    assert "Cannot read the config file" in refusal(path=tmp_path)


def test_an_option_of_another_model_says_so():
    with pytest.raises(UserError, match=r"'model\.hidden_sizes' does not belong to model\.name=pixelcnnpp: leave it"):
        load_config(
            TrainConfig, Path(__file__).parent.parent / "configs" / "made_mnist5k.yaml", ["model.name=pixelcnnpp"]
        )
