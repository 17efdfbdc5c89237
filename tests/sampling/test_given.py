"""Given pixels from the options under ``inpaint``."""

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import categorical

from lit_parallel.errors import UserError
from lit_parallel.sampling.given import load_given
from lit_parallel.sampling.options import REGIONS, InpaintOptions
from lit_parallel.sampling.sampler import sample

GREY, COLOUR = (1, 5, 7), (3, 5, 7)
TEST_IMAGES = torch.randint(0, 256, (3, *GREY), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))

PICTURES = {
    "top": ["#######", "#######", ".......", ".......", "......."],
    "bottom": [".......", ".......", ".......", "#######", "#######"],
    "left": ["###...."] * 5,
    "right": ["....###"] * 5,
    "border": ["#######", "#.....#", "#.....#", "#.....#", "#######"],
}


def load(images="test", given="top", shape=GREY):
    return load_given(InpaintOptions(str(images), str(given)), shape, TEST_IMAGES)


def message(**options) -> str:
    with pytest.raises(UserError) as error:
        load(**options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("region", REGIONS)
def test_regions(region):
    given = load(given=region)
    assert given.images is TEST_IMAGES
    drawn = ["".join("#" if pixel else "." for pixel in row) for row in given.mask.tolist()]
    assert drawn == PICTURES[region]


def test_nothing_is_given_unless_asked_for():
    assert load_given(InpaintOptions(), GREY, None) is None
    with pytest.raises(UserError, match=r"inpaint.given=left needs images: set inpaint.images=test, or a file\."):
        load_given(InpaintOptions(given="left"), GREY, None)


def test_an_array_of_images(tmp_path):
    images = TEST_IMAGES.numpy()
    np.save(tmp_path / "images.npy", images)
    assert torch.equal(load(tmp_path / "images.npy").images, TEST_IMAGES)
    np.save(tmp_path / "fortran.npy", np.asfortranarray(images))
    assert torch.equal(load(tmp_path / "fortran.npy").images, TEST_IMAGES)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1"])
@pytest.mark.parametrize("shape", [GREY, COLOUR])
def test_a_picture_of_any_kind_is_one_image_of_the_models_channels(tmp_path, mode, shape):
    rows = np.arange(5)[:, None] * 40 + np.arange(7) * 5
    picture = Image.fromarray(np.stack([rows, rows + 2, rows + 4], axis=-1).astype(np.uint8), "RGB").convert(mode)
    picture.save(tmp_path / "picture.png")
    images = load(tmp_path / "picture.png", shape=shape).images
    assert images.shape == (1, *shape)
    assert images.dtype == torch.uint8
    assert images.is_contiguous()
    expected = np.asarray(picture.convert("L" if shape is GREY else "RGB")).reshape(5, 7, -1)
    np.testing.assert_array_equal(images[0].permute(1, 2, 0).numpy(), expected)


def test_a_black_and_white_picture_says_what_is_kept(tmp_path):
    mask = np.arange(35).reshape(5, 7) % 3 == 0
    Image.fromarray(mask).save(tmp_path / "mask.png")
    np.testing.assert_array_equal(load(given=tmp_path / "mask.png").mask.numpy(), mask)
    Image.fromarray(np.where(mask, 128, 127).astype(np.uint8)).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(load(given=tmp_path / "grey.png").mask.numpy(), mask)


def test_what_was_loaded_is_what_is_kept(tmp_path):
    model = categorical((3, 2, 4), 256)
    colours = torch.randint(0, 256, (2, 3, 2, 4), dtype=torch.uint8)
    np.save(tmp_path / "images.npy", colours.numpy())
    given = load(tmp_path / "images.npy", "right", (3, 2, 4))
    images, solution = sample(model, 3, solver="jacobi", given=given)
    assert torch.equal(images[..., 2:], colours[[0, 1, 0]][..., 2:])
    assert not torch.equal(images[..., :2], colours[[0, 1, 0]][..., :2])
    assert solution.certified.all()


# -- mistakes ------------------------------------------------------------------------------------------------------


def test_missing_files_and_unknown_regions(tmp_path):
    assert message(images=tmp_path / "lost.png").endswith("lost.png'; it may also be 'test'.")
    assert message(images=tmp_path).startswith("inpaint.images: there is no file")
    text = message(given="lefft")
    assert text == (
        "inpaint.given must be top, bottom, left, right, border or a picture; there is no 'lefft'. Did you mean 'left'?"
    )
    assert "Known: border, bottom, left, right, top." in message(given=tmp_path / "mask.png")


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.zeros((2, 1, 5, 8), np.uint8), "uint8 of shape [n, 1, 5, 7], not uint8 of shape [2, 1, 5, 8]."),
        (np.zeros((1, 5, 7), np.uint8), "not uint8 of shape [1, 5, 7]."),
        (np.zeros((2, 5, 7, 1), np.uint8), "not uint8 of shape [2, 5, 7, 1]."),
        (np.zeros((0, 1, 5, 7), np.uint8), "there is no given image"),
        (np.zeros((), np.uint8), "not uint8 of shape []."),
        (np.zeros((2, 1, 5, 7)), "not float64 of shape [2, 1, 5, 7]."),
        (np.zeros((2, 1, 5, 7), ">f4"), "cannot read"),
        (np.zeros((2, 1, 5, 7), "U3"), "cannot read"),
        (np.array([{}], dtype=object), "cannot read"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path, array, expected):
    path = tmp_path / "images.npy"
    np.save(path, array, allow_pickle=True)
    assert expected in message(images=path)


def test_a_size_in_a_header_takes_no_memory(tmp_path):
    path = tmp_path / "images.npy"
    np.save(path, np.zeros((2, *GREY), np.uint8))
    path.write_bytes(path.read_bytes().replace(b"(2, 1, 5, 7)", b"(2000000000000, 1, 5, 7)"))
    assert "cannot read" in message(images=path)
    Image.new("L", (9000, 9000)).save(tmp_path / "large.png")
    assert "is 9000x9000 pixels; the model's images are 7x5" in message(images=tmp_path / "large.png")


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_a_pickle_is_refused_and_not_run(tmp_path, capsys):
    path = tmp_path / "images.npy"
    np.save(path, np.array([Evil()], dtype=object), allow_pickle=True)
    assert "cannot read" in message(images=path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x93NUMPY\x01\x00"])
@pytest.mark.parametrize("name", ["images.npy", "picture.png"])
def test_files_that_are_not_what_their_name_says(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    assert name in message(images=path)
    assert "is not a picture that can be read" in message(given=path)


def test_damaged_pictures(tmp_path):
    path = tmp_path / "picture.png"
    noise = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    for at in range(8, len(whole) - 12, 3):
        for damaged in (whole[:at], whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :]):
            path.write_bytes(damaged)
            try:
                load(images=path)
            except UserError as error:
                assert "\n" not in str(error)  # noqa: PT017 - what can be read nevertheless is no mistake


def test_pictures_of_another_size(tmp_path):
    Image.new("L", (8, 5)).save(tmp_path / "wide.png")
    for options in ({"images": tmp_path / "wide.png"}, {"given": tmp_path / "wide.png"}):
        assert message(**options).endswith("is 8x5 pixels; the model's images are 7x5: scale it first.")
