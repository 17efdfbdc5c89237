"""What an evaluation of a part of an image stands on: which part, and what each layer remembers of the rest.

Caches are ``[batch, features, rows, columns]`` at their layer's resolution, features side by side in memory, so that
a row of an image is one piece. Which rows are read and written may differ per sample: then the first row is a tensor
on the device, and nothing here looks at it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rectangle:
    """A part of an image, or of its features.

    Attributes:
        top: First row; a tensor ``[batch]`` on the device if each sample has its own.
        rows: Number of rows.
        left: First column.
        columns: Number of columns.
        image: Rows and columns of all the image, at this resolution.
    """

    top: int | Tensor
    rows: int
    left: int
    columns: int
    image: tuple[int, int]

    @cached_property
    def halved(self) -> Rectangle:
        """The same part at half the resolution; it must begin at an even row and column."""
        height, width = self.image
        return Rectangle(
            self.top // 2, -(-self.rows // 2), self.left // 2, -(-self.columns // 2), (height // 2, width // 2)
        )

    @cached_property
    def doubled(self) -> Rectangle:
        """The same part at twice the resolution."""
        height, width = self.image
        return Rectangle(2 * self.top, 2 * self.rows, 2 * self.left, 2 * self.columns, (2 * height, 2 * width))

    @cached_property
    def remembered_rows(self) -> Tensor:
        """``[batch, 1 + rows]``: where a :class:`Memory` holds the row above and the rectangle's own."""
        assert isinstance(self.top, Tensor)
        first = torch.arange(len(self.top), device=self.top.device) * (self.image[0] + 1) + self.top
        return first[:, None] + torch.arange(self.rows + 1, device=self.top.device)


class Memory:
    """What a layer remembers of an image's features, in a frame of zeros: one row above, columns on either side.

    Args:
        like: ``[batch, features, ...]``, whose dtype and device the memory has.
        image: Rows and columns.
        left: Columns of zeros to the left.
        right: Columns of zeros to the right.
    """

    def __init__(self, like: Tensor, image: tuple[int, int], left: int = 0, right: int = 0) -> None:
        height, width = image
        self.left, self.right = left, right
        self._grid = like.new_zeros(len(like), height + 1, left + width + right, like.shape[1])
        self._rows = self._grid.flatten(0, 1)

    def keep(self, samples: Tensor) -> None:
        """Remember these samples only, by their places in the batch."""
        self._grid = self._grid[samples]
        self._rows = self._grid.flatten(0, 1)

    def write(self, x: Tensor, rectangle: Rectangle) -> None:
        """Remember the features ``[batch, features, rows, columns]`` of a part."""
        columns = slice(self.left + rectangle.left, self.left + rectangle.left + rectangle.columns)
        x = x.permute(0, 2, 3, 1)
        if isinstance(rectangle.top, Tensor):
            rows = rectangle.remembered_rows[:, 1:].flatten()
            self._rows[:, columns].index_copy_(0, rows, x.flatten(0, 1))
        else:
            self._grid[:, rectangle.top + 1 : rectangle.top + 1 + rectangle.rows, columns] = x

    def read(self, rectangle: Rectangle) -> Tensor:
        """The features of a part, of the row above it, and of the columns on either side of it.

        ``[batch, features, 1 + rows, left + columns + right]``.
        """
        columns = slice(rectangle.left, self.left + rectangle.left + rectangle.columns + self.right)
        if isinstance(rectangle.top, Tensor):
            found = self._rows[:, columns].index_select(0, rectangle.remembered_rows.flatten())
            found = found.unflatten(0, rectangle.remembered_rows.shape)
        else:
            found = self._grid[:, rectangle.top : rectangle.top + 1 + rectangle.rows, columns]
        return found.permute(0, 3, 1, 2)
