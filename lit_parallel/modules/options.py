"""The options of models and optimisers, as they stand under ``model`` and ``optimizer`` in a config."""

from dataclasses import dataclass

from lit_parallel.options import MAX_SEED, option

TASKS = ("next_pixel", "classification", "regression")
CELLS = ("softplus", "rnn", "rnn_relu", "gru", "lstm")


@dataclass
class MadeOptions:
    """A MADE: masked multilayer perceptron with a logistic distribution per pixel."""

    name: str = option("made", "the kind of model", choices=("made",))
    hidden_sizes: list[int] = option([512, 512], "units of each hidden layer", minimum=1, non_empty=True)
    order: str = option("natural", "order in which pixels are generated", choices=("natural", "random"))
    degrees: str = option("spaced", "how hidden units are assigned to positions", choices=("spaced", "random"))
    num_masks: int = option(1, "masks that training cycles through; evaluation and sampling use the first", minimum=1)
    mask_seed: int = option(0, "seed of random orders and degrees", minimum=0, maximum=MAX_SEED)
    logit_lambda: float | None = option(
        None, "squeeze of the logit transform (null: 1e-6 for grey, 0.05 for colour)", above=0, below=0.5
    )


@dataclass
class PixelCNNppOptions:
    """A PixelCNN++: causal convolutions with a mixture of discretised logistics per pixel."""

    name: str = option("pixelcnnpp", "the kind of model", choices=("pixelcnnpp",))
    filters: int = option(160, "features of each of the two streams", minimum=1)
    resnets: int = option(5, "gated resnets per resolution", minimum=1)
    mixtures: int = option(10, "logistics in the mixture of a pixel", minimum=1)
    dropout: float = option(0.5, "part of the features that training leaves out", minimum=0, below=1)
    num_classes: int | None = option(None, "labels that condition the network (null: none)", minimum=1)
    initial_images: int = option(100, "training images from which the weights are initialised", minimum=1)


@dataclass
class RnnOptions:
    """A recurrent network that predicts pixels, or answers when it has read a sequence."""

    name: str = option("rnn", "the kind of model", choices=("rnn",))
    task: str = option("next_pixel", "next_pixel and classification of images; regression of sequences", choices=TASKS)
    cell: str = option("lstm", "what is computed at every time step", choices=CELLS)
    hidden_size: int = option(128, "numbers in a hidden state", minimum=1)
    layers: int = option(1, "recurrent layers, one upon the other", minimum=1)
    dropout: float = option(0.0, "part of the states between layers that training leaves out", minimum=0, below=1)
    bidirectional: bool = option(False, "read the sequence from both ends")
    forget_bias: float | None = option(
        None, "lstm, gru: first bias of the gate that keeps the state; b keeps it about e^b steps (null: PyTorch's)"
    )
    num_classes: int | None = option(None, "classification: labels (null: 10)", minimum=1)


MODEL_OPTIONS: dict[str, type] = {"made": MadeOptions, "pixelcnnpp": PixelCNNppOptions, "rnn": RnnOptions}


@dataclass
class OptimizerOptions:
    """AdamW or SGD with linear warm-up and cosine decay."""

    name: str = option("adamw", "the method; sgd is without momentum", choices=("adamw", "sgd"))
    lr: float = option(1e-3, "highest learning rate", above=0)
    weight_decay: float = option(1e-4, "decoupled weight decay", minimum=0)
    beta1: float = option(0.9, "adamw: decay of the gradient's running mean", minimum=0, below=1)
    beta2: float = option(0.999, "adamw: decay of the squared gradient's running mean", minimum=0, below=1)
    warmup_fraction: float = option(0.02, "part of all steps over which the learning rate rises", minimum=0, maximum=1)
    final_lr_fraction: float = option(0.01, "learning rate at the end, relative to the highest", minimum=0, maximum=1)
