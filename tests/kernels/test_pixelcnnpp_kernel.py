"""The layers on windows against the network itself: plain, in Triton's interpreter (a process of its own), on a GPU."""

import copy
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from lit_parallel.kernels.pixelcnnpp import Kind, Table, Tile, Workspace, run, tile_for
from lit_parallel.networks import PixelCNNpp
from lit_parallel.networks.pixelcnnpp import RESOLUTIONS
from lit_parallel.sampling.autoregressive import folded
from lit_parallel.sampling.pixelcnnpp_layers import lay_out

OUTPUTS = 7
SAMPLES = [2, -1, 0]  # of the slots
GREY, COLOUR = (1, 8, 8, 5, None), (3, 8, 4, 40, 3)  # channels, height, width, filters, classes


class Problem:
    """A small network, three images, and its layers laid out for three slots, of which one is idle."""

    def __init__(self, channels, height, width, filters, classes, device="cpu"):
        network = PixelCNNpp(channels, OUTPUTS, filters=filters, resnets=1, num_classes=classes)
        for parameter in network.parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, std=0.3)
        network = folded(network)
        for parameter in network.parameters():  # wide ones of random weights are chaotic: rounding would be all one saw
            parameter.mul_(min(1.0, 2 * filters**-0.25))
        images = 2 * torch.rand(3, channels, height, width) - 1
        labels = None if classes is None else torch.tensor([0, 2, 1])
        self.expected = copy.deepcopy(network).double()(images.double(), labels).float()
        self.height, self.width = height, width
        self.laid_out = lay_out(network.to(device), (height, width))
        self.image = torch.zeros(3, height + 2, width + 2, 32)
        self.image[:, 2:, 1:-1, :channels] = images.permute(0, 2, 3, 1)
        self.image[:, 2:, 1:-1, channels] = 1
        self.image = self.image.to(device)
        self.labels = torch.zeros(3, dtype=torch.int64) if labels is None else labels
        self.device = device

    def workspace(self, pixels):
        def make(*shape, dtype=torch.float32):
            return torch.zeros(shape, dtype=dtype, device=self.device)

        slots = len(SAMPLES)
        elements = slots * self.laid_out.elements
        return Workspace(
            arena=make(elements),
            active=make(4 * elements, dtype=torch.float16),
            image=self.image,
            parameters=torch.full((slots * pixels, self.laid_out.pitch), 7.0, device=self.device),
            sample=torch.tensor(SAMPLES, dtype=torch.int32, device=self.device),
            top=make(slots, dtype=torch.int32),
            left=make(slots, dtype=torch.int32),
            label=self.labels.to(self.device),
        )

    def check(self, workspace, rows, columns, top, left):
        found = (
            workspace.parameters[:, :OUTPUTS].reshape(len(SAMPLES), rows, columns, OUTPUTS).permute(0, 3, 1, 2).cpu()
        )
        expected = self.expected[[2, 0], :, top : top + rows, left : left + columns]
        # Of the largest output. Tensor cores round a little worse than a CPU, over some forty layers.
        tolerance = (2e-6 if self.device == "cpu" else 1e-5) * float(self.expected.abs().max())
        torch.testing.assert_close(found[[0, 2]], expected, rtol=0, atol=tolerance)
        assert (found[1] == 7).all()  # an idle slot puts nothing out
        assert not workspace.arena.view(-1).isnan().any()

    def windows(self, rows, tile=None):
        workspace = self.workspace(rows * self.width)
        table = Table(self.laid_out.layers, rows, self.width, len(SAMPLES))
        for top in range(0, self.height, rows):
            workspace.top.fill_(top)
            for jobs in self.laid_out.launches():
                run(table, workspace, jobs, tile)
            self.check(workspace, rows, self.width, top, 0)

    def lost_numbers(self):
        """What 16 bits do not hold must not come out as if nothing had been."""
        for large in (float("inf"), float("nan"), 1e6):
            job = next(i for i, job in enumerate(self.laid_out.layers.jobs) if job.kind == Kind.ELU and not job.down)
            before = sum(job.bias.numel() for job in self.laid_out.layers.jobs[:job])
            spoilt = self.laid_out.layers.biases[before]
            self.laid_out.layers.biases[before] = large
            workspace = self.workspace(8 * self.width)
            table = Table(self.laid_out.layers, 8, self.width, len(SAMPLES))
            for jobs in self.laid_out.launches():
                run(table, workspace, jobs)
            assert not workspace.parameters[: 8 * self.width, :OUTPUTS].isfinite().any()
            self.laid_out.layers.biases[before] = spoilt

    def pixels(self, last_row):
        workspace = self.workspace(1)
        table = Table(self.laid_out.layers, 1, 1, len(SAMPLES))
        for row in range(last_row):
            for column in range(self.width):
                workspace.top.fill_(row)
                workspace.left.fill_(column)
                due = next((level for level in range(RESOLUTIONS) if (row | column) >> level & 1), 2) + 1
                for jobs in self.laid_out.launches(due, down=column == 0):
                    run(table, workspace, jobs)
                self.check(workspace, 1, 1, row, column)


@pytest.mark.parametrize("shape", [GREY, COLOUR])
def test_windows_and_pixels_have_the_networks_parameters(shape):
    torch.manual_seed(0)
    problem = Problem(*shape)
    for rows in (4, 8):
        problem.windows(rows)
    problem.pixels(problem.height)


def test_a_launch_takes_both_streams_and_nothing_before_what_it_reads():
    problem = Problem(*GREY)
    jobs, launches = problem.laid_out.layers.jobs, problem.laid_out.launches()
    assert sorted(index for launch in launches for index in launch) == list(range(len(jobs)))
    assert max(map(len, launches)) == 2
    written = {}
    for number, launch in enumerate(launches):
        for index in launch:
            job = jobs[index]
            for read in (*([] if job.kind == Kind.IMAGE else [job.source]), *job.skips):
                assert written[read.offset] < number
        written |= {jobs[index].target.offset: number for index in launch if jobs[index].target is not None}
    # Pixel by pixel only what is due runs: level 0 of the down-right stream in most.
    fewest = problem.laid_out.launches(1, down=False)
    assert all(jobs[index].level == 0 and not jobs[index].down for launch in fewest for index in launch)
    assert len(fewest) < len(launches) / 2


def test_small_launches_get_small_tiles_and_large_ones_large_tiles():
    def tile(pixels, outputs):
        return tile_for([(pixels, outputs)] * 2)

    areas = [tile(pixels, 160).rows * tile(pixels, 160).outputs for pixels in (1, 64, 256, 1024, 100_000)]
    assert areas == sorted(areas)
    assert areas[0] == 16 * 16  # the least that a tensor core takes
    assert areas[-1] == 64 * 64
    assert tile(10**9, 1).programs(65, 65) == 4


def test_a_tile_loads_as_far_ahead_as_shared_memory_allows():
    tile = Tile(64, 64, 1, 4, 4)
    chunk = 64 * (64 + 2 * 64) * 4  # rows and both products' outputs, in two halves each
    assert tile.fitting(True, 227 * 1024).stages == 4
    assert tile.fitting(True, 2 * chunk).stages == 2
    assert tile.fitting(True, 2 * chunk - 1).stages == 1
    assert tile.fitting(False, 2 * chunk).stages == 3


INTERPRETED = """
import torch
from test_pixelcnnpp_kernel import COLOUR, GREY, Problem, Tile, Kind
torch.manual_seed(0)
Problem(*GREY).windows(4)
Problem(*GREY).windows(8, Tile(64, 32))  # whose sums are in one piece
Problem(*GREY).lost_numbers()
Problem(*GREY).pixels(1)
Problem(*COLOUR).windows(8)
"""


def test_kernels_in_the_interpreter():
    here = os.path.dirname(__file__)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([here, *sys.path])}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", INTERPRETED],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [GREY, COLOUR, (3, 32, 32, 160, None)])
def test_kernels_on_a_gpu(shape):
    torch.manual_seed(0)
    problem = Problem(*shape, device="cuda")
    for rows in (4, 8, problem.height):
        problem.windows(rows)
    problem.pixels(5)
    problem.lost_numbers()


@pytest.mark.gpu
@pytest.mark.parametrize("tile", [Tile(16, 16, 8, 8, 2), Tile(32, 16, 2, 4, 3), Tile(64, 32, 1, 4, 4), Tile(64, 64)])
def test_a_pixels_bits_do_not_depend_on_where_it_lies_in_a_tile(tile):
    torch.manual_seed(0)
    problem = Problem(3, 16, 16, 40, None, device="cuda")
    workspace = problem.workspace(16 * 16)
    table = Table(problem.laid_out.layers, 16, 16, len(SAMPLES))
    found = []
    for samples in ([0, 1, 2], [2, 0, 1], [-1, -1, 0]):
        workspace.sample.copy_(torch.tensor(samples))
        for jobs in problem.laid_out.launches():
            run(table, workspace, jobs, tile)
        found.append(workspace.parameters[:, :OUTPUTS].unflatten(0, (3, -1))[samples.index(0)].clone())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
