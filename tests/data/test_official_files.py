"""MNIST and CIFAR-10 read from tiny files in the official formats."""

import gzip
import struct

import numpy as np
import pytest

from lit_parallel.data import cifar10, mnist, official
from lit_parallel.data.datasets import build_data
from lit_parallel.data.options import DataOptions
from lit_parallel.errors import UserError

TRAIN_IMAGES = "train-images-idx3-ubyte"
TRAIN_LABELS = "train-labels-idx1-ubyte"
NUM_TRAIN, NUM_TEST = 30, 10  # MNIST
NUM_BATCH = 6  # CIFAR-10


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setattr(mnist, "NUM_IMAGES", {"train": NUM_TRAIN, "t10k": NUM_TEST})
    monkeypatch.setattr(cifar10, "IMAGES_PER_FILE", NUM_BATCH)


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.tobytes()


def random_images(number, *shape):
    rng = np.random.default_rng(number)
    return rng.integers(256, size=(number, *shape), dtype=np.uint8), rng.integers(10, size=number, dtype=np.uint8)


@pytest.fixture(params=["gz", "plain"])
def compressed(request):
    return request.param == "gz"


@pytest.fixture
def mnist_folder(tmp_path, compressed):
    for part, number in (("train", NUM_TRAIN), ("t10k", NUM_TEST)):
        images, labels = random_images(number, 28, 28)
        write_idx(tmp_path, f"{part}-images-idx3-ubyte", images, compressed)
        write_idx(tmp_path, f"{part}-labels-idx1-ubyte", labels, compressed)
    return tmp_path


def write_idx(folder, name, array, compressed=True):
    write(folder, name, idx(array), compressed)


def write(folder, name, content, compressed=True):
    (folder / (f"{name}.gz" if compressed else name)).write_bytes(gzip.compress(content) if compressed else content)


@pytest.fixture
def cifar_folder(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for i, name in enumerate(cifar10.Cifar10Data.file_names):
        write_cifar(folder / name, *random_images(NUM_BATCH, 3, 32, 32), shift=i)
    return folder


def write_cifar(path, images, labels, shift=0):
    path.write_bytes(
        b"".join(
            bytes([label]) + (image + np.uint8(shift)).tobytes() for image, label in zip(images, labels, strict=True)
        )
    )


def build(name, folder, **options):
    data = build_data(DataOptions(name=name, folder=str(folder), download=False, batch_size=1, **options), seed=0)
    data.prepare_data()
    return data


def contents(*loaders):
    return sorted((int(labels), images.numpy().tobytes()) for loader in loaders for images, labels in loader)


def expected(images, labels):
    return sorted((int(label), image.tobytes()) for image, label in zip(images, labels, strict=True))


def fails(name, folder, message, **options):
    """Check that loading fails with one line that holds the message."""
    with pytest.raises(UserError) as caught:
        build(name, folder, **options).setup()
    text = str(caught.value)
    assert message in text
    assert "\n" not in text
    return text


def test_mnist_round_trip(mnist_folder):
    data = build("mnist", mnist_folder)
    assert contents(data.train_dataloader(), data.val_dataloader()) == expected(*random_images(NUM_TRAIN, 28, 28))
    assert contents(data.test_dataloader()) == expected(*random_images(NUM_TEST, 28, 28))
    assert data.image_shape == next(iter(data.test_dataloader()))[0].shape[1:]


def test_mnist_name_may_keep_its_gz_when_unpacked(tmp_path):
    images, _ = random_images(3, 28, 28)
    path = tmp_path / "images.gz"
    path.write_bytes(idx(images))
    assert np.array_equal(mnist.read_idx(path, dimensions=3), images)


@pytest.mark.parametrize("parent", [False, True])
def test_cifar10_round_trip(cifar_folder, parent):
    data = build("cifar10", cifar_folder.parent if parent else cifar_folder)
    images, labels = random_images(NUM_BATCH, 3, 32, 32)
    training = [pair for i in range(5) for pair in expected(images + np.uint8(i), labels)]
    assert contents(data.train_dataloader(), data.val_dataloader()) == sorted(training)
    assert contents(data.test_dataloader()) == expected(images + np.uint8(5), labels)


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_missing_file(tmp_path, name):
    file = {"mnist": f"{TRAIN_IMAGES}.gz", "cifar10": "data_batch_1.bin"}[name]
    text = fails(name, tmp_path, f"'{file}' is not in '{tmp_path}' and data.download is false")
    assert "data.folder" in text
    assert "data.download=true" in text


def test_folder_of_another_dataset(cifar_folder):
    fails("mnist", cifar_folder, f"'{TRAIN_IMAGES}.gz' is not in '{cifar_folder}'")


def test_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    fails("cifar10", tmp_path / "file", "is not in")


def test_home_is_expanded(monkeypatch, cifar_folder):
    monkeypatch.setenv("HOME", str(cifar_folder.parent))
    monkeypatch.setenv("USERPROFILE", str(cifar_folder.parent))
    build("cifar10", "~/cifar-10-batches-bin").setup()


def test_setup_without_prepare_data(tmp_path):
    data = build_data(DataOptions(name="mnist", folder=str(tmp_path)), seed=0)
    with pytest.raises(UserError, match="has not been downloaded"):
        data.setup()


def test_partial_mnist(mnist_folder, compressed, monkeypatch):
    images, labels = random_images(NUM_TRAIN, 28, 28)
    write_idx(mnist_folder, TRAIN_IMAGES, images[:20], compressed)
    write_idx(mnist_folder, TRAIN_LABELS, labels[:20], compressed)
    path = mnist_folder / (TRAIN_IMAGES + ".gz" * compressed)
    fails("mnist", mnist_folder, f"'{path}' holds only 20 of 30 images: set data.allow_partial=true to go on")

    lines = []
    monkeypatch.setattr(official, "rank_zero_info", lines.append)
    data = build("mnist", mnist_folder, allow_partial=True)
    data.setup()
    data.setup()
    assert contents(data.train_dataloader(), data.val_dataloader()) == expected(images[:20], labels[:20])
    assert len(lines) == 1
    assert f"'{path}' holds only 20 of 30 images; going on" in lines[0]


def test_partial_cifar10_is_one_line_for_all_files(cifar_folder, monkeypatch):
    images, labels = random_images(NUM_BATCH, 3, 32, 32)
    for name in ("data_batch_2.bin", "test_batch.bin"):
        write_cifar(cifar_folder / name, images[:4], labels[:4])
    text = f"'{cifar_folder / 'data_batch_2.bin'}' and 1 more hold only 8 of 12 images"
    fails("cifar10", cifar_folder, text)
    lines = []
    monkeypatch.setattr(official, "rank_zero_info", lines.append)
    data = build("cifar10", cifar_folder, allow_partial=True)
    assert len(contents(data.train_dataloader(), data.val_dataloader())) == 28
    assert [line.startswith(text) for line in lines] == [True]


def test_complete_files_are_not_announced(cifar_folder, monkeypatch):
    monkeypatch.setattr(official, "rank_zero_info", lambda line: pytest.fail(line))
    build("cifar10", cifar_folder, allow_partial=True).setup()


@pytest.mark.parametrize(
    ("number", "message"), [(NUM_BATCH + 1, "holds 7 images, the official file only 6"), (0, "it holds no images")]
)
def test_wrong_number_of_images(cifar_folder, number, message):
    write_cifar(cifar_folder / "test_batch.bin", *random_images(number, 3, 32, 32))
    assert "test_batch.bin" in fails("cifar10", cifar_folder, message, allow_partial=True)


IMAGES, LABELS = random_images(NUM_TRAIN, 28, 28)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (TRAIN_IMAGES, idx(IMAGES)[:-5], "it is truncated: 23,531 bytes instead of 23,536"),
        (TRAIN_IMAGES, idx(IMAGES) + b"x", "it is too long: 23,537 bytes instead of 23,536"),
        (TRAIN_IMAGES, idx(IMAGES)[:10], "it is truncated in the header"),
        (TRAIN_IMAGES, b"", "its magic number is 0x instead of 0x00000803"),
        (TRAIN_IMAGES, idx(LABELS), "its magic number is 0x00000801 instead of 0x00000803"),
        (TRAIN_LABELS, idx(IMAGES), "its magic number is 0x00000803 instead of 0x00000801"),
        (TRAIN_IMAGES, idx(IMAGES[:, :, :27]), "its images have 28x27 pixels, not 28x28"),
        (TRAIN_LABELS, idx(LABELS[:-1]), "it holds 29 labels for the 30 images beside it"),
        (TRAIN_LABELS, idx(np.where(np.arange(NUM_TRAIN) == 3, 10, LABELS).astype(np.uint8)), "the label 10"),
    ],
    ids=["truncated", "too long", "short header", "empty", "labels", "images", "shape", "count", "label"],
)
def test_wrong_mnist_file(mnist_folder, compressed, file, content, message):
    write(mnist_folder, file, content, compressed)
    text = fails("mnist", mnist_folder, message, allow_partial=True)
    assert file in text
    assert "delete it" in text


@pytest.mark.parametrize("compressed", [True])
@pytest.mark.parametrize("damage", ["truncated", "checksum", "stream", "method"])
def test_damaged_gzip(mnist_folder, damage):
    path = mnist_folder / f"{TRAIN_IMAGES}.gz"
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        del content[len(content) // 2 :]
    elif damage == "checksum":
        content[-5] ^= 0xFF
    elif damage == "stream":
        content[10] = 0xFF
    else:
        content[2] = 99
    path.write_bytes(content)
    assert str(path) in fails("mnist", mnist_folder, "gzip cannot unpack it", allow_partial=True)


def test_truncated_cifar10(cifar_folder):
    path = cifar_folder / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:-1])
    text = fails("cifar10", cifar_folder, "it is truncated: 18,437 bytes are no multiple of 3,073", allow_partial=True)
    assert str(path) in text


def test_wrong_label_in_cifar10(cifar_folder):
    images, labels = random_images(NUM_BATCH, 3, 32, 32)
    labels[2] = 77
    write_cifar(cifar_folder / "test_batch.bin", images, labels)
    assert "test_batch.bin" in fails("cifar10", cifar_folder, "it holds the label 77, and the last one is 9")


def test_unreadable_file(cifar_folder, monkeypatch):
    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.open", refuse)
    fails("cifar10", cifar_folder, f"Cannot read '{cifar_folder / 'data_batch_1.bin'}' (Permission denied)")
