"""Plain networks; none knows Lightning or a solver."""

from lit_parallel.networks.made import MADE

__all__ = ["MADE"]
