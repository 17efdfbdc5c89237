"""What a DenseNet consists of, and folded batch norm against the modules themselves."""

import pytest
import torch
from dense_helpers import NETWORKS, TorchvisionLike, images, lived_in, side_of
from torch import nn
from torch.nn import functional as F  # noqa: N812

from lit_parallel.dense.structure import find_dense_nets, fold, structure_of
from lit_parallel.errors import UserError
from lit_parallel.networks.densenet import DenseNet

every_network = pytest.mark.parametrize("name", NETWORKS)


@every_network
@torch.no_grad()
def test_stem_layers_transitions_and_head_make_the_ordinary_forward(name):
    network, x = NETWORKS[name](), images(side=side_of(name))
    assert torch.equal(structure_of(network).ordinary(x), network(x))


def test_channels_last_images_keep_their_bits():
    network = NETWORKS["own"]().to(memory_format=torch.channels_last)
    x = images().contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.equal(structure_of(network).ordinary(x), network(x))


def test_blocks_by_name_size_and_mean():
    network = NETWORKS["own"]()
    blocks = structure_of(network).blocks
    assert [block.name for block in blocks] == [f"features.denseblock{i}" for i in (1, 2, 3)]
    assert [len(block.layers) for block in blocks] == [3, 5, 2]
    assert [(block.channels, block.growth) for block in blocks] == [(6, 4), (9, 4), (14, 4)]
    second = network.features.denseblock2
    # Later layers and the transition have seen the same features, and so hold the same means.
    assert torch.allclose(blocks[1].mean[:4].flatten(), second.denselayer5.norm1.running_mean[9:])
    assert blocks[1].mean.shape == (5, 4)
    assert blocks[2].norm is network.features.norm5


@every_network
@torch.no_grad()
def test_folded_layers_equal_their_modules(name):
    network = NETWORKS[name]()
    for norm in (module for module in network.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.eps = 0.1  # so that a forgotten one shows
    for block in structure_of(network).blocks:
        x = torch.randn(2, block.channels, 6, 6, dtype=torch.float64)
        for layer, folded in zip(block.layers, block.folded(), strict=True):
            assert folded.scale.shape == folded.shift.shape == (x.shape[1],)
            assert folded.growth.shape == (block.growth, len(folded.bias), 3, 3)
            y = F.relu(folded.scale[:, None, None] * x + folded.shift[:, None, None])
            z = torch.einsum("bchw,oc->bohw", y, folded.bottleneck) + folded.bias[:, None, None]
            new = F.conv2d(F.relu(z), folded.growth, padding=1)
            assert torch.allclose(new, layer(x), rtol=1e-12, atol=1e-12)
            x = torch.cat([x, new], 1)


def test_folded_weights_are_copies_in_float32_at_least():
    network = NETWORKS["own"]()
    layer = network.features.denseblock1.denselayer1
    assert structure_of(network).blocks[0].folded()[0].growth.data_ptr() != layer.conv2.weight.data_ptr()
    exact = structure_of(network).blocks[0].folded()
    network.float()
    folded = structure_of(network).blocks[0].folded()
    assert folded[1].scale.dtype == folded[1].growth.dtype == torch.float32
    assert torch.allclose(folded[1].bottleneck.double(), exact[1].bottleneck, rtol=1e-6)
    network.bfloat16()
    assert structure_of(network).blocks[0].folded()[0].bottleneck.dtype == torch.float32


def test_norms_without_weights_and_with_synchronised_statistics_are_folded():
    norm = nn.BatchNorm2d(3, affine=False).double().eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    scale, shift = fold(norm)
    assert torch.allclose(scale[:, None, None] * x + shift[:, None, None], norm(x), rtol=1e-12, atol=1e-12)
    network = nn.SyncBatchNorm.convert_sync_batchnorm(NETWORKS["own"]())
    assert torch.equal(structure_of(network).ordinary(images()), network(images()))


def test_dense_nets_are_found_at_any_depth_once():
    inner = TorchvisionLike()
    model = nn.ModuleDict({"a": nn.Sequential(nn.Identity(), inner), "shared": inner, "other": nn.Conv2d(3, 3, 1)})
    assert find_dense_nets(model) == {"a.1": inner}
    assert find_dense_nets(inner) == {"": inner}
    assert find_dense_nets(torch.compile(inner, backend="eager")) == {
        "_orig_mod": inner
    }  # not the wrapper, which shows its attributes
    assert find_dense_nets(nn.Sequential(nn.Conv2d(3, 3, 1))) == {}


class SqueezeLayer(type(TorchvisionLike().features.denseblock1.denselayer1)):
    """A layer with a part of its own."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.squeeze = nn.Conv2d(4, 4, 1)


def broken(change) -> nn.Module:
    network = TorchvisionLike()
    change(network)
    return network


def replace(path: str, part: nn.Module):
    return lambda network: network.set_submodule(path, part)


def remove(path: str):
    parent, _, name = path.rpartition(".")
    return lambda network: delattr(network.get_submodule(parent), name)


LAYER = "features.denseblock2.denselayer2"


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (nn.Sequential(nn.Conv2d(3, 3, 1)), "Sequential is no DenseNet: it has no features.denseblock1.denselayer1"),
        (broken(remove("classifier")), "TorchvisionLike has no classifier"),
        (broken(remove("features.norm5")), "features.denseblock2 should be followed by norm5"),
        (broken(remove("features.transition1")), "features.denseblock1 should be followed by transition1"),
        (broken(remove("features.denseblock1.denselayer3")), "layers should be denselayer1, .* in this order"),
        (broken(remove(f"{LAYER}.norm2")), f"no {LAYER}.norm2: a BatchNorm2d was expected"),
        (broken(replace(f"{LAYER}.relu1", nn.SiLU())), f"{LAYER}.relu1 is a SiLU, where a ReLU"),
        (broken(replace(f"{LAYER}.conv2", nn.Conv2d(8, 4, 3, padding=2, dilation=2))), "conv2 has padding=\\(2, 2\\)"),
        (broken(replace(f"{LAYER}.conv2", nn.Conv2d(8, 4, 3, padding=1))), "conv2 has a bias"),
        (
            broken(replace(f"{LAYER}.conv2", nn.Conv2d(8, 4, 3, padding=1, dilation=2, bias=False))),
            "conv2 has dilation=\\(2, 2\\)",
        ),
        (
            broken(replace(f"{LAYER}.conv2", nn.Conv2d(8, 4, 3, padding=1, padding_mode="reflect", bias=False))),
            "conv2 has padding_mode=reflect",
        ),
        (broken(replace(f"{LAYER}.norm1", nn.BatchNorm2d(18))), "reads 18 channels and adds 4, where 15 and 4"),
        (broken(replace("features.transition1.pool", nn.MaxPool2d(2))), "transition1.pool is a MaxPool2d"),
        (
            broken(replace(f"{LAYER}.norm1", nn.BatchNorm2d(15, track_running_stats=False))),
            f"{LAYER}.norm1 has no running statistics",
        ),
        (broken(replace(LAYER, SqueezeLayer(15, 4, 8, 0.0))), f"{LAYER} has a part 'squeeze'"),
    ],
)
def test_what_is_missing_is_named(network, message):
    with pytest.raises(UserError, match=message):
        structure_of(network)


def test_an_own_network_of_one_block_is_understood():
    structure = structure_of(lived_in(DenseNet(2, (1,), 4, num_classes=3)))
    assert len(structure.blocks) == 1
