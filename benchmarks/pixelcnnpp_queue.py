"""What a queue of images saves: ``python -m benchmarks.pixelcnnpp_queue [--checkpoint PATH] [--images 64]``.

GS-Jacobi takes a different number of iterations for each image. Where a batch is sampled to its end before the next one
begins, it takes those of its slowest image; where a finished image makes room for a waiting one (which is how
``sample.py`` works through a batch on a GPU), the sum of all iterations counts. Both are run and counted here, by the
same evaluation and to the same images; nothing is timed, and a CPU suffices.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import trained
from lit_parallel.report import write_json
from lit_parallel.sampling.options import SamplingOptions
from lit_parallel.sampling.pixelcnnpp_fused import WindowSweep

SMALL = [
    *("data.side=12", "data.batch_size=32", "model.filters=16", "model.resnets=1"),
    *("trainer.max_epochs=4", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1"),
]
"""The model that is trained where none is named: digits of 12 x 12 pixels."""


@torch.no_grad()
def sweep(model: Any, first: int, images: int, slots: int, rows: int, seed: int) -> tuple[int, list[int], torch.Tensor]:
    """Sample images, so many at a time.

    Returns:
        The parallel iterations that were run, the iterations of each image, and the images as the sweep holds them.
    """
    system = model.sampling_system(images, incremental=False, options=SamplingOptions())
    model.load_noise(system, seed, range(first, first + images))
    run = WindowSweep(system, rows, slots, limit=system.length)
    books = run.run()
    return int(run.windows.step), books.iterations.tolist(), run.x


def measure(model: Any, images: int, slots: int, rows: int, seed: int) -> dict[str, Any]:
    """Count the iterations with a queue and without."""
    steps, iterations, queued = sweep(model, 0, images, slots, rows, seed)
    batches = [sweep(model, first, min(slots, images - first), slots, rows, seed) for first in range(0, images, slots)]
    without = sum(batch[0] for batch in batches)
    assert iterations == [number for batch in batches for number in batch[1]]
    return {
        "images": images,
        "slots": slots,
        "rows": rows,
        "equations": model.length,
        "iterations_mean": sum(iterations) / images,
        "iterations_max": max(iterations),
        "parallel_iterations_in_batches": without,
        "parallel_iterations_with_a_queue": steps,
        "gain": without / steps,
        "same_images": torch.equal(queued, torch.cat([batch[2] for batch in batches])),
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pixelcnnpp_queue", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, help="a PixelCNN++ (default: a small one is trained, in a minute)")
    parser.add_argument("--images", type=int, default=256, help="how many to sample (%(default)s)")
    parser.add_argument("--slots", type=int, default=16, help="images in work at a time")
    parser.add_argument("--rows", type=int, default=4, help="rows of a window")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--output", type=Path, help="a JSON file for the numbers")
    args = parser.parse_args(argv)
    model, facts = trained("pixelcnnpp_mnist5k.yaml", SMALL, args.checkpoint, None)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    report = {"model": facts} | measure(model, args.images, args.slots, args.rows, args.seed)
    print(
        f"{report['images']} images of {report['equations']} equations, {report['slots']} at a time: "
        f"{report['iterations_mean']:.1f} iterations on average, {report['iterations_max']} at most; "
        f"{report['parallel_iterations_in_batches']} parallel iterations in batches, "
        f"{report['parallel_iterations_with_a_queue']} with a queue: {report['gain']:.2f}x fewer; "
        f"same images: {'yes' if report['same_images'] else 'no'}"
    )
    if args.output:
        write_json(report, args.output)
    return report


if __name__ == "__main__":
    main()
