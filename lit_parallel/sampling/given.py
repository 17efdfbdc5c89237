"""From ``inpaint`` in a config to given pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lit_parallel.errors import UserError, did_you_mean, one_line
from lit_parallel.sampling.autoregressive import Given
from lit_parallel.sampling.options import REGIONS, InpaintOptions


def load_given(options: InpaintOptions, image_shape: tuple[int, int, int], test_images: Tensor | None) -> Given | None:
    """The given pixels that the options describe, or ``None`` if there are none.

    Args:
        options: The config's ``inpaint`` group.
        image_shape: Channels, height, width of the model.
        test_images: uint8 ``[n, channels, height, width]``, what ``images=test`` means.

    Raises:
        UserError: If a file cannot be read or does not fit the model.
    """
    if options.images is None:
        if options.given != InpaintOptions().given:
            raise UserError(f"inpaint.given={options.given} needs images: set inpaint.images=test, or a file.")
        return None
    if options.images == "test":
        assert test_images is not None
        images = test_images
    else:
        images = _read_images(Path(options.images), image_shape)
    given = Given(images, _mask(options.given, image_shape))
    given.check(image_shape)
    return given


def _mask(name: str, image_shape: tuple[int, int, int]) -> Tensor:
    _, height, width = image_shape
    if name not in REGIONS:
        path = Path(name)
        if not path.is_file():
            raise UserError(
                f"inpaint.given must be {', '.join(REGIONS)} or a picture; there is no '{name}'."
                f"{did_you_mean(name, REGIONS)}"
            )
        return torch.from_numpy(_picture(path, "L", image_shape) > 127)
    mask = torch.zeros(height, width, dtype=torch.bool)
    if name == "border":
        mask[:] = True
        mask[height // 4 : height - height // 4, width // 4 : width - width // 4] = False
    else:
        rows = {"top": slice(height // 2), "bottom": slice(height - height // 2, None)}.get(name, slice(None))
        columns = {"left": slice(width // 2), "right": slice(width - width // 2, None)}.get(name, slice(None))
        mask[rows, columns] = True
    return mask


def _read_images(path: Path, image_shape: tuple[int, int, int]) -> Tensor:
    if not path.is_file():
        raise UserError(f"inpaint.images: there is no file '{path}'; it may also be 'test'.")
    if path.suffix != ".npy":
        picture = _picture(path, "L" if image_shape[0] == 1 else "RGB", image_shape)
        return torch.from_numpy(picture.reshape(1, *image_shape[1:], -1)).permute(0, 3, 1, 2).contiguous()
    try:
        # Mapped first: memory is taken for what is in the file, not for what its header promises.
        return torch.from_numpy(np.array(np.load(path, mmap_mode="r", allow_pickle=False)))
    except Exception as error:  # on damaged bytes numpy raises almost anything
        reason = one_line(error) or type(error).__name__
        raise UserError(f"inpaint.images: cannot read '{path}' ({reason}).") from error


def _picture(path: Path, mode: str, image_shape: tuple[int, int, int]) -> np.ndarray:
    try:
        with Image.open(path) as picture:
            height, width = image_shape[1:]
            if picture.size != (width, height):  # before memory is taken for them
                raise UserError(
                    f"the picture '{path}' is {picture.width}x{picture.height} pixels; the model's images are "
                    f"{width}x{height}: scale it first."
                )
            return np.array(picture.convert(mode))
    except UserError:
        raise
    except Exception as error:  # on damaged bytes Pillow raises almost anything
        reason = one_line(error) or type(error).__name__
        raise UserError(f"'{path}' is not a picture that can be read ({reason}).") from error
