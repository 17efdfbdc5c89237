"""Files damaged at random: each is read as if it were whole, to the same values, or refused with one line."""

import copy
import gzip
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import outcome
from config_cases import ODD_VALUES
from networks.test_published import named, port
from PIL import Image

import lit_parallel
from lit_parallel.checkpoint import as_checkpoint, build_model
from lit_parallel.config import TrainConfig, load_config, save_config, to_container
from lit_parallel.data import cifar10, mnist
from lit_parallel.data.datasets import build_data
from lit_parallel.data.image_folder import read_image
from lit_parallel.data.options import DataOptions
from lit_parallel.errors import UserError
from lit_parallel.networks import densenet
from lit_parallel.networks.densenet_weights import load_published
from lit_parallel.published import convert
from lit_parallel.sampling.given import load_given
from lit_parallel.sampling.options import InpaintOptions

pytestmark = pytest.mark.filterwarnings("ignore")  # of the readers, about what they read

CASES, MORE_CASES = 240, 20_000
ODD_TENSORS = [
    *(torch.zeros(()), torch.zeros(0), torch.ones(3, 3), torch.full((6,), torch.nan), torch.ones(2, dtype=torch.int64)),
    *(torch.ones(6, dtype=torch.complex64), torch.ones(6, dtype=torch.bool), torch.ones(1).expand(10**9)),
]
IMAGES = 12


@dataclass
class Subject:
    """A file that is read, and how.

    Attributes:
        content: What the whole file holds.
        read: Reads a path; returns what can be compared.
        checked: Whether the format notices every change, so that what is read must be what was written.
        suffix: End of the file's name.
        beside: Files that belong to it, by name; the one that is damaged is called `name`.
    """

    content: bytes
    read: Any
    checked: bool = False
    name: str = "file"
    beside: dict[str, bytes] = field(default_factory=dict)


def same(first, second):
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    return first == second


def read_checkpoint(path):
    model = lit_parallel.load(path)
    return {"state": model.state_dict(), "hparams": dict(model.hparams)}


def read_weights(path):
    network = densenet.densenet_cifar(10, 4)
    load_published(network, path)
    return dict(network.state_dict())


def read_published(path):
    output = path.with_name("converted.ckpt")
    output.unlink(missing_ok=True)
    return dict(convert(path, output, image_size=8).network.state_dict())


def read_data(name):
    def read(path):
        data = build_data(DataOptions(name=name, folder=str(path.parent), download=False, allow_partial=True), seed=0)
        data.prepare_data()
        data.setup()
        images, labels = data.samples("train")[:]
        return {"images": images, "labels": labels, "test": data.samples("test").inputs}

    return read


def read_picture(path):
    return {"pixels": torch.from_numpy(np.array(read_image(path)))}


GIVEN = (1, 6, 9)


def read_given(path):
    given = load_given(InpaintOptions(images=str(path)), GIVEN, None)
    return {"images": given.images}


def read_mask(path):
    given = load_given(InpaintOptions(images="test", given=str(path)), GIVEN, torch.zeros(1, *GIVEN, dtype=torch.uint8))
    return {"mask": given.mask}


def read_config(path):
    return to_container(load_config(TrainConfig, path))


@pytest.fixture(scope="module")
def subjects(tmp_path_factory):
    """Every kind of file that is read, small and whole."""
    folder = tmp_path_factory.mktemp("whole")
    path = folder / "file"
    torch.manual_seed(0)

    def saved(content, **options):
        torch.save(content, path, **options)
        return path.read_bytes()

    def checkpoint(*overrides, shape=(1, 8, 8), **options):
        return saved(as_checkpoint(build_model(load_config(TrainConfig, None, overrides), shape)), **options)

    made = ("model.hidden_sizes=[6,6]", "model.order=random")
    weights = densenet.densenet_cifar(10, 4).state_dict()
    found = {
        "made": Subject(checkpoint(*made), read_checkpoint, checked=True),
        "made, older format": Subject(checkpoint(*made, _use_new_zipfile_serialization=False), read_checkpoint),
        "pixelcnnpp": Subject(
            checkpoint("model.name=pixelcnnpp", "model.filters=2", "model.resnets=1", "model.mixtures=2"),
            read_checkpoint,
            checked=True,
        ),
        "rnn": Subject(checkpoint("model.name=rnn", "model.hidden_size=4"), read_checkpoint, checked=True),
        "densenet": Subject(
            checkpoint("model.name=densenet", "model.architecture=cifar", "model.depth=10"),
            read_checkpoint,
            checked=True,
        ),
        "weights": Subject(saved(weights), read_weights, checked=True),
        "weights, older format": Subject(saved(weights, _use_new_zipfile_serialization=False), read_weights),
        "published": Subject(saved(named(port(1, dtype=torch.float32), "legacy")), read_published, checked=True),
    }
    randomness = np.random.default_rng(0)
    idx = {}
    for part in ("train", "t10k"):
        for kind, shape in (("images-idx3", (IMAGES, 28, 28)), ("labels-idx1", (IMAGES,))):
            values = randomness.integers(10, size=shape, dtype=np.uint8)
            header = bytes([0, 0, 8, len(shape)]) + b"".join(size.to_bytes(4) for size in shape)
            idx[f"{part}-{kind}-ubyte"] = header + values.tobytes()
    zipped = {f"{name}.gz": gzip.compress(content) for name, content in idx.items()}
    for name in ("train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        found[name] = Subject(idx[name], read_data("mnist"), name=name, beside=idx)
        found[f"{name}.gz"] = Subject(zipped[f"{name}.gz"], read_data("mnist"), name=f"{name}.gz", beside=zipped)
    batches = {
        name: randomness.integers(10, size=(IMAGES, 3073), dtype=np.uint8).tobytes()
        for name in cifar10.Cifar10Data.file_names
    }
    name = "data_batch_3.bin"
    found[name] = Subject(batches[name], read_data("cifar10"), name=name, beside=batches)
    pixels = Image.fromarray(randomness.integers(256, size=(20, 30, 3), dtype=np.uint8))
    for kind in ("png", "jpeg", "bmp", "webp", "ppm", "tiff"):
        pixels.save(path, kind)
        found[kind] = Subject(path.read_bytes(), read_picture, name=f"a.{kind}")
    np.save(folder / "given.npy", randomness.integers(256, size=(2, *GIVEN), dtype=np.uint8))
    found["given images"] = Subject((folder / "given.npy").read_bytes(), read_given, name="a.npy")
    small = Image.fromarray(randomness.integers(256, size=GIVEN[1:], dtype=np.uint8))
    for kind, read in (("png", read_given), ("tiff", read_mask)):
        small.save(path, kind)
        found[f"given {kind}"] = Subject(path.read_bytes(), read, name=f"a.{kind}")
    save_config(load_config(TrainConfig), path)
    found["config"] = Subject(path.read_bytes(), read_config, name="a.yaml")
    return found


def damaged(randomness, content, others):
    """The content after one accident."""
    place, length = randomness.randrange(len(content)), randomness.choice([1, 2, 4, 8, 100])
    if randomness.random() < 0.3:  # where headers are
        place = randomness.choice([place % 64, max(0, len(content) - 1 - place % 200)])
    end = place + length
    accident = randomness.choice(["cut", "cut", "flip", "flip", "flip", "fill", "insert", "remove", "repeat", "swap"])
    if accident == "cut":
        return content[:place]
    if accident == "flip":
        flipped = bytearray(content)
        for _ in range(randomness.choice([1, 1, 1, 2, 8])):
            flipped[randomness.choice([place, randomness.randrange(len(content))])] ^= 1 << randomness.randrange(8)
        return bytes(flipped)
    if accident == "fill":
        return content[:place] + bytes([randomness.choice([0, 255])]) * length + content[end:]
    if accident == "insert":
        return content[:place] + randomness.randbytes(length) + content[place:]
    if accident == "remove":
        return content[:place] + content[end:]
    if accident == "repeat":
        return content[:end] + content[place:]
    return randomness.choice(others)


def odd_content(randomness, content):
    """A copy of nested dicts and lists in which one value, or one name, is another."""
    content = copy.deepcopy(content)
    inner = content
    while True:
        names = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
        name = randomness.choice(names)
        if isinstance(inner[name], (dict, list)) and inner[name] and randomness.random() < 0.85:
            inner = inner[name]
            continue
        accident = randomness.choice(["value", "value", "value", "name", "missing"])
        if accident == "value" or isinstance(inner, list):
            odd = ODD_TENSORS if isinstance(inner[name], torch.Tensor) and randomness.random() < 0.5 else ODD_VALUES
            inner[name] = copy.deepcopy(randomness.choice(odd))
        else:
            value = inner.pop(name)
            if accident == "name":
                inner[randomness.choice([f"{name}x", name.upper(), 1, None, ("a", 1), "", "x\ny"])] = value
        return content


def try_content(seed, contents, folder):
    """One case; returns whether the checkpoint was read."""
    randomness = random.Random(seed)
    path = folder / "odd.ckpt"
    torch.save(odd_content(randomness, randomness.choice(contents)), path)
    return not isinstance(outcome(lambda: read_checkpoint(path), f"seed {seed}"), UserError)


def try_file(seed, subjects, folder):
    """One case; returns whether the file was read."""
    randomness = random.Random(seed)
    kind = list(subjects)[seed % len(subjects)]
    subject = subjects[kind]
    for name, content in subject.beside.items():
        (folder / name).write_bytes(content)
    path = Path(folder / subject.name)
    others = [b"", randomness.randbytes(500), *(other.content for other in subjects.values())]
    content = damaged(randomness, subject.content, others)
    path.write_bytes(content)
    case = f"{kind}, seed {seed}"
    found = outcome(lambda: subject.read(path), case)
    for leftover in folder.iterdir():
        leftover.unlink()
    if isinstance(found, UserError):
        return False
    if subject.checked:
        whole = [other.content for other in subjects.values()]
        if content not in whole:  # not another whole file in its place
            path.write_bytes(subject.content)
            assert same(found, subject.read(path)), f"{case}: read, but not to what was written"
            path.unlink()
    return True


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setattr(mnist, "NUM_IMAGES", {"train": IMAGES, "t10k": IMAGES})
    monkeypatch.setattr(cifar10, "IMAGES_PER_FILE", IMAGES)


def test_whole_files_are_read(subjects, tmp_path):
    for kind, subject in subjects.items():
        for name, content in subject.beside.items() or {subject.name: subject.content}.items():
            (tmp_path / name).write_bytes(content)
        assert not isinstance(outcome(lambda s=subject: s.read(tmp_path / s.name), kind), UserError)
        for file in tmp_path.iterdir():
            file.unlink()


@pytest.mark.parametrize("chunk", range(8))
def test_a_damaged_file_is_read_or_refused(chunk, subjects, tmp_path):
    read = [try_file(seed, subjects, tmp_path) for seed in range(chunk, CASES, 8)]
    assert not all(read)


@pytest.fixture(scope="module")
def contents():
    """What checkpoints hold."""
    return [
        as_checkpoint(build_model(load_config(TrainConfig, None, overrides), (1, 8, 8)))
        for overrides in (
            ["model.hidden_sizes=[6,6]", "model.num_masks=2"],
            ["model.name=pixelcnnpp", "model.filters=2", "model.resnets=1", "model.mixtures=2"],
            ["model.name=rnn", "model.hidden_size=4"],
        )
    ]


@pytest.mark.parametrize("chunk", range(4))
def test_an_odd_checkpoint_is_read_or_refused(chunk, contents, tmp_path):
    read = [try_content(seed, contents, tmp_path) for seed in range(chunk, CASES, 4)]
    assert 0.1 < sum(read) / len(read) < 0.9


@pytest.mark.fuzz
@pytest.mark.parametrize("chunk", range(MORE_CASES // 200))
def test_more_damaged_files(chunk, subjects, contents, tmp_path):
    for seed in range(CASES + 200 * chunk, CASES + 200 * (chunk + 1)):
        try_file(seed, subjects, tmp_path)
        try_content(seed, contents, tmp_path)
