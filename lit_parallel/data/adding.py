"""The adding problem: remember two numbers over a long time (Hochreiter and Schmidhuber, 1997)."""

import numpy as np
import torch

from lit_parallel.data.in_memory import InMemoryData, Samples
from lit_parallel.data.options import AddingOptions
from lit_parallel.memory import check_memory

# Two streams of random numbers that no seed makes one.
_TRAINING, _TEST = 0, 1


class AddingData(InMemoryData):
    """Sequences of random numbers, two of which are marked; the target is the sum of these two.

    Every loader yields ``(sequences, sums)``: float32 ``[batch, time, 2]`` and ``[batch]``. The training sequences
    depend on the seed, the test sequences do not.

    Attributes:
        task: What a model of it has to be told (``model.task``).
        target_variance: The mean squared error of always answering 1, the mean.
    """

    name = "adding"
    task = "regression"
    target_variance = 1 / 6
    options: AddingOptions

    def __init__(self, options: AddingOptions, seed: int):
        """See `InMemoryData`; the seed also draws the training sequences."""
        super().__init__(options, seed)
        numbers = 3 * options.length * (options.size + options.test_size)  # inputs, and what one of them is drawn from
        check_memory(4 * numbers, "set a smaller data.size, data.test_size or data.length")

    @property
    def sample_shape(self) -> tuple[int, int]:
        """Time and features."""
        return self.options.length, 2

    def all_samples(self) -> tuple[Samples, Samples]:
        """See `InMemoryData`."""
        options = self.options
        return (
            adding_problem(options.size, options.length, np.random.default_rng([_TRAINING, self.seed])),
            adding_problem(options.test_size, options.length, np.random.default_rng([_TEST])),
        )


def adding_problem(number: int, length: int, random: np.random.Generator) -> Samples:
    """Draw sequences of the adding problem.

    Args:
        number: How many.
        length: Time steps, at least 2.
        random: Where the randomness comes from.

    Returns:
        Inputs ``[number, length, 2]``: a number from 0 to 1, and 1 where it is marked, else 0: once in the first half,
        once in the second (the longer one, if the length is odd). Targets ``[number]``: the sum of the marked numbers.
    """
    half = length // 2
    inputs = torch.zeros(number, length, 2)
    inputs[:, :, 0] = torch.from_numpy(random.random((number, length), dtype=np.float32))
    marked = torch.from_numpy(np.stack([random.integers(0, half, number), random.integers(half, length, number)]))
    rows = torch.arange(number)
    inputs[rows, marked, 1] = 1
    return Samples(inputs, inputs[rows, marked, 0].sum(dim=0))
