"""Small colour patches of two photographs that need no download."""

import numpy as np

from lit_parallel.data.image_data import ImageData, ImageSet

BLOCK = 64  # pixels; patches never cross the border between two blocks
STRIDE = 4
TEST_EVERY = 7  # no divisor of the ten blocks in a row: the test blocks are spread over the photograph


class Photos32Data(ImageData):
    """32x32 patches of the two sample photographs of scikit-learn; the label is the photograph.

    The photographs are cut into blocks and the blocks into overlapping patches. Training, validation and test take
    whole blocks, so that they have no pixel in common.
    """

    name = "photos32"
    image_shape = (3, 32, 32)
    num_classes = 2
    group_size = 2 * ((BLOCK - 32) // STRIDE + 1) ** 2  # what one block of each photograph gives

    def load(self) -> tuple[ImageSet, ImageSet]:
        """See `ImageData`."""
        from sklearn.datasets import load_sample_images  # slow to import, and a dependency of this dataset alone

        # [block, patch, photograph, channel, height, width]: the labels alternate, and a group is one block of each
        patches = np.stack([cut(photograph) for photograph in load_sample_images().images], axis=2)
        labels = np.broadcast_to(np.arange(self.num_classes), patches.shape[:3])
        is_test = np.arange(len(patches)) % TEST_EVERY == 0
        train, test = (
            ImageSet.from_numpy(patches[blocks].reshape(-1, *self.image_shape), labels[blocks].reshape(-1))
            for blocks in (~is_test, is_test)
        )
        return train, test


def cut(photograph: np.ndarray) -> np.ndarray:
    """Cut a photograph into blocks and each block into patches.

    Args:
        photograph: ``[height, width, 3]``; what is left over at the right and lower border is not used.

    Returns:
        ``[block, patch, 3, 32, 32]``.
    """
    rows, columns = photograph.shape[0] // BLOCK, photograph.shape[1] // BLOCK
    blocks = photograph[: rows * BLOCK, : columns * BLOCK].reshape(rows, BLOCK, columns, BLOCK, 3).swapaxes(1, 2)
    blocks = blocks.reshape(-1, BLOCK, BLOCK, 3)
    windows = np.lib.stride_tricks.sliding_window_view(blocks, (32, 32), axis=(1, 2))[:, ::STRIDE, ::STRIDE]
    return windows.reshape(len(blocks), -1, 3, 32, 32)
