"""The kernels against the plain functions, in Triton's interpreter (a process of its own) and on a GPU."""

import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

pytest.importorskip("triton")

from lit_parallel.dense.structure import FoldedLayer
from lit_parallel.kernels import dense_block
from lit_parallel.kernels.dense_block import BlockWeights, ReadWeights, padded, places, rounded


def random_layers(start, growth, bottleneck, layers, dtype=torch.float32, device="cpu"):
    def random(*shape):
        return torch.randn(shape, dtype=dtype).to(device)

    return [
        FoldedLayer(
            scale=random(channels).abs() + 0.5,
            shift=0.3 * random(channels),
            bottleneck=random(bottleneck, channels) / channels**0.5,
            bias=0.1 * random(bottleneck),
            growth=random(growth, bottleneck, 3, 3) / (9 * bottleneck) ** 0.5,
        )
        for channels in range(start, start + layers * growth, growth)
    ]


def random_gains(bottleneck, layers, dtype=torch.float32, device="cpu"):
    return (0.5 + torch.randn(layers, bottleneck, dtype=dtype).abs()).to(device).unbind()


def random_features(weights, start, growth, shape):
    x = torch.zeros(*shape, weights.channels, dtype=weights.bottleneck.dtype, device=weights.scale.device)
    at = places(start, growth, weights.layers, x.device)
    x[..., at] = torch.randn(*shape, len(at)).to(x)
    return x


# start, growth, bottleneck, layers, (batch, height, width)
SHAPES = (
    (24, 12, 48, 4, (2, 5, 4)),  # all padded
    (32, 16, 64, 3, (1, 7, 7)),
    (16, 40, 160, 3, (2, 3, 6)),  # no powers of two
)
LARGE = ((256, 32, 128, 10, (1, 14, 14)), (64, 32, 128, 4, (3, 28, 28)), (96, 48, 192, 5, (2, 7, 7)))


def check_against_plain(device, dtype, tolerance, shapes):
    torch.manual_seed(0)

    def agree(found, expected):
        assert found.isfinite().all()
        torch.testing.assert_close(found.float(), expected.float(), rtol=tolerance, atol=tolerance)

    def compare(name, written, *arguments, **named):
        """Call the function and its plain counterpart on copies of what they write, which is passed by name."""
        results = []
        for suffix in ("", "_plainly"):
            copies = {key: tensor.clone() for key, tensor in written.items()}
            getattr(dense_block, f"{name}{suffix}")(*arguments, **copies, **named)
            results.append(copies)
        for key, found in results[0].items():
            agree(found, results[1][key])
        return results[0]

    for start, growth, bottleneck, count, shape in shapes:
        gains = random_gains(bottleneck, count, device=device)
        weights = BlockWeights.of(random_layers(start, growth, bottleneck, count, device=device), gains, dtype)
        x = random_features(weights, start, growth, shape)
        batch, rows = shape[0], x.shape[:3].numel()
        base = torch.randn(count, rows, weights.width, device=device)
        offset = torch.randn(count, weights.width, device=device)
        active = base.relu().to(dtype)
        some, everywhere = range(1, count), weights.channels
        for layers, begin, end, given in (
            (some, 0, weights.first_channel(1), {"offset": offset}),
            (some, weights.entry, everywhere, {"base": base[1:]}),
            (range(count), 16, everywhere, {}),
        ):
            total = torch.full((len(layers), rows, weights.width), 7.0, device=device)
            written = {"total": total, "active": total[:2].to(dtype)}
            compare("collect", written, x, weights, layers, begin, end, **given)

        change = torch.zeros(2, count, batch, device=device)
        found = compare("grow", {"x": x, "change": change}, active[1:], weights, layers=some)
        assert (found["change"][:, 1:] > 0).all()
        assert (found["change"][:, 0] == 0).all()
        spaced = torch.zeros(2, count + 3, batch, device=device)
        dense_block.grow(active[1:], weights, x.clone(), some, change=spaced[:, 2:-1])
        assert torch.equal(spaced[:, 2:-1], found["change"])
        assert (spaced[:, :2] == 0).all()

        # The first of the later layers' sums is passed on, and left or not.
        later, following = base[1:].clone(), active[1].clone()
        found_x, expected_x, expected_later, expected_following = (t.clone() for t in (x, x, later, following))
        dense_block.grow(active[:1], weights, found_x, range(1), later=later, following=following)
        dense_block.grow_plainly(
            active[:1], weights, expected_x, range(1), later=expected_later, following=expected_following
        )
        for ours, plain in ((found_x, expected_x), (later[1:], expected_later[1:]), (following, expected_following)):
            agree(ours, plain)

        reads = ReadWeights(
            torch.rand(everywhere, device=device),
            torch.randn(everywhere, device=device),
            (torch.randn(24, everywhere, device=device) / everywhere**0.5).to(dtype),
        )
        y = torch.full((batch, shape[1] // 2, shape[2] // 2, 48), 7.0, device=device).to(dtype)
        compare("transition", {"y": y}, x, reads)
        agree(*(run(x, reads.scale, reads.shift) for run in (dense_block.mean, dense_block.mean_plainly)))
        image = torch.randn(batch, 24, 9, 10, device=device).to(dtype).to(memory_format=torch.channels_last)
        y = torch.full((batch, 5, 5, 48), 7.0, device=device).to(dtype)
        compare("pool", {"y": y}, image, base[0, 0, :24].contiguous(), offset[0, :24].contiguous())

    # What is not a number is not rectified away, and changes nothing in other images.
    spoilt = torch.randn(2, rows, weights.width, device=device).relu().to(dtype)
    spoilt[:, 0] = float("nan")
    change = torch.zeros(2, count, batch, device=device)
    dense_block.grow(spoilt, weights, x, range(2), change=change)
    own = x[..., weights.entry : weights.first_channel(2)]
    assert own[0].isnan().any()
    assert own[1:].isfinite().all()
    assert change[0, :2, 0].isinf().all()
    assert change[:, :2, 1:].isfinite().all()
    assert not change.isnan().any()
    total = torch.zeros(1, rows, weights.width, device=device)
    dense_block.collect(x, weights, range(2, 3), 0, weights.channels, total=total)
    per_image = total.view(batch, -1)
    assert per_image[0].isnan().any()
    assert per_image[1:].isfinite().all()
    image[0, 3, 4, 5] = float("nan")
    dense_block.pool(image, base[0, 0, :24].contiguous(), offset[0, :24].contiguous(), y)
    assert y[0, ..., 3].isnan().equal(_seen_by(4, 5, y.shape[1:3]).to(device))
    assert y[1:].isfinite().all()


def _seen_by(row, column, shape):
    """The windows of 3 x 3 pixels, at every other pixel, that see a pixel."""
    v, h = torch.meshgrid(*(2 * torch.arange(n) for n in shape), indexing="ij")
    return ((v - row).abs() <= 1) & ((h - column).abs() <= 1)


def test_kernels_in_the_interpreter():
    # TRITON_INTERPRET counts only before triton is imported, hence another process.
    code = (
        "import torch, test_dense_block_kernel as t\n"
        "t.check_against_plain('cpu', torch.float32, 1e-5, t.SHAPES)\nprint('agreed')"
    )
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "agreed" in done.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["float32", "tf32", "bfloat16", "float16"])
def test_kernels_on_a_gpu(kind, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", kind == "tf32")
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    tolerance = {"float32": 2e-5, "tf32": 5e-3, "bfloat16": 5e-2, "float16": 1e-2}[kind]
    dtype = torch.float32 if kind == "tf32" else getattr(torch, kind)
    with torch.backends.cudnn.flags(allow_tf32=kind == "tf32"):
        check_against_plain("cuda", dtype, tolerance, SHAPES + LARGE)


@pytest.mark.parametrize(("start", "growth", "bottleneck", "count", "shape"), SHAPES)
def test_plain_functions_are_a_dense_block(start, growth, bottleneck, count, shape):
    layers = random_layers(start, growth, bottleneck, count, torch.float64)
    gains = random_gains(bottleneck, count, torch.float64)
    weights = BlockWeights.of(layers, gains, torch.float64)
    at = places(start, growth, count)
    x = random_features(weights, start, growth, shape)
    features = x[..., at[:start]].permute(0, 3, 1, 2)
    for layer, gain in zip(layers, gains, strict=True):
        read = F.relu(layer.scale[:, None, None] * features + layer.shift[:, None, None])
        active = F.relu(F.conv2d(read, gain[:, None, None, None] * layer.bottleneck[:, :, None, None], layer.bias))
        features = torch.cat([features, F.conv2d(active, layer.growth, padding=1)], 1)
    active = x.new_zeros(1, x.shape[:3].numel(), weights.width)
    for layer in range(count):
        # In two parts, as windows do it.
        middle = padded(start) // 2 // 16 * 16
        total = active.clone()
        dense_block.collect(x, weights, range(layer, layer + 1), 0, middle, total=total)
        dense_block.collect(x, weights, range(layer, layer + 1), middle, weights.channels, base=total, active=active)
        dense_block.grow(active, weights, x, range(layer, layer + 1))
    torch.testing.assert_close(x[..., at].permute(0, 3, 1, 2), features, rtol=1e-12, atol=1e-12)


def test_plain_functions_between_blocks_are_torchs():
    x = torch.randn(2, 5, 7, 32, dtype=torch.float64)
    weights = ReadWeights(*torch.randn(2, 32, dtype=torch.float64), torch.randn(11, 32, dtype=torch.float64))
    read = F.relu(x * weights.scale + weights.shift).permute(0, 3, 1, 2)
    y = torch.zeros(2, 2, 3, 16, dtype=torch.float64)
    dense_block.transition(x, weights, y)
    expected = F.avg_pool2d(F.conv2d(read, weights.weight[:, :, None, None]), 2)
    torch.testing.assert_close(y[..., :11].permute(0, 3, 1, 2), expected)
    assert (y[..., 11:] == 0).all()
    torch.testing.assert_close(dense_block.mean(x, weights.scale, weights.shift), read.mean(dim=(2, 3)))


def test_weights_are_rounded_to_tf32():
    weight = torch.randn(1000)
    near = rounded(weight, "tf32")
    assert (near.view(torch.int32) & 0x1FFF == 0).all()
    assert ((near - weight).abs() <= weight.abs() * 2.0**-11).all()
    assert abs(float((near - weight).sign().mul(weight.sign()).mean())) < 0.1  # not always towards zero
    assert torch.equal(rounded(weight, "ieee"), weight)
