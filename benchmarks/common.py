"""What the benchmarks share: a model that was trained here or loaded."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from lit_parallel.checkpoint import load, saved_config
from lit_parallel.config import TrainConfig, load_config
from lit_parallel.modules.autoregressive import AutoregressiveModule
from train import train

CONFIGS = Path(__file__).parent.parent / "configs"


def trained(
    config: str, overrides: list[str], checkpoint: Path | None, runs_folder: Path | None
) -> tuple[AutoregressiveModule, dict[str, Any]]:
    """A model trained here, or loaded, and facts about it for the report."""
    if checkpoint is not None:
        model = load(checkpoint)
        return model, {"checkpoint": checkpoint.name, "experiment": saved_config(model).experiment}
    with tempfile.TemporaryDirectory() as folder:
        quiet = [
            f"runs_folder={runs_folder or folder}",
            "wandb.mode=disabled",
            "callbacks.sample_grid.enabled=false",
            "trainer.enable_progress_bar=false",
            "trainer.enable_model_summary=false",
        ]
        result = train(load_config(TrainConfig, CONFIGS / config, [*quiet, *overrides]))
        assert result.checkpoint is not None
        return load(result.checkpoint), {"config": config, "overrides": overrides, **result.metrics}
