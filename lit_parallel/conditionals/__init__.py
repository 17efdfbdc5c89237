"""Distributions of one position's values, and the couplings that sample them."""

from lit_parallel.conditionals.base import Conditional, LevelConditional
from lit_parallel.conditionals.categorical import Categorical
from lit_parallel.conditionals.logistic import Logistic
from lit_parallel.conditionals.mixture import DiscretizedLogisticMixture

__all__ = ["Categorical", "Conditional", "DiscretizedLogisticMixture", "LevelConditional", "Logistic"]
