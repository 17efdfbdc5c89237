"""Every option in one place: what a config file and the command line may set, and how it is read, checked and saved.

A config is a typed dataclass: its defaults, then one YAML file, then ``key=value`` overrides. Options of a part of the
project are declared beside that part; the schemas here collect them.
"""

import dataclasses
import re
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from lit_parallel.data.options import DATA_OPTIONS, DataOptions
from lit_parallel.dense.options import DenseOptions
from lit_parallel.errors import UserError, did_you_mean, first_line
from lit_parallel.modules.options import MODEL_OPTIONS, MadeOptions, OptimizerOptions
from lit_parallel.options import (
    MAX_SEED,
    Group,
    check_options,
    describe_type,
    fields_of,
    format_value,
    group,
    join_key,
    option,
    option_keys,
)
from lit_parallel.recurrent.options import RecurrentOptions
from lit_parallel.sampling.options import InpaintOptions, SamplingOptions
from lit_parallel.solvers.options import SOLVER_NAMES, SolverOptions

Schema = TypeVar("Schema")

_MOST_BYTES = 1 << 20  # of a config file
_MOST_VALUES = 100_000  # in a config, as _extent counts them
_REFERENCE = re.compile(r"(\\*)\$\{")

BASELINE_NAMES = ("sequential", "cached_sequential")
WANDB_MODES = ("offline", "online", "disabled")
STAGES = ("train", "test")

_ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps", "tpu")
_PRECISIONS = (
    *("64", "64-true", "32", "32-true", "16", "16-true", "16-mixed", "bf16", "bf16-true", "bf16-mixed"),
    *("transformer-engine", "transformer-engine-float16"),
)
_PROFILERS = ("simple", "advanced", "pytorch")


@dataclass
class TrainerOptions:
    """The arguments of Lightning's Trainer that can be written in YAML, by the same names."""

    accelerator: str = option("auto", "the kind of device", choices=_ACCELERATORS)
    strategy: str = option("auto", "how processes work together, such as ddp")
    devices: int | str | list[int] = option(
        "auto", "how many devices, or which ([0, 1]); -1: all", minimum=-1, maximum=1024
    )
    num_nodes: int = option(1, "machines that work together", minimum=1, maximum=100_000)
    precision: str | None = option(None, "arithmetic of the network (null: 32-true)", choices=_PRECISIONS)
    fast_dev_run: int | bool = option(False, "try everything with so many batches (true: one) and stop", minimum=0)
    max_epochs: int | None = option(None, "epochs after which training stops (-1: never)", minimum=-1)
    min_epochs: int | None = option(None, "epochs before which training does not stop", minimum=0)
    max_steps: int = option(-1, "steps after which training stops (-1: never)", minimum=-1)
    min_steps: int | None = option(None, "steps before which training does not stop", minimum=0)
    max_time: str | dict[str, int] | None = option(None, "time after which training stops: 'DD:HH:MM:SS'")
    limit_train_batches: int | float | None = option(None, "training batches per epoch, or their part", minimum=0)
    limit_val_batches: int | float | None = option(None, "validation batches, or their part (5, 0.1)", minimum=0)
    limit_test_batches: int | float | None = option(None, "test batches, or their part (5, 0.1)", minimum=0)
    limit_predict_batches: int | float | None = option(None, "prediction batches, or their part", minimum=0)
    overfit_batches: int | float = option(0.0, "train on these few batches again and again, or a part", minimum=0)
    val_check_interval: int | float | str | dict[str, int] | None = option(
        None, "validate every so many batches, part of an epoch, or time", above=0
    )
    check_val_every_n_epoch: int | None = option(1, "validate every so many epochs", minimum=1)
    num_sanity_val_steps: int | None = option(None, "validation batches before training (null: 2; -1: all)", minimum=-1)
    log_every_n_steps: int | None = option(None, "steps between two logged values (null: 50)", minimum=0)
    enable_progress_bar: bool | None = option(None, "show a progress bar (null: yes)")
    enable_model_summary: bool | None = option(None, "print the layers before training (null: yes)")
    accumulate_grad_batches: int = option(1, "batches whose gradients are added up for one step", minimum=1)
    gradient_clip_val: int | float | None = option(None, "bound of the gradient (null: none)", minimum=0)
    gradient_clip_algorithm: str | None = option(None, "what is bounded (null: norm)", choices=("norm", "value"))
    deterministic: bool | Literal["warn"] | None = option(None, "refuse operations that are not reproducible")
    benchmark: bool | None = option(None, "let cuDNN try its algorithms and keep the fastest")
    inference_mode: bool = option(True, "evaluate in inference mode (false: only without gradients)")
    profiler: str | None = option(None, "measure where the time goes", choices=_PROFILERS)
    detect_anomaly: bool = option(False, "look for NaN in every backward pass (slow)")
    barebones: bool = option(False, "switch everything off that costs time, logging included")
    sync_batchnorm: bool = option(False, "share the statistics of batch norm between processes")
    reload_dataloaders_every_n_epochs: int = option(0, "make new data loaders every so many epochs", minimum=0)


@dataclass
class SampleGridOptions:
    """Samples drawn while training, logged with the iterations they took."""

    enabled: bool = option(True, "whether to sample while training")
    every_n_epochs: int = option(5, "epochs between two grids", minimum=1)
    num_samples: int = option(16, "images in the grid", minimum=1)


@dataclass
class EarlyStoppingOptions:
    """Stop when the validation loss no longer falls."""

    enabled: bool = option(False, "whether to stop early")
    patience: int = option(10, "validations without improvement before training stops", minimum=0)


@dataclass
class EmaOptions:
    """An exponential moving average of the weights, for validation and sampling."""

    enabled: bool = option(True, "whether to average the weights")
    decay: float = option(0.999, "part of the average that each step keeps", minimum=0, below=1)


@dataclass
class _JacobiBackpropSwitch:
    """A base of its own, so that it stands before the other options."""

    enabled: bool = option(False, "whether recurrent layers backpropagate in parallel over time")


@dataclass
class JacobiBackpropOptions(RecurrentOptions, _JacobiBackpropSwitch):
    """Backpropagation through recurrent layers, parallel in time."""


@dataclass
class _JacobiEvaluationSwitch:
    """A base of its own, so that it stands before the other options."""

    enabled: bool = option(False, "whether DenseNets are evaluated in parallel over their layers")


@dataclass
class JacobiEvaluationOptions(DenseOptions, _JacobiEvaluationSwitch):
    """Validation and test of DenseNets, parallel over the layers of a dense block."""


@dataclass
class CallbackOptions:
    """What is plugged into the Trainer."""

    sample_grid: SampleGridOptions = group(SampleGridOptions, "samples drawn while training")
    early_stopping: EarlyStoppingOptions = group(EarlyStoppingOptions, "stop when the validation loss stays")
    ema: EmaOptions = group(EmaOptions, "a moving average of the weights")
    jacobi_backprop: JacobiBackpropOptions = group(
        JacobiBackpropOptions, "parallel backpropagation of recurrent layers"
    )
    jacobi_evaluation: JacobiEvaluationOptions = group(JacobiEvaluationOptions, "parallel evaluation of DenseNets")


@dataclass
class WandbOptions:
    """Weights & Biases, which records metrics and pictures; offline needs no account."""

    mode: str = option("offline", "offline keeps the run on this machine; online uploads it", choices=WANDB_MODES)
    project: str = option("lit-parallel", "the project that the run belongs to", non_empty=True)
    entity: str | None = option(None, "the user or team that the run belongs to (null: your own)")
    name: str | None = option(None, "the name of the run (null: the name of its folder)")
    tags: list[str] = option([], "words to find the run by")


@dataclass
class CompareOptions:
    """What the solver is measured against, with the same noise on the same device."""

    baselines: list[str] = option(list(BASELINE_NAMES), "solvers to run as well", choices=BASELINE_NAMES)
    repeats: int = option(3, "timed runs of each solver, of which the median counts; fewer of slow ones", minimum=1)
    curves: bool = option(True, "draw convergence.png and strips.png: runs the solvers once more, seeing every iterate")
    curves_of: list[str] = option(
        ["jacobi", "sequential"], "solvers in these pictures beside the chosen one", choices=SOLVER_NAMES
    )


def _default_training() -> TrainerOptions:
    # Lightning's own 1000 epochs and 50 steps between values suit no data set of 45 batches; train.py prints the size.
    return TrainerOptions(max_epochs=50, log_every_n_steps=10, enable_model_summary=False)


@dataclass
class TrainConfig:
    """Everything that train.py can be told."""

    experiment: str = option("made_mnist5k", "names the folder of the run", non_empty=True)
    seed: int = option(0, "seed of weights, data order and noise", minimum=0, maximum=MAX_SEED)
    runs_folder: str = option("runs", "folder in which every run gets a folder of its own", non_empty=True)
    stage: str = option("train", "train a model, or test a checkpoint", choices=STAGES)
    checkpoint: str | None = option(None, "stage=test: what to test (null: the newest of this experiment)")
    # One of MODEL_OPTIONS, as model.name says.
    model: Any = group(MadeOptions, "the network", kinds=MODEL_OPTIONS)
    # One of DATA_OPTIONS, as data.name says.
    data: Any = group(DataOptions, "images, sequences of numbers, or a text", kinds=DATA_OPTIONS)
    optimizer: OptimizerOptions = group(OptimizerOptions, "AdamW or SGD, and the learning rate")
    compile: bool = option(False, "compile the network for training (torch.compile); the first steps take longer")
    solver: SolverOptions = group(SolverOptions, "how samples are drawn while training")
    sampling: SamplingOptions = group(SamplingOptions, "what is drawn while training: coupling, temperature")
    trainer: TrainerOptions = group(_default_training, "Lightning's Trainer: epochs, devices, precision")
    callbacks: CallbackOptions = group(
        CallbackOptions, "sample grid, early stopping, weight average, parallel backpropagation"
    )
    wandb: WandbOptions = group(WandbOptions, "Weights & Biases")


@dataclass
class SampleConfig:
    """Everything that sample.py can be told."""

    checkpoint: str | None = option(None, "checkpoint to sample from (null: the newest in runs_folder)")
    num_samples: int = option(64, "images to draw", minimum=1)
    batch_size: int = option(64, "images per batch", minimum=1)
    seed: int = option(0, "seed of the noise; image i is the same for every solver", minimum=0, maximum=MAX_SEED)
    runs_folder: str = option("runs", "folder that holds the runs", non_empty=True)
    output: str | None = option(
        None, "folder for the results; one of an earlier run is completed (null: a new one in the checkpoint's run)"
    )
    png: bool = option(False, "write every image as a PNG as well")
    solver: SolverOptions = group(SolverOptions, "how the samples are drawn, and when to stop")
    sampling: SamplingOptions = group(SamplingOptions, "what is drawn: coupling, temperature, class, arithmetic")
    inpaint: InpaintOptions = group(InpaintOptions, "pixels that are given")
    compare: CompareOptions = group(CompareOptions, "the baselines that are timed as well")
    trainer: TrainerOptions = group(TrainerOptions, "Lightning's Trainer: devices, precision")
    wandb: WandbOptions = group(WandbOptions, "Weights & Biases")


def load_config(schema: type[Schema], path: str | Path | None = None, overrides: Sequence[str] = ()) -> Schema:
    """Read a config: the schema's defaults, then a YAML file, then overrides.

    Args:
        schema: A dataclass of options, such as `TrainConfig`.
        path: A YAML file; without one, the defaults alone.
        overrides: Assignments such as ``"optimizer.lr=3e-4"`` or ``"model.hidden_sizes=[64, 64]"``; later ones win.

    Raises:
        UserError: The file cannot be read, or an option is unknown, of the wrong type, missing or out of range.
    """
    given = OmegaConf.create() if path is None else _read_yaml(Path(path))
    for override in overrides:
        _apply_override(given, override)
    return _from_container(schema, typing.cast(dict[str, Any], OmegaConf.to_container(given)))


def to_container(config: Any) -> dict[str, Any]:
    """Return a config as plain dicts, lists and values, such as a checkpoint can hold."""
    return dataclasses.asdict(config)


def from_container(schema: type[Schema], container: dict[str, Any]) -> Schema:
    """Return the config that plain dicts describe; what they leave out keeps its default.

    They are data, from a checkpoint for instance: a text such as ``${oc.env:HOME}`` in them stays that text.

    Raises:
        UserError: An option is unknown, of the wrong type, missing or out of range.
    """
    if _extent(container, _inside_container) > _MOST_VALUES:
        raise UserError("a config cannot hold so many values")
    return _from_container(schema, _literal(container))


def save_config(config: Any, path: str | Path) -> None:
    """Write a config as YAML that `load_config` reads back to an equal one."""
    OmegaConf.save(OmegaConf.create(_literal(to_container(config))), path)


def _from_container(schema: type[Schema], container: dict[str, Any]) -> Schema:
    typed = OmegaConf.structured(schema)
    _fill(typed, container, known=option_keys(schema()))
    try:
        config = OmegaConf.to_object(typed)
    except MissingMandatoryValue as error:
        raise UserError(f"Option '{error.full_key}' needs a value.") from error
    except OmegaConfBaseException as error:
        raise UserError(f"Cannot resolve option '{error.full_key}': {first_line(error)}.") from error
    check_options(config)
    return typing.cast(Schema, config)


def _literal(value: Any) -> Any:
    """The same values, with texts that OmegaConf would take for references escaped."""
    if isinstance(value, dict):
        return {name: _literal(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_literal(item) for item in value]
    return _REFERENCE.sub(r"\1\1\${", value) if isinstance(value, str) else value


def _extent(value: Any, inside: Callable[[Any], Iterable[Any]], known: dict[int, int] | None = None) -> int:
    """Values in a value, itself included, each level of nesting counted twice: a bound of their number and depth.

    A few lines of references to references can stand for billions.
    """
    known = {} if known is None else known
    if id(value) not in known:
        known[id(value)] = _MOST_VALUES  # until it is known: a value that holds itself is never small enough
        known[id(value)] = 1 + 2 * sum(_extent(item, inside, known) for item in inside(value))
    return known[id(value)]


def _inside_container(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list | tuple) else ()


def _inside_yaml(node: yaml.Node | None) -> Iterable[Any]:
    if isinstance(node, yaml.MappingNode):
        return (part for pair in node.value for part in pair)
    return node.value if isinstance(node, yaml.SequenceNode) else ()


def _compose(text: str) -> yaml.Node | None:
    """The structure of a YAML text, which is no larger and no deeper than a config can be.

    Raises:
        yaml.YAMLError: If it is not valid.
    """
    try:
        node = yaml.compose(text)
        if _extent(node, _inside_yaml) <= _MOST_VALUES:
            return node
    except RecursionError:
        pass
    raise yaml.YAMLError("it holds more than a config can")


def _read_yaml(path: Path) -> DictConfig:
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        text = content.decode("utf-8")
    except FileNotFoundError:
        found = [file.name for pattern in ("*.yaml", "*.yml") for file in path.parent.glob(pattern)]
        known = [name for name in found if not name.startswith(".")]
        raise UserError(f"There is no config file '{path}'.{did_you_mean(path.name, known)}") from None
    except OSError as error:
        raise UserError(f"Cannot read the config file '{path}': {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"The config file '{path}' is not a text file.") from error
    if len(content) > _MOST_BYTES:
        raise UserError(f"The config file '{path}' is larger than {_MOST_BYTES:,} bytes: that is no config.")
    try:
        node = _compose(text)
        if node is None or isinstance(node, yaml.MappingNode):
            return typing.cast(DictConfig, OmegaConf.create(text))
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"The config file '{path}'{line}, is not valid YAML: {error.problem}.") from error
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise UserError(f"Cannot read the config file '{path}': {first_line(error)}.") from error
    raise UserError(f"The config file '{path}' must hold 'key: value' lines at its top level, not a list or a text.")


def _apply_override(given: DictConfig, override: str) -> None:
    key, equals, value = (part.strip() for part in override.partition("="))
    if not (key and equals):
        raise UserError(f"'{override}' is not of the form key=value, such as seed=7 (without spaces around '=').")
    if not value:
        raise UserError(f"The override '{override}' has no value. Write '{key}=null' for none, \"{key}=''\" for empty.")
    try:
        _compose(value)
        given.merge_with_dotlist([override])
    except yaml.MarkedYAMLError as error:
        raise UserError(f"Cannot read the value of the override '{override}': {error.problem}.") from error
    except (yaml.YAMLError, OmegaConfBaseException, TypeError, ValueError, IndexError) as error:
        raise UserError(f"Cannot read the override '{override}': {first_line(error)}.") from error


def _fill(typed: DictConfig, given: dict[Any, Any], known: list[str], prefix: str = "") -> None:
    """Assign plain values to a structured config, one option at a time, so that an error knows its full key."""
    schema = typing.cast(type, OmegaConf.get_type(typed))
    specs, hints = fields_of(schema), typing.get_type_hints(schema)
    for name, value in given.items():
        key = join_key(prefix, name)
        spec = specs.get(name)
        if spec is None and key in known:  # of another kind, such as another model
            raise UserError(
                f"Option '{key}' does not belong to {prefix}.name={typed['name']}: leave it out, or start from another "
                "file in configs/."
            )
        if spec is None:
            raise UserError(f"Unknown option '{key}'.{_suggest(str(name), list(specs), known)}")
        if isinstance(spec, Group):
            if not isinstance(value, dict):
                example = f"{key}.{next(iter(fields_of(OmegaConf.get_type(typed[name]))))}=..."
                raise UserError(
                    f"'{key}' is a group of options and cannot be {format_value(value)}. "
                    f"Set one of its options, such as {example}"
                )
            if spec.kinds and "name" in value:
                typed[name] = _choose_kind(spec.kinds, value["name"], f"{key}.name")
            _fill(typed[name], value, known, key)
        else:
            try:
                OmegaConf.update(typed, name, value, merge=False)
            except (OmegaConfBaseException, TypeError) as error:
                wanted = describe_type(hints[name])
                raise UserError(f"Option '{key}' must be of type {wanted}, not {format_value(value)}.") from error


def _choose_kind(kinds: typing.Mapping[str, type], name: Any, key: str) -> type:
    if name not in tuple(kinds):
        raise UserError(f"Option '{key}' cannot be {format_value(name)}.{did_you_mean(str(name), kinds)}")
    return kinds[name]


def _suggest(name: str, siblings: list[str], known: list[str]) -> str:
    """Suggest the same name in another group, or else the nearest name in this one."""
    elsewhere = [repr(key) for key in known if key.rpartition(".")[2] == name]
    return f" Did you mean {' or '.join(elsewhere)}?" if elsewhere else did_you_mean(name, siblings)
