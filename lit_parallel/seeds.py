"""Seeds of random numbers that depend on where they are drawn, and on nothing that was drawn before."""

import numpy as np


def seed_of(*numbers: int) -> int:
    """One seed for torch from several numbers, such as a run's seed, an epoch and a batch.

    Args:
        numbers: Not negative. Their order counts.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
