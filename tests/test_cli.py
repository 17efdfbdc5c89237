import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from lit_parallel.cli import parse_arguments, run_command, says_when_interrupted
from lit_parallel.config import SampleConfig, TrainConfig
from lit_parallel.errors import UserError
from lit_parallel.modules.options import MODEL_OPTIONS, OptimizerOptions
from lit_parallel.options import option_keys

EXAMPLES = ["python train.py", "python train.py trainer.max_epochs=3", "python train.py --help trainer"]


def parse(*argv: str, schema: Any = TrainConfig, default_config=None):
    return parse_arguments(
        schema,
        argv,
        program="python train.py",
        description="Train a model on images.",
        examples=EXAMPLES,
        default_config=default_config,
    )


def refusal(*argv, schema=TrainConfig):
    with pytest.raises(UserError) as caught:
        parse(*argv, schema=schema)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def help_text(capsys, *argv, schema=TrainConfig):
    with pytest.raises(SystemExit) as caught:
        parse(*argv, schema=schema)
    assert caught.value.code == 0
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)


def test_nothing_gives_the_defaults():
    assert parse() == TrainConfig()


def test_config_and_overrides(tmp_path):
    default, other = tmp_path / "default.yaml", tmp_path / "other.yaml"
    default.write_text("experiment: default\n")
    other.write_text("experiment: other\nseed: 5\n")
    assert parse(default_config=default).experiment == "default"
    for flags in (["--config", str(other)], [f"--config={other}"]):
        config = parse("optimizer.lr=0.5", *flags, "trainer.max_epochs=3", default_config=default)
        assert (config.experiment, config.seed, config.optimizer.lr, config.trainer.max_epochs) == ("other", 5, 0.5, 3)


@pytest.mark.parametrize("path", ["runs/x/last.ckpt", "a#b [1].ckpt", "epoch=3.ckpt", "1e3", "null"])
def test_checkpoint_is_taken_literally(path):
    assert parse("--checkpoint", path, schema=SampleConfig).checkpoint == path


@pytest.mark.parametrize("schema", [TrainConfig, SampleConfig])
def test_help_is_one_screen(capsys, schema):
    text = help_text(capsys, "--help", schema=schema)
    lines = text.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 100
    assert text.startswith("usage: python train.py [--config PATH]")
    assert "--checkpoint PATH" in text
    for word in ("solver", "trainer", "wandb", "seed", *EXAMPLES):
        assert word in text
    assert help_text(capsys, "seed=3", "-h", schema=schema) == text


@pytest.mark.parametrize("schema", [TrainConfig, SampleConfig])
def test_help_all_lists_every_option(capsys, schema):
    text = help_text(capsys, "--help", "all", schema=schema)
    listed = [line.split()[0] for line in text.splitlines() if line.startswith("  ") and not line.startswith("   ")]
    listed = list(dict.fromkeys(listed))  # every kind of model has a name
    assert [key for key in listed if key != "option"] == sorted(option_keys(schema()), key=listed.index)
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 100


def test_help_on_a_group_gives_default_type_range_and_explanation(capsys):
    text = help_text(capsys, "--help", "optimizer")
    assert text.splitlines()[0] == "optimizer: AdamW or SGD with linear warm-up and cosine decay."
    (line,) = [line for line in text.splitlines() if "optimizer.lr " in line]
    assert line.split(maxsplit=2)[:2] == ["optimizer.lr", "0.001"]
    assert "highest learning rate [number > 0]" in line
    starts = {
        line.index(word) for line, word in zip(text.splitlines()[1:4], ("expl", "the method", "highest"), strict=True)
    }
    assert len(starts) == 1, "columns are aligned"
    assert "solver." not in text


def test_help_on_nested_groups_and_single_options(capsys):
    ema = help_text(capsys, "--help=callbacks.ema")
    assert "callbacks.ema.decay" in ema
    assert "patience" not in ema
    everything = help_text(capsys, "--help", "callbacks")
    assert "callbacks.ema.decay" in everything
    assert "callbacks.early_stopping.patience" in everything
    assert help_text(capsys, "--help", "callbacks.ema.decay") == ema
    assert "runs_folder" in help_text(capsys, "--help", "seed")


def test_help_shows_every_kind_of_model(capsys, monkeypatch):
    monkeypatch.setitem(MODEL_OPTIONS, "other", OptimizerOptions)  # any options will do
    text = help_text(capsys, "--help", "model")
    assert "model: A MADE" in text
    assert "model: AdamW" in text
    assert "model.hidden_sizes" in text
    assert "model.warmup_fraction" in text


def test_version(capsys):
    assert help_text(capsys, "--version").startswith("lit-parallel ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--help modl", "There is no help on 'modl'. Did you mean 'model'?"),
        ("--lr=3", "Unknown flag '--lr'. Did you mean 'optimizer.lr=3'?"),
        ("--lr 3", "Unknown flag '--lr'. Did you mean 'optimizer.lr=3'?"),
        ("--lr seed=4", "Unknown flag '--lr'. Did you mean 'optimizer.lr=...'?"),
        ("--max-epochs 3", "Unknown flag '--max-epochs'. Did you mean 'trainer.max_epochs=3'?"),
        ("--seed 3", "Unknown flag '--seed'. Did you mean 'seed=3'?"),
        ("--conifg x.yaml", "Unknown flag '--conifg'. Did you mean '--config'?"),
        ("--xyzzy", "Unknown flag '--xyzzy'. Known: --config, --checkpoint, --help, --version, and key=value."),
        ("--config", "--config needs a path, as in --config PATH."),
        ("mine.yaml", "'mine.yaml' needs a flag: --config mine.yaml"),
        ("lr 3", "'lr' is not of the form key=value"),
        ("optimizer.lrr=3", "Unknown option 'optimizer.lrr'. Did you mean 'lr'?"),
    ],
)
def test_mistake_is_told_in_one_line(argv, message):
    assert message in refusal(*argv.split())


def test_checkpoint_flag_belongs_to_schemas_with_a_checkpoint():
    assert "Unknown flag '--checkpoint'" in refusal("--checkpoint", "x.ckpt", schema=OptimizerOptions)


def test_status_of_success(capsys):
    seen = []
    assert run_command(seen.append, ["a=b"]) == 0
    assert seen == [["a=b"]]
    assert capsys.readouterr() == ("", "")


def test_status_of_a_mistake(capsys):
    assert run_command(lambda argv: parse(*argv), ["seed=x"]) == 2
    assert capsys.readouterr() == ("", "error: Option 'seed' must be of type integer, not 'x'.\n")


def test_error_is_one_line_whatever_was_typed(capsys):
    assert run_command(lambda argv: parse(*argv), ["a\nb=3"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("number", "status", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_status_after_a_signal_whatever_fails_then(capsys, number, status, word):
    before = signal.getsignal(number)

    def main(argv):
        try:
            with says_when_interrupted(lambda: "try again"):
                os.kill(os.getpid(), number)
                time.sleep(10)
        finally:
            os.kill(os.getpid(), number)  # a second one disturbs nothing
            raise RuntimeError from sys.exception()

    assert run_command(main, []) == status
    assert capsys.readouterr().err.startswith(word)
    assert signal.getsignal(number) is before


def test_who_asks_again_later_does_not_wait_for_what_is_being_closed(capsys, monkeypatch):
    monkeypatch.setattr("lit_parallel.cli._AT_ONCE_SECONDS", 0.05)

    def main(argv):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("the second one was not heard")

    assert run_command(main, []) == 143
    assert capsys.readouterr().err == "terminated\n"


def test_a_hint_follows_the_signal(capsys):
    def main(argv):
        with says_when_interrupted(lambda: "try again"):
            raise KeyboardInterrupt  # as where signals cannot be asked for

    assert run_command(main, []) == 130
    assert capsys.readouterr() == ("", "interrupted; try again\n")


def test_what_lightning_has_started_is_ended_by_the_first_process(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert run_command(lambda argv: os.kill(os.getpid(), signal.SIGTERM), []) == 0
    monkeypatch.setenv("RANK", "1")  # by torchrun, which signals every process
    assert run_command(lambda argv: os.kill(os.getpid(), signal.SIGTERM), []) == 143


def test_what_was_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # by nohup
    try:
        assert run_command(lambda argv: os.kill(os.getpid(), signal.SIGINT), []) == 0
    finally:
        signal.signal(signal.SIGINT, before)


def test_defects_propagate():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda argv: 1 // 0, [])


@pytest.mark.parametrize("variable", ["RANK", "LOCAL_RANK", "NODE_RANK"])
def test_only_the_first_process_speaks(capsys, monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    assert run_command(lambda argv: parse(*argv), ["seed=x"]) == 2
    assert capsys.readouterr() == ("", "")
    assert help_text(capsys, "--help") == ""


def test_other_processes_tell_what_happened_to_them_alone(capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")

    def main(argv):
        with says_when_interrupted(lambda: "try again"):
            raise UserError("no such image")

    assert run_command(main, []) == 2
    assert capsys.readouterr().err == "process 1: error: no such image\n"


SCRIPT = """
import sys
from lit_parallel.cli import parse_arguments, run_command
from lit_parallel.config import TrainConfig
def main(argv):
    parse_arguments(TrainConfig, argv, program="train", description="Train.", examples=[])
sys.exit(run_command(main))
"""


def test_a_real_process_ends_with_status_2_and_no_traceback():
    done = subprocess.run([sys.executable, "-c", SCRIPT, "--lr=3"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: Unknown flag '--lr'. Did you mean 'optimizer.lr=3'?\n"


def test_a_full_disk_is_one_line(capsys):
    def main(argv):
        raise OSError(28, "No space left on device", "runs/x/last.ckpt")

    assert run_command(main, []) == 2
    assert capsys.readouterr().err == "error: No space left on device: 'runs/x/last.ckpt'\n"


UNREAD = """
import sys
from lit_parallel.cli import run_command
sys.exit(run_command(lambda argv: [print(number) for number in range(100000)]))
"""


def test_output_that_is_read_no_more_ends_silently():
    with subprocess.Popen([sys.executable, "-c", UNREAD], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"0\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_another_pipe_that_breaks_is_one_line(capsys):
    def main(argv):
        raise BrokenPipeError(32, "Broken pipe")

    assert run_command(main, []) == 2
    assert capsys.readouterr().err.startswith("error: Broken pipe: ")


def test_help_does_not_wait_for_torch():
    program = "import sys, lit_parallel.cli, lit_parallel.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
