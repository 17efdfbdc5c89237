"""Images reduced by area, the adding problem, and the characters of a text."""

import sys

import numpy as np
import pytest
import torch

from lit_parallel.data.adding import adding_problem
from lit_parallel.data.characters import ALPHABET, encode, manual
from lit_parallel.data.datasets import build_data
from lit_parallel.data.image_data import area_average
from lit_parallel.data.options import AddingOptions, CharactersOptions, DataOptions
from lit_parallel.errors import UserError


def adding(seed=0, **options):
    return build_data(AddingOptions(**{"length": 7, "size": 40, "test_size": 10, "batch_size": 8, **options}), seed)


def characters(path=None, seed=0, **options):
    return build_data(CharactersOptions(**{"file": path and str(path), "length": 5, "batch_size": 4, **options}), seed)


def whole(loader):
    inputs, targets = zip(*loader, strict=True)
    return torch.cat(inputs), torch.cat(targets)


# -- pixels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [1, 7, 10, 28])
def test_an_area_average_is_the_mean_of_so_many_copies_of_each_pixel(side):
    images = torch.randint(0, 256, (3, 2, 28, 28), dtype=torch.uint8)
    copies = images.double().repeat_interleave(side, dim=2).repeat_interleave(side, dim=3)
    means = copies.unflatten(3, (side, 28)).unflatten(2, (side, 28)).mean(dim=(3, 5))
    found = area_average(images, side)
    assert found.dtype == torch.uint8
    assert found.shape == (3, 2, side, side)
    assert (found - means).abs().max() < 0.5001


def test_a_pixel_that_lies_in_two_areas_counts_in_both():
    image = torch.tensor([[0, 30, 60], [0, 30, 60], [90, 90, 90]], dtype=torch.uint8)[None, None]
    # Areas of 1.5 x 1.5 pixels: above, a third of the means lies in the middle row and column.
    left, right = (0 + 30 / 2) / 1.5, (30 / 2 + 60) / 1.5
    expected = [[left, right], [(left * 0.5 + 90) / 1.5, (right * 0.5 + 90) / 1.5]]
    assert torch.equal(area_average(image, 2)[0, 0], torch.tensor(expected).round().to(torch.uint8))


def test_an_even_image_stays_as_it_is():
    assert (area_average(torch.full((2, 1, 28, 28), 255, dtype=torch.uint8), 10) == 255).all()


@pytest.mark.parametrize(("name", "channels"), [("mnist5k", 1), ("photos32", 3)])
def test_reduced_images_keep_their_labels_and_order(name, channels):
    plain, reduced = (build_data(DataOptions(name=name, side=side), seed=1) for side in (None, 10))
    assert reduced.sample_shape == (channels, 10, 10)
    assert plain.sample_shape == plain.image_shape
    for part in ("val_dataloader", "test_dataloader"):
        images, labels = whole(getattr(plain, part)())
        small, small_labels = whole(getattr(reduced, part)())
        assert small.shape == (len(images), channels, 10, 10)
        assert small.dtype == torch.uint8
        assert torch.equal(small, area_average(images, 10))
        assert torch.equal(small_labels, labels)
    assert torch.equal(reduced.test_images(), small)
    training = reduced.train_dataloader().dataset
    assert torch.equal(training.images, area_average(plain.train_dataloader().dataset.images, 10))
    assert torch.equal(training.labels, plain.train_dataloader().dataset.labels)


def test_images_are_not_enlarged():
    with pytest.raises(UserError, match=r"^data.side=29 would enlarge .* mnist5k, which have 28x28 .* at most 28\.$"):
        build_data(DataOptions(side=29), seed=0)


def test_evaluation_may_have_batches_of_its_own():
    data = adding(batch_size=1, evaluation_batch_size=4, validation_fraction=0.25)
    sizes = [
        [len(targets) for _, targets in loader]
        for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    ]
    assert sizes == [[1] * 30, [4, 4, 2], [4, 4, 2]]


# -- the adding problem -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2, 3, 10, 101])
def test_the_target_is_the_sum_of_one_number_in_each_half(length):
    samples = adding_problem(500, length, np.random.default_rng(0))
    numbers, marks = samples.inputs.unbind(2)
    assert samples.inputs.shape == (500, length, 2)
    assert samples.inputs.dtype == samples.targets.dtype == torch.float32
    assert set(marks.unique().tolist()) <= {0.0, 1.0}
    assert (marks[:, : length // 2].sum(dim=1) == 1).all()
    assert (marks[:, length // 2 :].sum(dim=1) == 1).all()
    torch.testing.assert_close(samples.targets, (numbers * marks).sum(dim=1))


def test_numbers_and_places_are_uniform():
    samples = adding_problem(4000, 10, np.random.default_rng(0))
    numbers, marks = samples.inputs.unbind(2)
    assert float(numbers.mean()) == pytest.approx(1 / 2, abs=0.01)
    assert float(numbers.var()) == pytest.approx(1 / 12, abs=0.002)
    torch.testing.assert_close(marks.mean(dim=0), torch.full((10,), 0.2), atol=0.03, rtol=0)
    assert float(samples.targets.var()) == pytest.approx(adding().target_variance, abs=0.01)


def test_sequences_depend_on_the_seed_and_test_sequences_do_not():
    first, again, other = (adding(seed) for seed in (3, 3, 4))
    assert first.sample_shape == (7, 2)
    for data in (first, again, other):
        data.setup()
    for mine, same in zip(whole(first.val_dataloader()), whole(again.val_dataloader()), strict=True):
        assert torch.equal(mine, same)
    seen = [{float(sum_) for sum_ in whole(data.test_dataloader())[1]} for data in (first, other)]
    assert seen[0] == seen[1]
    everything = [
        {float(sum_) for sum_ in torch.cat([whole(data.val_dataloader())[1], whole(data.train_dataloader())[1]])}
        for data in (first, other, adding(0))
    ]
    assert not everything[0] & everything[1]
    assert not any(part & seen[0] for part in everything)


def test_sizes_are_as_asked_for():
    data = adding(size=40, test_size=5, validation_fraction=0.25, batch_size=1)
    parts = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    assert [len(loader) for loader in parts] == [30, 10, 5]


# -- characters -------------------------------------------------------------------------------------------------------


def decode(codes):
    return "".join((ALPHABET + "?")[code] for code in codes)


def test_every_character_has_a_place_and_all_unknown_ones_share_the_last():
    assert len(set(ALPHABET)) == 96
    codes = encode(ALPHABET + "\t\x7fé€😀\ufffd\ud800")
    assert codes.dtype == torch.uint8
    assert codes.tolist() == [*range(96), *[96] * 7]
    assert characters().sample_shape == (5, 97)


def test_the_target_of_a_character_is_the_next_one_and_pieces_are_the_text(tmp_path):
    text = "The quick brown fox\njumps over the lazy dog, again and again and again."
    (tmp_path / "text").write_text(text, encoding="utf-8")
    data = characters(tmp_path / "text", batch_size=1, validation_fraction=0.25)
    parts = [whole(getattr(data, f"{part}_dataloader")()) for part in ("train", "val", "test")]
    assert [len(inputs) for inputs, _ in parts] == [10, 3, 1]  # 14 pieces of 5, and one character that is predicted
    pieces = {decode(inputs): decode(targets) for part in parts for inputs, targets in zip(*part, strict=True)}
    assert pieces == {text[i : i + 5]: text[i + 1 : i + 6] for i in range(0, 70, 5)}
    assert decode(parts[2][0][0]) == text[65:70]
    assert decode(parts[2][1][0]) == text[66:]


def test_the_end_of_the_text_is_to_test_with_whatever_the_seed(tmp_path):
    (tmp_path / "text").write_text("".join(map(chr, range(33, 115))), encoding="utf-8")
    first, other = (characters(tmp_path / "text", seed, length=2, validation_fraction=0.5) for seed in (1, 2))
    for data in (first, other):
        assert decode(whole(data.test_dataloader())[0].flatten()) == "".join(map(chr, range(105, 113)))
    assert not torch.equal(whole(first.val_dataloader())[0], whole(other.val_dataloader())[0])


def test_the_manual_comes_with_python_and_no_paragraph_stands_in_it_twice():
    text = manual()
    assert len(text) > 200_000
    assert "*******" in text
    paragraphs = text.split("\n\n")
    assert len(set(paragraphs)) == len(paragraphs)
    data = characters(length=1000)
    parts = [whole(getattr(data, f"{part}_dataloader")()) for part in ("val", "test")]
    numbers = [len(data.samples("train")), *(len(inputs) for inputs, _ in parts)]
    assert sum(numbers) == (len(text) - 1) // 1000
    assert numbers[2] == sum(numbers) // 10
    assert (
        decode(parts[1][0][0]) == "".join(c if c in ALPHABET else "?" for c in text)[1000 * sum(numbers[:2]) :][:1000]
    )


def test_what_is_not_utf8_is_read_as_unknown_characters(tmp_path):
    (tmp_path / "text").write_bytes(b"ab\xffcd" * 5)
    inputs, _ = whole(characters(tmp_path / "text").test_dataloader())
    assert decode(inputs[0]) == "ab?cd"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"^Cannot read data\.file='.*text' \(No such file or directory\): set it to a text file\.$"),
        (b"0123456789", r"^The text has 10 characters, and data\.length=5 needs 11 to train and test with: set a "),
        (b"", r"^The text has 0 characters"),
    ],
)
def test_a_text_that_cannot_be_used_is_told_in_one_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        characters(tmp_path / "text").setup()
    assert "\n" not in str(caught.value)


def test_the_shortest_text_trains_and_tests(tmp_path):
    (tmp_path / "text").write_text("0123456789A", encoding="utf-8")
    data = characters(tmp_path / "text")
    assert [decode(whole(data.test_dataloader())[i][0]) for i in (0, 1)] == ["56789", "6789A"]


def test_other_files_and_folders_are_refused_in_one_line(tmp_path, monkeypatch):
    for path in (tmp_path, "nul\0nul"):
        with pytest.raises(UserError, match=r"^Cannot read data\.file="):
            characters(path).setup()
    (tmp_path / "text").write_text("0123456789A", encoding="utf-8")
    monkeypatch.setattr("lit_parallel.memory.machine_memory", lambda: 11)
    with pytest.raises(UserError, match=r"is too long, use a part of it: it would take "):
        characters(tmp_path / "text").setup()


def test_a_python_without_its_manual_asks_for_a_text(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(
        UserError, match=r"^This Python comes without its manual .* set data\.file=PATH, a text file\.$"
    ):
        characters().setup()
