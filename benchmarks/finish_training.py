"""Continue training a PixelCNN++ checkpoint, a step in one CUDA graph: ``python -m benchmarks.finish_training``.

For small networks on a fast GPU the host is what limits ``train.py``: a step is some ten thousand launches. Here one
step (forward, backward, clipping, AdamW, moving average) is captured once and replayed. The learning rate falls along
a cosine to zero over the given time. Writes a checkpoint with the averaged weights, and prints its test bits/dim.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from torch import Tensor

from lit_parallel.checkpoint import as_checkpoint, load, saved_config
from lit_parallel.data.datasets import build_data
from lit_parallel.modules.pixelcnnpp import PixelCNNppModule


def finish(model: PixelCNNppModule, images: Tensor, args: argparse.Namespace) -> int:
    """Train in place for the given time and put the averaged weights in; returns the number of steps."""
    device = torch.device("cuda")
    model.to(device).train()
    images = images.to(device)
    batch = images[: args.batch_size].clone()
    rate = torch.tensor(0.0, device=device)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=rate, betas=(0.95, 0.9995), weight_decay=0.0, capturable=True, foreach=True
    )
    averages = [parameter.detach().clone() for parameter in parameters]
    noise = torch.zeros(batch.shape, device=device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        with torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False):
            loss = -model.log_likelihood(batch, noise).mean() / model.length
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()
        torch._foreach_lerp_(averages, [parameter.detach() for parameter in parameters], 1 - args.decay)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    began, steps = time.perf_counter(), 0
    generator = torch.Generator().manual_seed(0)
    while (progress := (time.perf_counter() - began) / args.seconds) < 1:
        order = torch.randint(len(images), (args.batch_size,), generator=generator).to(device)
        batch.copy_(images[order])
        rate.fill_(args.lr * min(1.0, (steps + 1) / 100) * 0.5 * (1 + math.cos(math.pi * progress)))
        graph.replay()
        steps += 1
        if steps % 8 == 0:
            torch.cuda.synchronize()
    with torch.no_grad():
        for parameter, average in zip(parameters, averages, strict=True):
            parameter.copy_(average)
    return steps


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.finish_training", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="of a PixelCNN++")
    parser.add_argument("output", type=Path, help="the checkpoint to write")
    parser.add_argument("--folder", help="folder with the official files of the checkpoint's data")
    parser.add_argument("--seconds", type=float, default=240.0, help="how long to train (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="images per step (%(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate to begin with (%(default)s)")
    parser.add_argument("--decay", type=float, default=0.998, help="of the moving average")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs an NVIDIA GPU")
    model = load(args.checkpoint)
    if not isinstance(model, PixelCNNppModule) or model.num_classes is not None:
        parser.error("the checkpoint must be one of a PixelCNN++ without classes")
    config = saved_config(model)
    if args.folder:
        config.data.folder = args.folder
    data = build_data(config.data, config.seed)
    data.setup()
    steps = finish(model, data.train_dataloader().dataset.images, args)
    model.eval()
    test = data.test_images()
    with torch.no_grad():
        bits = [
            -model.log_likelihood(some.cuda(), torch.zeros(some.shape, device="cuda")) / model.length / math.log(2)
            for some in test.split(100)
        ]
    torch.save(as_checkpoint(model), args.output)
    print(f"{args.output}: {steps} steps; test bits/dim {float(torch.cat(bits).mean()):.4f} of {len(test)} images")


if __name__ == "__main__":
    main()
