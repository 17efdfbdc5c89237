"""Folders of class folders: what is read, how it is cut, and what can be wrong with them."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F  # noqa: N812

from lit_parallel.data import image_folder
from lit_parallel.data.datasets import build_data
from lit_parallel.data.image_folder import ImageFolderData, center_crop, random_resized_crop
from lit_parallel.data.options import ImageFolderOptions
from lit_parallel.errors import UserError

CLASSES = {"n01": (250, 10, 10), "n02": (10, 250, 10), "n10": (10, 10, 250)}
PER_CLASS = {"train": 10, "val": 2}


def write(path, colour, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Images of one colour, which is their class's; their sizes differ."""
    for part, number in PER_CLASS.items():
        for name, colour in CLASSES.items():
            for index in range(number):
                write(tmp_path / part / name / f"{index}.JPEG", colour, (40 + index, 30))
    return tmp_path


def data_of(folder, seed=0, **options):
    small = {"resize": 20, "crop": 16, "batch_size": 6, "validation_fraction": 0.2}
    return ImageFolderData(ImageFolderOptions(folder=folder and str(folder), **{**small, **options}), seed)


def refusal(act) -> str:
    with pytest.raises(UserError) as caught:
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- what is read -----------------------------------------------------------------------------------------------------


def test_batches_are_eight_bit_images_with_the_labels_of_their_folders(folder):
    data = data_of(folder)
    assert (data.sample_shape, data.num_classes) == ((3, 16, 16), 3)
    counts = {"train": 0, "val": 0, "test": 0}
    for name in counts:
        for images, labels in getattr(data, f"{name}_dataloader")():
            assert (images.dtype, tuple(images.shape[1:])) == (torch.uint8, (3, 16, 16))
            assert (labels.dtype, tuple(labels.shape)) == (torch.int64, (len(images),))
            assert torch.equal(images.float().mean(dim=(2, 3)).argmax(dim=1), labels)  # red, green, blue
            counts[name] += len(labels)
    assert counts == {"train": 24, "val": 6, "test": 6}


def test_a_config_finds_it(folder):
    data = build_data(ImageFolderOptions(folder=str(folder)), seed=0)
    assert isinstance(data, ImageFolderData)
    assert data.sample_shape == (3, 224, 224)


def test_nothing_is_decoded_before_it_is_needed(folder, monkeypatch):
    read = []
    monkeypatch.setattr(image_folder, "read_image", lambda path: read.append(path) or Image.new("RGB", (20, 20)))
    data = data_of(folder)
    data.setup("fit")
    assert read == []
    next(iter(data.train_dataloader()))
    assert len(read) == 6


def test_the_split_depends_on_the_seed_alone_and_tears_no_file_into_both(folder):
    def names(data, part):
        return sorted(data.samples(part).names.tolist())

    first, again, other = data_of(folder, 3), data_of(folder, 3), data_of(folder, 4)
    assert names(first, "validation") == names(again, "validation") != names(other, "validation")
    everything = names(first, "train") + names(first, "validation")
    assert sorted(everything) == sorted(f"{name}/{index}.JPEG".encode() for name in CLASSES for index in range(10))


def test_training_alone_is_random(folder):
    data = data_of(folder)
    assert [data.samples(part).augment for part in ("train", "validation", "test")] == [True, False, False]
    assert not data_of(folder, augment=False).samples("train").augment


def test_other_modes_names_and_files(tmp_path):
    write(tmp_path / "val" / "a" / "grün 1.PNG", CLASSES["n02"])
    Image.new("L", (30, 30), 77).save(tmp_path / "val" / "a" / "2.jpg")
    Image.new("CMYK", (30, 30)).save(tmp_path / "val" / "a" / "3.jpeg")
    Image.new("RGBA", (30, 30), (1, 2, 3, 0)).save(tmp_path / "val" / "a" / "4.png")
    (tmp_path / "val" / "a" / "notes.txt").write_text("no image")
    (tmp_path / "val" / "a" / "._2.jpg").write_text("left by another system")
    (tmp_path / "val" / ".hidden").mkdir()
    ((images, labels),) = data_of(tmp_path).test_dataloader()
    assert labels.tolist() == [0] * 4
    assert images[0].unique().tolist() == [77]
    assert images[1].unique().tolist() == [255]
    assert images[2, :, 0, 0].tolist() == [1, 2, 3]
    assert images[3, :, 0, 0].tolist() == [*CLASSES["n02"]]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_workers_deliver_the_same_images(folder):
    def everything(workers):
        batches = data_of(folder, num_workers=workers).test_dataloader()
        return [torch.cat(column) for column in zip(*batches, strict=True)]

    assert all(map(torch.equal, everything(1), everything(0)))


# -- how it is cut ----------------------------------------------------------------------------------------------------


def picture(width, height):
    """Waves, so that a shift by a part of a pixel shows."""
    rows, columns = np.mgrid[:height, :width]
    wave = np.stack([columns * 255 / width, rows * 255 / height, 127 + 100 * np.sin(columns / 2 + rows / 3)], axis=-1)
    return Image.fromarray(wave.astype(np.uint8))


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (256, 256), (281, 500), (120, 90)])
def test_evaluation_is_as_published(width, height):
    image = picture(width, height)
    # torchvision.transforms: Resize(256) rounds down, CenterCrop(224) to the nearest even number.
    size = (256, int(256 * width / height)) if width >= height else (int(256 * height / width), 256)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].double()
    resized = F.interpolate(pixels, size, mode="bilinear", antialias=True)[0]
    top, left = (round((side - 224) / 2) for side in size)
    expected = resized[:, top : top + 224, left : left + 224]
    found = torch.from_numpy(np.array(center_crop(image, 256, 224))).permute(2, 0, 1)
    assert found.shape == (3, 224, 224)
    assert (found - expected).abs().max() <= 1.5  # Pillow rounds to 8 bits in between


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (281, 500)])
def test_evaluation_is_torchvisions(width, height):
    transforms = pytest.importorskip("torchvision.transforms")
    image = picture(width, height)
    expected = transforms.CenterCrop(224)(transforms.Resize(256)(image))
    assert np.array_equal(np.array(center_crop(image, 256, 224)), np.array(expected))


def test_training_cuts_parts_of_the_right_area_and_shape():
    width, height = 400, 300
    image = Image.fromarray(np.stack([np.mgrid[:height, :width][i] // 2 for i in (1, 0, 0)], axis=-1).astype(np.uint8))
    areas, ratios, mirrored, places = [], [], 0, set()
    for _ in range(200):
        cut = np.array(random_resized_crop(image, 16)).astype(float)
        assert cut.shape == (16, 16, 3)
        # From the mean difference of neighbouring pixels, the size of the part.
        w, h = abs(np.diff(cut[:, :, 0], axis=1).mean()) * 32, np.diff(cut[:, :, 1], axis=0).mean() * 32
        areas.append(w * h / (width * height))
        ratios.append(w / h)
        mirrored += cut[0, 0, 0] > cut[0, -1, 0]
        places.add(round(cut[:, :, 1].mean()))
    assert 0.06 < min(areas) < 0.15
    assert 0.85 < max(areas) < 1.05
    assert 0.65 < min(ratios) < 0.85
    assert 1.15 < max(ratios) < 1.45
    assert 70 < mirrored < 130
    assert len(places) > 20


@pytest.mark.parametrize("size", [(2, 300), (300, 2), (1, 1)])
def test_training_cuts_the_centre_of_a_very_long_image(size):
    image = Image.new("RGB", size, (0, 0, 9))
    image.putpixel((size[0] // 2, size[1] // 2), (9, 9, 9))
    cut = random_resized_crop(image, 8)
    assert cut.size == (8, 8)
    assert np.array(cut)[:, :, 0].max() > 0


def test_the_seed_of_torch_decides():
    image = picture(60, 50)
    torch.manual_seed(1)
    first, second = (np.array(random_resized_crop(image, 16)) for _ in range(2))
    torch.manual_seed(1)
    assert np.array_equal(np.array(random_resized_crop(image, 16)), first)
    assert not np.array_equal(first, second)


# -- what can be wrong ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("content", ["half", b"<html>", b""])
def test_a_broken_image_is_named_in_one_line(folder, workers, content):
    path = folder / "val" / "n02" / "1.JPEG"
    complete = path.read_bytes()
    path.write_bytes(complete[: len(complete) // 2] if content == "half" else content)
    message = refusal(lambda: list(data_of(folder, num_workers=workers).test_dataloader()))
    assert message.startswith(f"Cannot read the image '{path}' (")


@pytest.mark.parametrize("empty", [False, True])
def test_a_test_needs_no_training_images(folder, empty):
    for path in sorted((folder / "train").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    if not empty:
        (folder / "train").rmdir()
    data = data_of(folder)
    data.setup("test")
    assert (data.num_classes, len(data.samples("test"))) == (3, 6)
    expected = f"'{folder / 'train'}' holds no class folders" if empty else f"There is no folder '{folder / 'train'}'"
    assert expected in refusal(lambda: data.setup("fit"))


def test_a_missing_folder():
    assert "set data.folder=PATH" in refusal(lambda: data_of(None).setup("fit"))


def test_no_test_folder(tmp_path):
    write(tmp_path / "train" / "a" / "1.png", (1, 2, 3))
    assert f"There is no folder '{tmp_path / 'val'}'" in refusal(lambda: data_of(tmp_path).setup("fit"))


def test_an_empty_class(folder):
    (folder / "val" / "n02" / "0.JPEG").unlink()
    (folder / "val" / "n02" / "1.JPEG").unlink()
    assert f"'{folder / 'val' / 'n02'}' holds no images" in refusal(lambda: data_of(folder).setup("test"))


def test_a_class_that_training_does_not_have(folder):
    write(folder / "val" / "n03" / "1.JPEG", (1, 2, 3))
    assert f"'{folder / 'val' / 'n03'}' is a class that 'train'" in refusal(lambda: data_of(folder).setup("test"))


def test_images_without_classes(tmp_path):
    write(tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG", (1, 2, 3))
    message = refusal(lambda: data_of(tmp_path).setup("test"))
    assert f"'{tmp_path / 'val'}' holds no class folders but images without classes" in message


def test_a_crop_larger_than_the_image():
    assert "data.crop=30 exceeds data.resize=20" in refusal(lambda: data_of(None, crop=30))


def test_no_given_images_for_sampling(folder):
    assert "inpaint.images=PATH" in refusal(data_of(folder).test_images)
