"""Random changes to batches of images, held to plain loops over everything they may do."""

from collections import Counter

import pytest
import torch

from lit_parallel.data.augmentation import random_crop, random_crop_and_flip, random_flip
from lit_parallel.data.datasets import build_data
from lit_parallel.data.options import DATA_OPTIONS


def numbered(number, channels=2, height=3, width=5):
    """Images in which no two pixels are equal, and none is black."""
    return 1 + torch.arange(number * channels * height * width).reshape(number, channels, height, width)


def moved(image, down, right):
    """The image moved, pixel by pixel; black where nothing came from."""
    result = torch.zeros_like(image)
    _, height, width = image.shape
    for row in range(height):
        for column in range(width):
            if 0 <= row - down < height and 0 <= column - right < width:
                result[:, row, column] = image[:, row - down, column - right]
    return result


@pytest.mark.parametrize("padding", [1, 2])
def test_a_crop_is_the_image_moved_and_every_move_is_as_likely(padding):
    images = numbered(500)
    steps = range(-padding, padding + 1)
    moves = [(down, right) for down in steps for right in steps]
    found = Counter()
    for image, result in zip(images, random_crop(images, padding), strict=True):
        matching = [move for move in moves if torch.equal(moved(image, *move), result)]
        assert len(matching) == 1
        found.update(matching)
    assert found.keys() == set(moves)
    assert max(found.values()) < 2 * 500 / len(moves)


def test_crops_move_by_four_pixels_at_most():
    images = torch.full((2000, 1, 9, 9), 7, dtype=torch.uint8)
    cropped = random_crop(images)
    assert (cropped.dtype, cropped.shape) == (images.dtype, images.shape)
    assert (cropped[:, :, 4, 4] == 7).all()
    rows = (cropped[:, 0] > 0).any(dim=2).sum(dim=1)
    assert (rows.min(), rows.max()) == (5, 9)


def test_half_of_the_images_are_mirrored():
    images = numbered(400)
    flipped = random_flip(images)
    same = (flipped == images).flatten(1).all(dim=1)
    mirrored = (flipped == images.flip(3)).flatten(1).all(dim=1)
    assert (same ^ mirrored).all()
    assert 150 < mirrored.sum() < 250


def test_the_seed_of_torch_decides():
    images = numbered(20)
    torch.manual_seed(3)
    first, second = random_crop_and_flip(images), random_crop_and_flip(images)
    torch.manual_seed(3)
    assert torch.equal(random_crop_and_flip(images), first)
    assert not torch.equal(first, second)


def test_photographs_are_mirrored_and_digits_are_not():
    expected = {"mnist": random_crop, "mnist5k": random_crop, "cifar10": random_crop_and_flip}
    for name, augmentation in expected.items():
        data = build_data(DATA_OPTIONS[name](name=name), seed=0)
        assert data.augmentation is augmentation
