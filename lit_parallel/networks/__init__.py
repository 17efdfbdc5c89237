"""Plain networks; none knows Lightning or a solver."""

from lit_parallel.networks.made import MADE
from lit_parallel.networks.pixelcnnpp import PixelCNNpp

__all__ = ["MADE", "PixelCNNpp"]
