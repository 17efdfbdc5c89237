"""The options of models and optimisers, as they stand under ``model`` and ``optimizer`` in a config."""

from dataclasses import dataclass

from lit_parallel.options import MAX_SEED, option

TASKS = ("next_pixel", "classification", "regression", "next_character")
CELLS = ("softplus", "rnn", "rnn_relu", "gru", "lstm")
ARCHITECTURES = ("densenet121", "densenet161", "densenet169", "densenet201", "cifar", "custom")


@dataclass
class MadeOptions:
    """A MADE: masked multilayer perceptron with a logistic distribution per pixel."""

    name: str = option("made", "the kind of model", choices=("made",))
    hidden_sizes: list[int] = option(
        [512, 512], "units of each hidden layer", minimum=1, maximum=1 << 20, non_empty=True
    )
    order: str = option("natural", "order in which pixels are generated", choices=("natural", "random"))
    degrees: str = option("spaced", "how hidden units are assigned to positions", choices=("spaced", "random"))
    num_masks: int = option(
        1, "masks that training cycles through; evaluation and sampling use the first", minimum=1, maximum=1000
    )
    mask_seed: int = option(0, "seed of random orders and degrees", minimum=0, maximum=MAX_SEED)
    logit_lambda: float | None = option(
        None, "squeeze of the logit transform (null: 1e-6 for grey, 0.05 for colour)", above=0, below=0.5
    )


@dataclass
class PixelCNNppOptions:
    """A PixelCNN++: causal convolutions with a mixture of discretised logistics per pixel."""

    name: str = option("pixelcnnpp", "the kind of model", choices=("pixelcnnpp",))
    filters: int = option(160, "features of each of the two streams", minimum=1, maximum=1 << 16)
    resnets: int = option(5, "gated resnets per resolution", minimum=1, maximum=50)
    mixtures: int = option(10, "logistics in the mixture of a pixel", minimum=1, maximum=1000)
    dropout: float = option(0.5, "part of the features that training leaves out", minimum=0, below=1)
    num_classes: int | None = option(None, "labels that condition the network (null: none)", minimum=1, maximum=1 << 20)
    initial_images: int = option(100, "training images from which the weights are initialised", minimum=1)


@dataclass
class RnnOptions:
    """A recurrent network that predicts pixels or characters, or answers when it has read a sequence."""

    name: str = option("rnn", "the kind of model", choices=("rnn",))
    task: str = option(
        "next_pixel",
        "next_pixel and classification of images; regression of sequences; next_character of texts",
        choices=TASKS,
    )
    cell: str = option("lstm", "what is computed at every time step", choices=CELLS)
    hidden_size: int = option(128, "numbers in a hidden state", minimum=1, maximum=1 << 20)
    layers: int = option(1, "recurrent layers, one upon the other", minimum=1, maximum=1000)
    dropout: float = option(0.0, "part of the states between layers that training leaves out", minimum=0, below=1)
    bidirectional: bool = option(False, "read the sequence from both ends")
    forget_bias: float | None = option(
        None, "lstm, gru: first bias of the gate that keeps the state; b keeps it about e^b steps (null: PyTorch's)"
    )
    num_classes: int | None = option(None, "classification: labels (null: 10)", minimum=1, maximum=1 << 20)


@dataclass
class DenseNetOptions:
    """A DenseNet, which tells the class of an image."""

    name: str = option("densenet", "the kind of model", choices=("densenet",))
    architecture: str = option("densenet121", "a published one, cifar (by depth), or custom", choices=ARCHITECTURES)
    depth: int | None = option(
        None, "cifar: layers, 3 blocks of (depth - 4) / 6 (null: 100)", minimum=10, maximum=10_000
    )
    growth_rate: int | None = option(
        None, "cifar, custom: features that a layer adds (null: 12)", minimum=1, maximum=1 << 16
    )
    block_config: list[int] | None = option(
        None, "custom: layers of each block", minimum=1, maximum=1000, non_empty=True
    )
    drop_rate: float = option(0.0, "part of a layer's features that training leaves out", minimum=0, below=1)
    compression: float | None = option(
        None, "custom: part of the features that a transition keeps (null: 0.5)", above=0, maximum=1
    )
    num_classes: int | None = option(None, "labels (null: 1000 if published, else 10)", minimum=2, maximum=1 << 20)
    small_images: bool | None = option(
        None, "begin with a 3x3 convolution and no pooling (null: for cifar, and below 64 pixels)"
    )
    pretrained: bool = option(False, "start from the weights published for ImageNet; fetched once")
    weights: str | None = option(None, "start from the weights in this file, a state dict (null: fresh ones)")
    label_smoothing: float = option(0.0, "training: part of a label that all classes share", minimum=0, below=1)
    augment: bool = option(True, "training: move small images at random, and mirror them where that keeps the class")
    channels_last: bool | None = option(None, "lay out the features of a pixel side by side (null: on a GPU)")


MODEL_OPTIONS: dict[str, type] = {
    "made": MadeOptions,
    "pixelcnnpp": PixelCNNppOptions,
    "rnn": RnnOptions,
    "densenet": DenseNetOptions,
}


@dataclass
class OptimizerOptions:
    """AdamW or SGD with linear warm-up and cosine decay."""

    name: str = option("adamw", "the method", choices=("adamw", "sgd"))
    lr: float = option(1e-3, "highest learning rate", above=0)
    weight_decay: float = option(1e-4, "weight decay; adamw's is decoupled", minimum=0)
    beta1: float = option(0.9, "adamw: decay of the gradient's running mean", minimum=0, below=1)
    beta2: float = option(0.999, "adamw: decay of the squared gradient's running mean", minimum=0, below=1)
    momentum: float = option(0.0, "sgd: part of the last step that goes on", minimum=0, below=1)
    nesterov: bool = option(False, "sgd: look ahead along the momentum (Nesterov)")
    warmup_fraction: float = option(0.02, "part of all steps over which the learning rate rises", minimum=0, maximum=1)
    final_lr_fraction: float = option(0.01, "learning rate at the end, relative to the highest", minimum=0, maximum=1)
