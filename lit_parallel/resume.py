"""Training that goes on in the folder of a run that was interrupted."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_parallel.checkpoint import load, saved_config
from lit_parallel.config import TrainConfig, load_config, to_container
from lit_parallel.errors import UserError
from lit_parallel.options import format_value, join_key
from lit_parallel.runs import RunState, short_path
from lit_parallel.weights_file import read

LIMITS = (
    *("trainer.max_epochs", "trainer.max_steps", "trainer.max_time"),
    "callbacks.early_stopping.patience",
)
"""The options that say when training ends."""

MAY_CHANGE = (
    *LIMITS,
    *("trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy"),
    *("trainer.accumulate_grad_batches", "trainer.enable_progress_bar"),
    *("data.folder", "data.download", "data.num_workers"),
    "wandb.mode",
)
"""The options that may change when training goes on: those of the machine and those that say when it ends."""

_NEEDED = ("callbacks", "loops", "lr_schedulers", "optimizer_states", "epoch", "global_step")


class InterruptedRun:
    """A run folder whose training can go on at its ``checkpoints/last.ckpt``.

    Args:
        path: The run folder, or its ``last.ckpt``.

    Attributes:
        folder: The run folder.
        checkpoint: Its ``last.ckpt``.
        state: What the run remembers.

    Raises:
        UserError: If that is no run folder, or no epoch of it was finished.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        if path.suffix == ".ckpt" and path.name != "last.ckpt":
            raise UserError(
                f"training goes on where it stopped, at last.ckpt, and '{path}' is something else: name the run folder."
            )
        self.folder = path.parent.parent if path.suffix == ".ckpt" else path
        self.checkpoint = self.folder / "checkpoints" / "last.ckpt"
        self._config_file = self.folder / "config.yaml"
        if not self.folder.is_dir():
            raise UserError(f"There is no run folder '{self.folder}'.")
        if not self._config_file.is_file():
            raise UserError(
                f"'{self.folder}' is not the folder of a training run: it holds no config.yaml. Name one, such as "
                "runs/<experiment>/<time>."
            )
        if not self.checkpoint.is_file():
            raise UserError(
                f"'{self.folder}' holds no checkpoints/last.ckpt, since no epoch was finished: start anew, with "
                f"--config {self._config_file}."
            )
        self.state = RunState.read(self.folder)

    def config(self, overrides: Sequence[str] = ()) -> TrainConfig:
        """The config that the run goes on with.

        Args:
            overrides: Assignments, of :data:`MAY_CHANGE` only.

        Raises:
            UserError: If they change anything else, or the run was tested only.
        """
        before, config = (load_config(TrainConfig, self._config_file, given) for given in ((), overrides))
        if before.stage != "train":
            raise UserError(f"'{self.folder}' is the folder of a test: there is no training to go on with.")
        changed = _differences(before, config)
        if refused := [key for key in changed if key not in MAY_CHANGE]:
            raise UserError(
                f"'{refused[0]}' cannot change when training goes on, {', '.join(MAY_CHANGE)} can: leave it out, or "
                "start a new run."
            )
        if self.state.finished and not any(key in LIMITS for key in changed):
            raise UserError(
                f"the training in '{self.folder}' is finished, there is nothing to go on with: sample its "
                f"checkpoint, or let it train for longer (trainer.max_epochs=...)."
            )
        return config

    def check(self, config: TrainConfig, sample_shape: tuple[int, ...]) -> dict[str, Any]:
        """Look whether the checkpoint can be gone on from, with these data.

        Returns:
            Its content.

        Raises:
            UserError: If it is damaged, holds weights alone, is of another run or other data, or beyond the end.
        """
        model = load(self.checkpoint)
        other = [key for key in _differences(saved_config(model), config) if key not in MAY_CHANGE]
        if other:
            raise UserError(
                f"'{self.checkpoint}' is not of the run that '{self._config_file}' describes ('{other[0]}' differs): "
                "put the files of one run together again."
            )
        shapes = [format_value(list(shape)) for shape in (model.hparams["sample_shape"], sample_shape)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"'{self.checkpoint}' was trained on samples of {shapes[0]}, and the data have {shapes[1]}: set "
                "data.folder to the data that it was trained on."
            )
        content = read(self.checkpoint)
        if missing := [name for name in _NEEDED if name not in content]:
            raise UserError(
                f"'{self.checkpoint}' holds weights to sample from, and nothing to go on with ('{missing[0]}' is "
                "missing)."
            )
        self._refuse_an_end_in_the_past(config, content)
        return content

    def _refuse_an_end_in_the_past(self, config: TrainConfig, content: dict[str, Any]) -> None:
        for name, reached in (("max_epochs", content["epoch"] + 1), ("max_steps", content["global_step"])):
            end = getattr(config.trainer, name)
            if end not in (None, -1) and end < reached:
                raise UserError(
                    f"the training in '{self.folder}' is beyond trainer.{name}={end}: set trainer.{name}={reached} or "
                    "more."
                )


def how_to_resume(folder: Path) -> str:
    """What to type after an interruption."""
    if (folder / "checkpoints" / "last.ckpt").is_file():
        return f"go on with: python train.py --resume {shlex.quote(str(short_path(folder)))}"
    return "no epoch was finished: start again"


def _differences(first: Any, second: Any) -> list[str]:
    """The keys of the options in which two configs differ."""
    one, other = (_flat(to_container(config)) for config in (first, second))
    return [key for key in {**one, **other} if key not in one or key not in other or one[key] != other[key]]


def _flat(container: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in container.items():
        key = join_key(prefix, name)
        # trainer.max_time and such are values, not groups.
        values |= _flat(value, key) if isinstance(value, dict) and not prefix.startswith("trainer") else {key: value}
    return values
