"""The options of models and optimisers, as they stand under ``model`` and ``optimizer`` in a config."""

from dataclasses import dataclass

from lit_parallel.options import option


@dataclass
class MadeOptions:
    """A MADE: masked multilayer perceptron with a logistic distribution per pixel."""

    name: str = option("made", "the kind of model", choices=("made",))
    hidden_sizes: list[int] = option([512, 512], "units of each hidden layer")
    order: str = option("natural", "order in which pixels are generated", choices=("natural", "random"))
    degrees: str = option("spaced", "how hidden units are assigned to positions", choices=("spaced", "random"))
    num_masks: int = option(1, "masks that training cycles through; evaluation and sampling use the first")
    mask_seed: int = option(0, "seed of random orders and degrees")
    logit_lambda: float | None = option(None, "squeeze of the logit transform (default: 1e-6 grey, 0.05 colour)")


MODEL_OPTIONS: dict[str, type] = {"made": MadeOptions}


@dataclass
class OptimizerOptions:
    """AdamW with linear warm-up and cosine decay."""

    lr: float = option(1e-3, "highest learning rate")
    weight_decay: float = option(1e-4, "decoupled weight decay")
    beta1: float = option(0.9, "decay of the gradient's running mean")
    beta2: float = option(0.999, "decay of the squared gradient's running mean")
    warmup_fraction: float = option(0.02, "part of all steps over which the learning rate rises")
    final_lr_fraction: float = option(0.01, "learning rate at the end, relative to the highest")
