"""Whether float32 may be multiplied with fewer digits (TF32) on a GPU."""

import torch


def convolutions_may_use_tf32() -> bool:
    """Whether cuDNN may, by either of PyTorch's switches: the older refuses to answer where the newer was used.

    Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#tensorfloat-32-tf32-on-ampere-and-later-devices
    """
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
