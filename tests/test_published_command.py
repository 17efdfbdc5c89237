import subprocess
import sys

import pytest
import torch
from networks.test_published import named, port

import lit_parallel
from lit_parallel.checkpoint import saved_config
from lit_parallel.cli import run_command
from lit_parallel.published import main


@pytest.fixture
def weights(tmp_path):
    """Writes the port's weights to a file."""

    def write(state, **options):
        path = tmp_path / "weights.pth"
        torch.save(state, path, **options)
        return path

    return write


def refusal(capsys, *argv):
    """The line that a command which cannot work prints."""
    assert run_command(main, [str(argument) for argument in argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


# Published files are old: torch wrote a format of its own until version 1.6.
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(("channels", "size", "data"), [(1, 28, "mnist"), (3, 32, "cifar10")])
def test_the_checkpoint_holds_the_published_model(tmp_path, capsys, weights, channels, size, data, zipped):
    published = port(channels, mixtures=3, resnets=2, dtype=torch.float32)
    path = weights(named(published, "legacy"), _use_new_zipfile_serialization=zipped)
    checkpoint = tmp_path / "new" / "model.ckpt"
    assert run_command(main, [str(path), "--output", str(checkpoint)]) == 0
    printed = capsys.readouterr().out
    assert f"{channels}x{size}x{size} images: 4 filters, 2 resnets, a mixture of 3" in printed
    assert f"python sample.py --checkpoint {checkpoint}" in printed

    model = lit_parallel.load(checkpoint)
    assert model.image_shape == (channels, size, size)
    config = saved_config(model)
    assert (config.model.name, config.model.filters, config.model.resnets) == ("pixelcnnpp", 4, 2)
    assert (config.model.mixtures, config.model.num_classes, config.data.name) == (3, None, data)
    assert model.initialised  # or else training would overwrite the weights
    x = torch.rand(2, channels, size, size) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(model.network(x), published(x), rtol=1e-5, atol=1e-5)


def test_the_checkpoint_can_be_sampled(tmp_path, weights):
    published = port(3, dtype=torch.float32)
    checkpoint = tmp_path / "model.ckpt"
    path = weights({"model": {f"module.{key}": value for key, value in named(published, "plain").items()}})
    assert run_command(main, ["--image-size", "8", str(path), f"--output={checkpoint}"]) == 0
    model = lit_parallel.load(checkpoint)
    images = [lit_parallel.sample(model, 2, solver=solver, seed=3)[0] for solver in ("sequential", "jacobi")]
    assert images[0].shape == (2, 3, 8, 8)
    assert torch.equal(*images)


def test_other_weights_are_refused_with_the_file_and_the_reason(tmp_path, capsys, weights):
    state = named(port(), "legacy")
    del state["nin_out.lin_a.bias"]
    path = weights(state)
    message = refusal(capsys, path, "--output", tmp_path / "a.ckpt")
    assert message == (
        f"error: Cannot convert '{path}'. Not the weights of a published PixelCNN++: 'nin_out.lin_a.bias' is missing.\n"
    )
    assert not (tmp_path / "a.ckpt").exists()


def test_outputs_that_are_no_mixture_are_refused(tmp_path, capsys, weights):
    state = named(port(), "plain")
    state |= {"nin_out.lin_a.weight": torch.zeros(256, 4), "nin_out.lin_a.bias": torch.zeros(256)}
    message = refusal(capsys, weights(state), "--output", tmp_path / "a.ckpt")
    assert "256 outputs per pixel are no mixture of discretised logistics, which has 3 for each component" in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "There is no such file."),
        (b"", "damaged or incomplete"),
        (b"<!DOCTYPE html><html></html>", "no PyTorch file at all; nothing in it was executed"),
        ("model", "It holds more than tensors and plain values (save the model's state_dict)"),
        ("truncated", "damaged or incomplete"),
    ],
    ids=["missing", "empty", "html", "model", "truncated"],
)
def test_files_that_cannot_be_read_are_refused(tmp_path, capsys, weights, content, words):
    path = tmp_path / "other.pth"
    if content == "model":
        content = weights(port()).read_bytes()
    elif content == "truncated":
        content = weights(named(port(), "legacy")).read_bytes()[:-1000]
    if content is not None:
        path.write_bytes(content)
    message = refusal(capsys, path, "--output", tmp_path / "a.ckpt")
    assert message.startswith(f"error: Cannot convert '{path}'. ")
    assert words in message


def test_a_file_that_exists_is_not_overwritten(tmp_path, capsys, weights):
    precious = tmp_path / "last.ckpt"
    precious.write_bytes(b"weeks of training")
    message = refusal(capsys, weights(named(port(), "legacy")), "--output", precious)
    assert f"'{precious}' exists already: name another --output." in message
    assert precious.read_bytes() == b"weeks of training"


@pytest.mark.parametrize("size", ["30", "0", "-4"])
def test_an_image_size_that_cannot_be_halved_twice_is_refused(tmp_path, capsys, size):
    message = refusal(capsys, "weights.pth", "--output", tmp_path / "a.ckpt", "--image-size", size)
    assert f"--image-size must be a positive multiple of 4, not {size}." in message


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "The following arguments are required: WEIGHTS, --output"),
        (["w.pth"], "The following arguments are required: --output"),
        (["w.pth", "--output"], "Argument --output: expected one argument"),
        (["w.pth", "--output", "a.ckpt", "--image-size", "big"], "invalid int value: 'big'"),
        (["w.pth", "--output", "a.ckpt", "--size", "8"], "Unrecognized arguments: --size 8"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_arguments_that_are_not_understood_are_refused(capsys, argv, words):
    message = refusal(capsys, *argv)
    assert words in message
    assert message.endswith("see python -m lit_parallel.published --help.\n")


def test_help_runs_as_a_module():
    command = [sys.executable, "-m", "lit_parallel.published", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.startswith("usage: python -m lit_parallel.published")
    for word in ("WEIGHTS", "--output PATH", "--image-size N"):
        assert word in result.stdout
