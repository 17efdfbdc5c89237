"""DenseNets through the commands, and the test of a checkpoint, which every model has."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import train as command
from lit_parallel.checkpoint import build_model
from lit_parallel.config import TrainConfig, load_config
from lit_parallel.data.datasets import build_data
from lit_parallel.errors import UserError
from train import evaluate, train

ROOT = Path(__file__).parent.parent

pytestmark = [
    # Lightning and wandb open files that the interpreter closes at exit; what they deprecate is theirs.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]

QUIET = ["trainer.accelerator=cpu", "trainer.devices=1", "trainer.enable_progress_bar=false", "wandb.mode=disabled"]
SHORT = ["trainer.max_epochs=1", "trainer.limit_train_batches=4", "trainer.log_every_n_steps=1"]
TINY = {
    "densenet_mnist5k": ["model.growth_rate=4", "model.block_config=[2,2]", "data.side=7"],
    "made_mnist5k": ["model.hidden_sizes=[16]", "data.side=7", "callbacks.sample_grid.enabled=false"],
    "rnn_adding": ["model.hidden_size=8", "data.length=12", "data.size=100", "data.test_size=20", "data.batch_size=8"],
}


def config_of(name, *overrides):
    return load_config(TrainConfig, ROOT / "configs" / f"{name}.yaml", [*QUIET, *TINY.get(name, []), *overrides])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def trained(runs):
    return train(config_of("densenet_mnist5k", *SHORT, f"runs_folder={runs}"))


def refusal(config) -> str:
    with pytest.raises(UserError) as caught:
        train(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- training ---------------------------------------------------------------------------------------------------------


def test_training_leaves_a_checkpoint_and_metrics(trained):
    assert trained.checkpoint == trained.folder / "checkpoints" / "last.ckpt"
    wanted = {f"{part}/{metric}" for part in ("train", "val", "test") for metric in ("loss", "accuracy", "top5")}
    assert wanted <= trained.metrics.keys()
    assert trained.metrics["test/accuracy"] <= trained.metrics["test/top5"] <= 1


def test_options_of_sampling_are_refused(tmp_path):
    message = refusal(config_of("densenet_mnist5k", "solver.name=jacobi", f"runs_folder={tmp_path}"))
    assert "'solver.name' says how samples are drawn, and a model with model.name=densenet draws none" in message


def test_the_papers_setting():
    config = config_of("densenet_cifar10")
    network = build_model(config, (3, 32, 32)).network
    assert sum(parameter.numel() for parameter in network.parameters()) == 769_162
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.lr, optimizer.momentum, optimizer.nesterov) == ("sgd", 0.1, 0.9, True)
    assert (optimizer.weight_decay, config.data.batch_size, config.trainer.max_epochs) == (1e-4, 64, 300)


def test_the_published_setting():
    config = config_of("densenet201_imagenet")
    assert (config.model.architecture, config.model.pretrained) == ("densenet201", True)
    data = build_data(config.data, 0)
    assert (data.options.resize, data.sample_shape) == (256, (3, 224, 224))


# -- the test of a checkpoint -----------------------------------------------------------------------------------------


def of_the_test(metrics):
    return {name: value for name, value in metrics.items() if name.startswith("test/")}


@pytest.mark.parametrize("named", [True, False])
def test_a_checkpoint_gives_the_numbers_of_its_training(trained, runs, named, capsys):
    chosen = [f"checkpoint={trained.checkpoint}"] if named else []
    result = train(config_of("densenet_mnist5k", "stage=test", *chosen, f"runs_folder={runs}", "optimizer.lr=9"))
    assert len(of_the_test(result.metrics)) == 3
    assert result.metrics == pytest.approx(of_the_test(trained.metrics), rel=1e-5)
    assert (result.checkpoint, result.folder.parent) == (trained.checkpoint, trained.folder.parent)
    report = json.loads((result.folder / "report.json").read_text())
    assert report["metrics"] == result.metrics
    assert report["checkpoint"] == str(trained.checkpoint)
    assert report["checkpoint_sha256"] == hashlib.sha256(trained.checkpoint.read_bytes()).hexdigest()
    assert report["environment"]["device"] == "cpu"
    printed = capsys.readouterr().out
    assert f"test/accuracy: {result.metrics['test/accuracy']:.3f}" in printed
    assert "report.json" in printed
    again = load_config(TrainConfig, result.folder / "config.yaml")
    assert (again.stage, again.checkpoint) == ("test", str(trained.checkpoint))


@pytest.mark.parametrize("name", ["made_mnist5k", "rnn_adding"])
def test_every_model_can_be_tested(name, tmp_path):
    result = train(config_of(name, *SHORT, f"runs_folder={tmp_path}"))
    tested = evaluate(config_of(name, "stage=test", f"runs_folder={tmp_path}"))
    assert tested.metrics
    assert tested.metrics == pytest.approx(of_the_test(result.metrics), rel=1e-5)


def test_the_model_is_the_checkpoints_own(trained, runs, capsys):
    result = train(config_of("densenet_mnist5k", "stage=test", "model.growth_rate=9", f"runs_folder={runs}"))
    assert result.model.options.growth_rate == 4
    assert load_config(TrainConfig, result.folder / "config.yaml").model.growth_rate == 4
    assert "as the checkpoint says, not the config: model.growth_rate=4" in capsys.readouterr().out


def test_a_test_is_logged_as_one(trained, tmp_path):
    folder = tmp_path / "runs"
    chosen = [f"checkpoint={trained.checkpoint}", f"runs_folder={folder}", "wandb.mode=offline"]
    result = train(config_of("densenet_mnist5k", "stage=test", *chosen))
    (log,) = result.folder.glob("wandb/offline-run-*/run-*.wandb")
    wandb = Path(sys.executable).with_name("wandb")
    done = subprocess.run([wandb, "leet", "inspect", "--json", log], capture_output=True, text=True, check=True)
    records = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    (header,) = [record["run"] for record in records if record["type"] == "run"]
    assert (header["run_group"], header["job_type"]) == ("densenet_mnist5k", "test")
    weights = hashlib.sha256(trained.checkpoint.read_bytes()).hexdigest()
    assert header["config"]["update"]["checkpoint_sha256"] == weights
    values = {key: value for record in records for key, value in record.get("history", {}).get("item", {}).items()}
    assert values["test/accuracy"] == pytest.approx(result.metrics["test/accuracy"])


def test_the_command_tests(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = ["--config", "configs/densenet_mnist5k.yaml", "stage=test", "--checkpoint", str(trained.checkpoint)]
    command.main([*arguments, *QUIET, *TINY["densenet_mnist5k"], f"runs_folder={tmp_path}"])
    (report,) = tmp_path.glob("densenet_mnist5k/*/report.json")
    assert json.loads(report.read_text())["metrics"] == pytest.approx(of_the_test(trained.metrics), rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stage=test"], "There is no checkpoint below"),
        (["stage=test", "checkpoint=lost.ckpt"], "There is no checkpoint 'lost.ckpt'"),
        (["checkpoint={}"], "checkpoint names what is tested: set stage=test"),
        (["stage=test", "checkpoint={}", "data.side=8"], "trained on samples of 1x7x7, and the data have 1x8x8"),
    ],
)
def test_a_mistake_is_told_before_a_run_folder_exists(overrides, message, trained, tmp_path):
    filled = [override.format(trained.checkpoint) for override in overrides]
    assert message in refusal(config_of("densenet_mnist5k", *filled, f"runs_folder={tmp_path}"))
    assert not any(tmp_path.iterdir())


def test_another_kind_of_model_is_refused(trained, tmp_path):
    chosen = [f"checkpoint={trained.checkpoint}", f"runs_folder={tmp_path}"]
    message = refusal(config_of("made_mnist5k", "stage=test", *chosen))
    assert "holds a model of model.name=densenet, and the config says made" in message


# -- weights that others trained --------------------------------------------------------------------------------------


@pytest.fixture
def foreign(tmp_path):
    """A folder of images of two classes and a file of weights, as others would have them: red and green."""
    for part, number in (("train", 8), ("val", 3)):
        for name, colour in (("green", (20, 200, 20)), ("red", (200, 20, 20))):
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(number):
                Image.new("RGB", (20 + index, 18), colour).save(tmp_path / part / name / f"{index}.JPEG")
    data = ["data.resize=16", "data.crop=12", f"data.folder={tmp_path}", "data.num_workers=0", "data.batch_size=2"]
    model = ["model.architecture=custom", "model.growth_rate=4", "model.block_config=[2,2]", "model.num_classes=2"]
    common = [*data, *model, "model.small_images=true", "model.pretrained=false", f"runs_folder={tmp_path / 'runs'}"]
    network = build_model(config_of("densenet201_imagenet", *common), (3, 12, 12)).network.eval()
    with torch.no_grad():  # the answer is the mean colour, by features that pass through
        network.classifier.bias += torch.tensor([5.0, 0.0])
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    return [*common, f"model.weights={tmp_path / 'weights.pth'}"]


def test_weights_in_a_file_are_tested_and_trained_on(foreign):
    tested = train(config_of("densenet201_imagenet", *foreign, "stage=test"))
    assert tested.checkpoint is None
    assert tested.metrics["test/accuracy"] == 0.5  # "green", whatever is seen
    report = json.loads((tested.folder / "report.json").read_text())
    assert (report["checkpoint"], Path(report["weights"]).name) == (None, "weights.pth")

    few = ["trainer.max_epochs=1", "optimizer.lr=1e-9", "data.validation_fraction=0.25"]
    trained = train(config_of("densenet201_imagenet", *foreign, *few))
    bias = trained.model.network.classifier.bias
    assert float(bias.detach()[0] - bias.detach()[1]) > 4

    Path(foreign[-1].partition("=")[2]).unlink()  # a checkpoint holds its weights
    chosen = [f"checkpoint={trained.checkpoint}", "stage=test"]
    again = train(config_of("densenet201_imagenet", *foreign, *chosen))
    assert again.metrics == pytest.approx(of_the_test(trained.metrics), rel=1e-5)


def test_weights_of_other_classes_are_not_tested(foreign, tmp_path):
    (tmp_path / "val" / "red").rename(tmp_path / "red")
    (tmp_path / "train" / "red").rename(tmp_path / "red" / "others")
    message = refusal(config_of("densenet201_imagenet", *foreign, "stage=test"))
    assert "the weights know 2 classes and the data have 1" in message
