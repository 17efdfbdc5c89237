"""PixelCNN++ through the two commands: train, sample, inpaint, and what is left behind."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import lit_parallel
from lit_parallel.config import SampleConfig, TrainConfig, load_config
from lit_parallel.data.datasets import build_data
from lit_parallel.errors import UserError
from lit_parallel.modules.pixelcnnpp import PixelCNNppModule
from sample import sample
from train import DEFAULT_CONFIG, train

CONFIGS = Path(__file__).parent.parent / "configs"
CONFIG = CONFIGS / "pixelcnnpp_mnist5k.yaml"

pytestmark = [
    # Lightning and wandb open files that the interpreter closes at exit; what they deprecate is theirs.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]

CPU = ["trainer.accelerator=cpu", "trainer.devices=1", "trainer.enable_progress_bar=false"]
QUICK = [
    *CPU,
    "model.filters=4",
    "model.num_classes=10",
    "model.mixtures=2",
    "model.initial_images=16",
    "trainer.max_epochs=2",
    "trainer.limit_train_batches=4",
    "trainer.log_every_n_steps=2",
    "trainer.limit_val_batches=1",
    "trainer.limit_test_batches=1",
    "callbacks.sample_grid.every_n_epochs=2",
    "callbacks.sample_grid.num_samples=2",
]
FAST = [*CPU, "wandb.mode=disabled", "compare.baselines=[]", "compare.repeats=1", "compare.curves=false"]


def run_train(runs: Path, *overrides: str, config: Path = CONFIG):
    return train(load_config(TrainConfig, config, [f"runs_folder={runs}", *QUICK, *overrides]))


def run_sample(checkpoint: Path, *overrides: str):
    return sample(load_config(SampleConfig, overrides=[*FAST, f"checkpoint={checkpoint}", *overrides]))


def logged_keys(folder: Path, job_type: str) -> dict[str, list]:
    """Every key of the offline W&B run of this kind, with its values."""
    wandb = Path(sys.executable).with_name("wandb")
    for log in folder.glob("wandb/offline-run-*/run-*.wandb"):
        done = subprocess.run([wandb, "leet", "inspect", "--json", log], capture_output=True, text=True, check=True)
        records = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if any(record.get("run", {}).get("job_type") == job_type for record in records):
            values: dict[str, list] = {}
            for record in records:
                for key, value in record.get("history", {}).get("item", {}).items():
                    values.setdefault(key, []).append(value)
            return values
    raise AssertionError(f"no W&B run of the kind {job_type} in {folder}")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_train(tmp_path_factory.mktemp("runs"), "sampling.label=7", "sampling.coupling=inverse_cdf")


@pytest.fixture
def checkpoint(run, tmp_path):
    """A copy of the checkpoint, in a run folder of its own."""
    folder = tmp_path / "pixelcnnpp_mnist5k" / "run" / "checkpoints"
    folder.mkdir(parents=True)
    return Path(shutil.copy(run.checkpoint, folder / "last.ckpt"))


def test_configs_load():
    paths = sorted(CONFIGS.glob("pixelcnnpp_*.yaml"))
    assert CONFIG in paths
    for path in paths:
        config = load_config(TrainConfig, path)
        assert config.model.name == "pixelcnnpp"
        assert config.experiment == path.stem
        assert config.trainer.gradient_clip_val is not None
        channels, height, width = build_data(config.data, config.seed).image_shape
        assert channels in (1, 3)
        assert height % 4 == width % 4 == 0


# -- training ------------------------------------------------------------------------------------------------------


def test_training_leaves_sample_grids_checkpoints_and_records(run):
    assert run.folder.parent.name == "pixelcnnpp_mnist5k"
    assert {"train/bits_per_dim", "val/bits_per_dim", "test/bits_per_dim"} <= run.metrics.keys()
    assert all(0 < run.metrics[name] < 12 for name in ("val/bits_per_dim", "test/bits_per_dim"))
    assert {path.name for path in (run.folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert [path.name for path in (run.folder / "sample_grids").iterdir()] == ["epoch-0001.png"]
    values = logged_keys(run.folder, "train")
    assert {"val/bits_per_dim", "sample_grid/iterations_mean", "sample_grid/iteration_speedup"} <= values.keys()
    assert 1 < values["sample_grid/iterations_mean"][0] < 784
    assert any(key.startswith("sample_grid/images") for key in values)


def test_the_grid_is_drawn_as_the_options_say(run, tmp_path, monkeypatch):
    """With the same options and the weights of that epoch, sampling gives the picture in the grid."""
    from callbacks import sample_grid

    drawn = []
    monkeypatch.setattr(sample_grid, "save_image_grid", lambda images, path: drawn.append(images))
    options = ["sampling.label=7", "sampling.coupling=inverse_cdf", "solver.name=jacobi", "wandb.mode=disabled"]
    again = run_train(tmp_path, *options, "callbacks.ema.enabled=false")
    expected = run_sample(again.checkpoint, *options[:3], "num_samples=2")
    assert torch.equal(drawn[0], expected.images)


def test_the_checkpoint_alone_is_enough(run):
    model = lit_parallel.load(run.checkpoint)
    assert isinstance(model, PixelCNNppModule)
    assert bool(model.initialised)
    assert model.num_classes == 10
    images, solution = lit_parallel.sample(model, 2, solver="jacobi", seed=7)
    assert images.shape == (2, 1, 28, 28)
    assert solution.certified.all()


# -- sampling ------------------------------------------------------------------------------------------------------


def test_sampling_leaves_report_pictures_and_records(checkpoint, capsys):
    results = run_sample(
        checkpoint,
        "num_samples=3",
        "batch_size=2",
        "solver.name=jacobi",
        "sampling.temperature=0.9",
        "sampling.label=3",
        "compare.curves=true",
        "compare.baselines=[sequential, cached_sequential]",
        "wandb.mode=offline",
    )
    folder = checkpoint.parent.parent
    report = json.loads((folder / "report.json").read_text())
    assert report["certified"] is True
    assert report["solution"]["status"] == {"converged": 3}
    assert report["solution"]["equations"] == 784
    assert all(2 < iterations < 784 for iterations in results.solution.iterations)
    assert report["config"]["sampling"] == {"coupling": None, "temperature": 0.9, "label": 3, "precision": "full"}
    rows = report["comparison"]["rows"]
    assert [row["solver"] for row in rows] == ["jacobi", "sequential", "cached_sequential"]
    assert rows[0]["speedup_over_cached_sequential"] > 0
    assert rows[0]["bitwise_equal_to_sequential"] is True
    assert "2 images of 784 equations each" in report["comparison"]["what"]
    for name in ("samples", "iterations", "strips", "convergence"):
        assert min(Image.open(folder / f"{name}.png").size) > 28
    assert (results.measurements[0].pixel_map > 0).any()
    assert int(results.measurements[0].pixel_map.max()) <= int(results.solution.iterations.max())
    printed = capsys.readouterr().out
    assert "not compared" not in printed
    for name in ("samples.png", "iterations.png", "strips.png", "convergence.png", "report.json"):
        assert name in printed
    values = logged_keys(folder, "sample")
    for name in ("samples", "iterations", "strips", "convergence"):
        assert values[f"{name}._type"] == ["image-file"] or any(key.startswith(f"{name}.") for key in values)
    assert values["solver/iterations_max"] == [report["solution"]["iterations_max"]]


@pytest.mark.parametrize("options", [["coupling=paper", "temperature=1.2"], ["precision=bf16"]])
def test_options_reach_the_sampler_and_solvers_agree(checkpoint, options):
    overrides = ["num_samples=2", "seed=5", *[f"sampling.{option}" for option in options]]
    jacobi = run_sample(checkpoint, *overrides, "solver.name=jacobi")
    windowed = run_sample(checkpoint, *overrides, "solver.name=gs_jacobi", "solver.window=100")
    assert torch.equal(jacobi.images, windowed.images)
    plain = run_sample(checkpoint, "num_samples=2", "seed=5", "solver.name=jacobi")
    assert not torch.equal(jacobi.images, plain.images)
    assert ("bf16 network" in jacobi.report["comparison"]["what"]) == ("precision=bf16" in options)


def test_inpainting_keeps_what_is_given(checkpoint, tmp_path):
    overrides = ["num_samples=3", "batch_size=2", "solver.name=jacobi"]
    results = run_sample(checkpoint, *overrides, "inpaint.images=test", "inpaint.given=left")
    data = build_data(load_config(TrainConfig, CONFIG).data, 0)
    test_images = data.test_images()
    assert torch.equal(results.images[..., :14], test_images[:3, :, :, :14])
    assert not torch.equal(results.images[..., 14:], test_images[:3, :, :, 14:])
    assert results.report["certified"] is True
    pixel_map = results.measurements[0].pixel_map
    assert (pixel_map[..., :14] == 0).all()
    assert (pixel_map[..., 14:] > 0).any()

    Image.fromarray(test_images[5, 0].numpy()).save(tmp_path / "digit.png")
    mask = np.zeros((28, 28), dtype=np.uint8)
    mask[10:, ::2] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    picture = [f"inpaint.images={tmp_path / 'digit.png'}", f"inpaint.given={tmp_path / 'mask.png'}"]
    results = run_sample(checkpoint, *overrides, *picture)
    assert torch.equal(results.images[:, :, 10:, ::2], test_images[5, :, 10:, ::2].expand(3, -1, -1, -1))
    assert len({image.numpy().tobytes() for image in results.images}) == 3


# -- mistakes: one line, and nothing is written ----------------------------------------------------------------------


def everything(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sampling.label=10"], "there is no class 10 to draw (sampling.label): it knows 0 to 9."),
        (["inpaint.images=lost.png"], "inpaint.images: there is no file 'lost.png'"),
        (["inpaint.images=test", "inpaint.given=lefft"], "Did you mean 'left'?"),
        (["inpaint.given=left"], "inpaint.given=left needs images"),
        (["solver.name=jacobi", "solver.window=8"], "solver.window belongs to gs_jacobi"),
        (["trainer.precision=bf16-true"], "set sampling.precision=bf16, which keeps the levels exact."),
    ],
)
def test_mistakes_in_sampling(checkpoint, tmp_path, overrides, message):
    before = everything(tmp_path)
    with pytest.raises(UserError) as error:
        run_sample(checkpoint, *overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sampling.label=10"], "there is no class 10 to draw (sampling.label): it knows 0 to 9."),
        (["model.num_classes=null", "sampling.label=1"], "the model is not class-conditional."),
        (["model.num_classes=5"], "the data have 10 classes: set model.num_classes=10, not 5."),
    ],
)
def test_mistakes_in_training(tmp_path, overrides, message):
    with pytest.raises(UserError) as error:
        run_train(tmp_path, *overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert everything(tmp_path) == set()


def test_a_made_does_not_know_what_a_pixelcnnpp_knows(tmp_path):
    options = ["model.hidden_sizes=[8]", *[option for option in QUICK if not option.startswith("model.")]]

    def config(*overrides):
        return load_config(TrainConfig, DEFAULT_CONFIG, [f"runs_folder={tmp_path}", *options, *overrides])

    for override, message in (
        ("sampling.coupling=gumbel", "Logistic has no coupling 'gumbel' (sampling.coupling)."),
        ("sampling.label=1", "a MADE does not support classes: leave it out, or use a PixelCNN++."),
        ("sampling.precision=bf16", "a MADE does not support sampling.precision=bf16"),
    ):
        with pytest.raises(UserError) as error:
            train(config(override))
        assert message in str(error.value)
    assert everything(tmp_path) == set()
    made = train(config("wandb.mode=disabled", "callbacks.sample_grid.enabled=false", "trainer.max_epochs=1"))
    before = everything(tmp_path)
    for overrides, message in (
        (["inpaint.images=test"], "a MADE does not support inpainting"),
        (["sampling.coupling=paper"], "Logistic has no coupling 'paper'"),
        (["sampling.label=1"], "a MADE does not support classes"),
    ):
        with pytest.raises(UserError) as error:
            run_sample(made.checkpoint, *overrides)
        assert message in str(error.value)
        assert "\n" not in str(error.value)
    assert everything(tmp_path) == before
