"""Shards of sampled images: whole or not there, completed by the same command, the same bits however often stopped."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lit_parallel.checkpoint import as_checkpoint, build_model
from lit_parallel.config import SampleConfig, TrainConfig, load_config
from lit_parallel.errors import UserError
from lit_parallel.runs import alone_in
from lit_parallel.sampling import shards as shards_module
from lit_parallel.sampling.pixelcnnpp_fused import FusedPixelCNNppSystem
from lit_parallel.sampling.predict import SampleIndices, SamplingModule, fitting_into_memory
from lit_parallel.sampling.sampler import Sampler
from lit_parallel.sampling.shards import Shards
from lit_parallel.solution import Solution, Status
from sample import sample

ROOT = Path(__file__).parent.parent

pytestmark = [
    # Lightning opens files that the interpreter closes at exit; what it deprecates is its own.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]

QUIET = [
    *("trainer.accelerator=cpu", "trainer.devices=1", "trainer.enable_progress_bar=false", "wandb.mode=disabled"),
    *("compare.baselines=[]", "compare.curves=false", "compare.repeats=1"),
]
SETTINGS = {"seed": 3, "batch_size": 4}


@pytest.fixture
def checkpoint(tmp_path):
    """A tiny MADE with fresh weights, in a run folder."""
    model = build_model(load_config(TrainConfig, None, ["model.hidden_sizes=[16,16]"]), (1, 4, 8))
    return saved(model, tmp_path)


def saved(model, tmp_path):
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    torch.save(as_checkpoint(model), path)
    return path


def run_sample(checkpoint, *overrides):
    return sample(load_config(SampleConfig, overrides=[f"checkpoint={checkpoint}", *QUIET, *overrides]))


def all_images(results):
    return torch.cat([images for _, images, _ in results.shards.read()])


def solution_of(count, *failed):
    ones = torch.ones(count, dtype=torch.int64)
    return Solution(
        value=torch.zeros(count, 5),
        status=[Status.NON_FINITE if i in failed else Status.CONVERGED for i in range(count)],
        iterations=torch.arange(count),
        evaluations=9 * ones,
        frontier=5 * ones,
        certified=ones > 0,
        certificate_iterations=ones,
        seconds=0.5,
        certificate_seconds=0.25,
        setup_seconds=0.125,
        length=5,
        solver="jacobi",
        residual=torch.arange(3 * count).reshape(3, count).float(),
    )


def images_of(first, count):
    return torch.arange(first, first + count, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 1, 2, 3)


def opened(folder):
    shards = Shards(folder)
    shards.open(SETTINGS)
    return shards


def fill(folder, number=10, size=4):
    """Write every batch that is missing; returns the shards and the first samples of what was written."""
    shards = Shards(folder)
    shards.open(SETTINGS)
    missing = shards.missing(number, size)
    for process, batch in enumerate(missing):
        shards.write(batch.start, images_of(batch.start, len(batch)), solution_of(len(batch)), process % 2)
    shards.close()
    return shards, [batch.start for batch in missing]


# -- the folder ---------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(tmp_path):
    shards = Shards(tmp_path)
    shards.open(SETTINGS)
    shards.write(4, images_of(4, 3), solution_of(3, 1), process=1)
    shards.write(0, images_of(0, 4), solution_of(4))
    shards.close()
    (first, images, _), (second, others, solution) = opened(tmp_path).read()
    assert (first, second) == (0, 4)
    assert torch.equal(torch.cat([images, others]), images_of(0, 7))
    expected = solution_of(3, 1)
    for name, value in vars(expected).items():
        if name not in ("value", "residual"):
            assert str(getattr(solution, name)) == str(value), name
    assert solution.residual[:, 0].tolist() == [2, 5, 8]  # the largest of all samples, in each iteration
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["settings"] == SETTINGS
    assert index["samples"] == 7
    line = index["shards"][1]
    data = (tmp_path / "part-00000004.npz").read_bytes()
    assert line == {
        "file": "part-00000004.npz",
        "first": 4,
        "count": 3,
        "sha256": hashlib.sha256(data).hexdigest(),
        "non_finite": [5],
    }
    with np.load(tmp_path / line["file"], allow_pickle=False) as content:
        assert content["index"].tolist() == [4, 5, 6]
        assert content["status"].tolist() == ["converged", "non_finite", "converged"]
        assert content["images"].dtype == np.uint8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.json", "part-00000000.npz", line["file"]]


def test_the_first_images_and_the_numbers_of_all(tmp_path):
    shards, _ = fill(tmp_path)
    images, solution = shards.read_first(6)
    assert torch.equal(images, images_of(0, 6))
    assert solution.iterations.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert solution.residual.squeeze(1).tolist() == [3, 7, 11]
    assert solution.seconds == 1.5


def test_only_what_is_missing_is_asked_for(tmp_path):
    assert fill(tmp_path)[1] == [0, 4, 8]
    assert fill(tmp_path)[1] == []
    assert fill(tmp_path, number=17)[1] == [8, 12, 16]  # the last one was shorter
    with pytest.raises(UserError, match="holds images up to number 17 already: set num_samples=17 or more"):
        fill(tmp_path, number=16)


@pytest.mark.parametrize("accident", ["bit", "cut", "lost", "swapped"])
def test_a_damaged_shard_is_asked_for_again(accident, tmp_path):
    fill(tmp_path)
    path = tmp_path / "part-00000004.npz"
    data = bytearray(path.read_bytes())
    if accident == "bit":
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    elif accident == "cut":
        path.write_bytes(data[:-1])
    elif accident == "lost":
        path.unlink()
    else:
        path.write_bytes((tmp_path / "part-00000000.npz").read_bytes())
    shards, written = fill(tmp_path)
    assert written == [4]
    assert torch.equal(shards.read_first(99)[0], images_of(0, 10))


def test_what_was_cut_off_while_it_was_written_is_no_shard(tmp_path):
    shards = Shards(tmp_path)
    shards.open(SETTINGS)
    shards.write(0, images_of(0, 4), solution_of(4))
    shards.write(4, images_of(4, 4), solution_of(4))
    journal = tmp_path / "index-0.jsonl"
    journal.write_bytes(journal.read_bytes()[:-9])
    (tmp_path / "part-00000008.npz.incomplete").write_bytes(b"half")
    (tmp_path / "part-00000012.npz").write_bytes(b"whole, but without a line")
    again = opened(tmp_path)
    assert [batch.start for batch in again.missing(10, 4)] == [4, 8]
    assert not list(tmp_path.glob("*.incomplete"))


def test_images_of_other_settings_are_refused(tmp_path):
    fill(tmp_path)
    with pytest.raises(UserError, match=r"drawn with batch_size=4, and now it is 8: set it back, or name another outp"):
        Shards(tmp_path).open(SETTINGS | {"batch_size": 8})


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"settings": {}, "shards": [{"first": -1}]}', '{"shards": 3}', "[" * 9999]
)
def test_a_damaged_index_is_refused(text, tmp_path):
    fill(tmp_path)
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(UserError, match="damaged, or no index of images"):
        opened(tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot create the folder"):
        Shards(tmp_path / "file").open(SETTINGS)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"Cannot write .*: No space left on device"):
        fill(tmp_path / "shards")
    assert not any((tmp_path / "shards").iterdir())


@pytest.mark.parametrize("file", ["part-00000008.npz", "index-0.jsonl", "index.json"])
def test_a_full_disk_is_one_line_that_says_how_to_go_on(file, tmp_path, monkeypatch):
    def full(path, data, mode="wb"):
        if path.name.startswith(file) and (tmp_path / "shards" / "part-00000004.npz").is_file():
            raise OSError(28, "No space left on device")
        write(path, data, mode)

    write = shards_module._write_to_disk
    with monkeypatch.context() as patch:
        patch.setattr(shards_module, "_write_to_disk", full)
        with pytest.raises(UserError) as caught:
            fill(tmp_path / "shards")
    assert str(caught.value) == (
        f"Cannot write '{tmp_path / 'shards' / file}': No space left on device. When that is mended, the same command "
        f"and output={tmp_path} continues with the missing images."
    )
    shards, written = fill(tmp_path / "shards")
    assert written == {"part-00000008.npz": [8], "index-0.jsonl": [8], "index.json": []}[file]
    assert torch.equal(shards.read_first(99)[0], images_of(0, 10))


# -- the command --------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch):
    """The first samples of the batches that were drawn."""
    found = []
    step = SamplingModule.predict_step

    def recording(module, batch, batch_index):
        found.extend(batch[:1])
        return step(module, batch, batch_index)

    monkeypatch.setattr(SamplingModule, "predict_step", recording)
    return found


def test_the_same_command_completes_a_folder(checkpoint, tmp_path, drawn):
    whole = all_images(run_sample(checkpoint, "num_samples=14", "batch_size=4", "seed=3"))
    assert whole.shape == (14, 1, 4, 8)
    assert len(whole.unique(dim=0)) == 14
    drawn.clear()
    command = ("batch_size=4", "seed=3", f"output={tmp_path / 'out'}")
    first = run_sample(checkpoint, "num_samples=10", *command)
    assert drawn == [0, 4, 8]
    assert torch.equal(all_images(first), whole[:10])
    drawn.clear()
    (tmp_path / "out" / "shards" / "part-00000004.npz").write_bytes(b"damaged")
    run_sample(checkpoint, "num_samples=10", *command)
    assert drawn == [4]
    drawn.clear()
    assert torch.equal(all_images(run_sample(checkpoint, "num_samples=10", *command)), whole[:10])
    assert drawn == []
    moved = checkpoint.rename(checkpoint.with_name("moved.ckpt"))  # its content counts
    more = run_sample(moved, "num_samples=14", "solver.name=jacobi", *command)  # certified: the solver is free
    assert drawn == [8, 12]
    assert torch.equal(all_images(more), whole)
    assert more.solution.solver == "gs_jacobi, jacobi"
    assert len(more.solution.status) == 14
    for name in ("report.json", "samples.png", "shards/index.json"):
        assert (tmp_path / "out" / name).is_file()


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ("seed=4", "seed=3, and now it is 4"),
        ("batch_size=3", "batch_size=4, and now it is 3"),
        ("sampling.temperature=0.5", "sampling.temperature=1.0, and now it is 0.5"),
        ("solver.certify=false", "solver.name='any, certified', and now it is 'gs_jacobi'"),
        ("trainer.precision=64-true", "trainer.precision='32-true', and now it is '64-true'"),
    ],
)
def test_a_folder_of_other_images_is_refused(changed, named, checkpoint, tmp_path):
    command = ("num_samples=4", "batch_size=4", "seed=3", f"output={tmp_path / 'out'}")
    run_sample(checkpoint, *command)
    before = (tmp_path / "out" / "shards" / "index.json").read_bytes()
    with pytest.raises(UserError, match=named):
        run_sample(checkpoint, *command, changed)
    assert (tmp_path / "out" / "shards" / "index.json").read_bytes() == before


def test_a_folder_that_another_command_fills_is_left_alone(checkpoint, tmp_path):
    command = ("num_samples=4", f"output={tmp_path / 'out'}")
    with alone_in(tmp_path / "out"), pytest.raises(UserError, match="Another command is at work in"):
        run_sample(checkpoint, *command)
    assert not any((tmp_path / "out").iterdir())
    run_sample(checkpoint, *command)


def test_a_folder_of_another_model_is_refused(checkpoint, tmp_path):
    command = ("num_samples=4", f"output={tmp_path / 'out'}")
    run_sample(checkpoint, *command)
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"]["network.output.bias"] += 1
    torch.save(content, checkpoint)
    with pytest.raises(UserError, match=r"drawn with checkpoint=.*sha256:"):
        run_sample(checkpoint, *command)


KILLED_WHILE_WRITING = """
import os, signal, sys
import torch
from lit_parallel.sampling import shards
from sample import main

torch.set_num_threads(1)
fsync, parts = os.fsync, []

def killing(descriptor):
    name = os.readlink(f"/proc/self/fd/{descriptor}")
    if ".npz" in name:
        parts.append(name)
        if len(parts) == 3:
            os.truncate(descriptor, 100)
            os.kill(os.getpid(), signal.SIGKILL)
    fsync(descriptor)

os.fsync = killing
main(sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="finds the file that is written in /proc")
def test_what_was_finished_before_a_kill_is_not_drawn_again(checkpoint, tmp_path, drawn):
    command = ["num_samples=18", "batch_size=4", "seed=3"]
    whole = all_images(run_sample(checkpoint, *command))
    drawn.clear()
    command.append(f"output={tmp_path / 'out'}")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED_WHILE_WRITING, f"checkpoint={checkpoint}", *QUIET, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    folder = tmp_path / "out" / "shards"
    assert len(list(folder.glob("part-*.npz"))) == 2
    assert len(list(folder.glob("*.incomplete"))) == 1
    assert torch.equal(all_images(run_sample(checkpoint, *command)), whole)
    assert drawn == [8, 12, 16]
    assert not list(folder.glob("*.incomplete"))


def test_sigterm_ends_the_command_with_one_line_and_the_same_command_goes_on(checkpoint, tmp_path, drawn):
    command = [*QUIET, "num_samples=600", "batch_size=4", "seed=3", "solver.name=sequential"]
    command.append(f"output={tmp_path / 'out'}")
    folder = tmp_path / "out" / "shards"
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "sample.py", f"checkpoint={checkpoint}", *command],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while len(list(folder.glob("part-*.npz"))) < 3:
            time.sleep(0.01)
            assert process.poll() is None, process.communicate()[1]
        process.send_signal(signal.SIGTERM)
        _, printed = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143, printed
    assert printed.splitlines()[-1] == f"terminated; go on with: the same command and output={tmp_path / 'out'}"
    assert "Traceback" not in printed
    finished = [json.loads(line)["first"] for line in (folder / "index-0.jsonl").read_text().splitlines()]
    assert 2 <= len(finished) <= 100
    before = {path: path.stat().st_mtime_ns for path in (folder / f"part-{first:08d}.npz" for first in finished)}
    continued = all_images(run_sample(checkpoint, *command))
    assert drawn == [first for first in range(0, 600, 4) if first not in finished]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert torch.equal(all_images(run_sample(checkpoint, *command[:-1])), continued)


FLAT = """
import resource, sys
import torch
from lit_parallel.config import SampleConfig, load_config
from lit_parallel.sampling.predict import SamplingModule
from sample import sample

torch.set_num_threads(1)
step = SamplingModule.predict_step

def with_large_images(module, batch, batch_index):
    _, solution = step(module, batch, batch_index)
    solution.value = torch.rand(len(batch), 128 * 128)
    return torch.randint(256, (len(batch), 1, 128, 128), dtype=torch.uint8), solution

SamplingModule.predict_step = with_large_images
for number, output in ((200, "small"), (2000, "large")):
    overrides = [*sys.argv[2:], f"num_samples={number}", "batch_size=100", f"output={sys.argv[1]}/{output}"]
    sample(load_config(SampleConfig, overrides=overrides))
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads memory in the unit of Linux")
def test_memory_does_not_grow_with_the_number_of_images(checkpoint, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            FLAT,
            tmp_path,
            f"checkpoint={checkpoint}",
            *QUIET,
            "solver.name=sequential",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    small, large = (int(line.split()[1]) / 1024 for line in done.stdout.splitlines() if line.startswith("peak"))
    assert large - small < 10  # megabytes; the images are 28 more


@pytest.mark.parametrize("way", ["sequential", "jacobi", "gs_jacobi", "cached_sequential", "fused"])
def test_a_sample_that_is_not_finite_is_marked_and_the_others_are_spared(way, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    small = ["model.name=pixelcnnpp", "model.filters=4", "model.resnets=1", "model.mixtures=2", "model.num_classes=3"]
    model = build_model(load_config(TrainConfig, None, small), (1, 8, 8))
    healthy = all_images(run_sample(saved(model, tmp_path / "healthy"), "num_samples=5", "batch_size=3"))
    with torch.no_grad():
        for name, module in model.network.named_modules():
            if name.endswith("down_right.label"):
                module.weight[1] = 3e38  # finite, as the weights of a file must be; what it is added to is not
    if way == "fused":
        monkeypatch.setattr(FusedPixelCNNppSystem, "covered", staticmethod(lambda plain: True))
        monkeypatch.setattr("lit_parallel.modules.pixelcnnpp.triton_runs_on", lambda device: True)
    solver = "gs_jacobi" if way == "fused" else way
    results = run_sample(saved(model, tmp_path), "num_samples=5", "batch_size=3", f"solver.name={solver}")
    assert [status is Status.NON_FINITE for status in results.solution.status] == [False, True, False, False, True]
    spared = [0, 2, 3]
    assert torch.equal(all_images(results)[spared], healthy[spared])
    assert results.report["not_solved"] == {"non_finite": [1, 4]}
    index = json.loads((results.shards.folder / "index.json").read_text())
    assert [line["non_finite"] for line in index["shards"]] == [[1], [4]]
    with np.load(results.shards.folder / "part-00000003.npz") as content:
        assert content["status"].tolist() == ["converged", "non_finite"]
        assert content["certified"].tolist() == [way != "sequential", False]
    printed = capsys.readouterr().out
    assert "2 of them are not finite (1, 4)" in printed


def test_images_as_pngs(checkpoint, tmp_path):
    command = ("batch_size=4", f"output={tmp_path / 'out'}", "png=true")
    results = run_sample(checkpoint, "num_samples=6", *command)
    results = run_sample(checkpoint, "num_samples=7", *command)
    files = sorted((tmp_path / "out" / "png").iterdir())
    assert [file.name for file in files] == [f"{index:08d}.png" for index in range(7)]
    pictures = np.stack([np.array(Image.open(file)) for file in files])
    assert torch.equal(torch.from_numpy(pictures)[:, None], all_images(results))


def test_the_sampler_is_gone_before_results_are_written(checkpoint, monkeypatch):
    modules = []
    start = SamplingModule.on_predict_start

    def remembering(module):
        start(module)
        modules.append(module)

    def write(*_):
        assert modules[0]._sampler is None
        raise UserError("reached")

    monkeypatch.setattr(SamplingModule, "on_predict_start", remembering)
    monkeypatch.setattr("lit_parallel.report.write_results", write)
    with pytest.raises(UserError, match="reached"):
        run_sample(checkpoint, "num_samples=2")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to..."),
    ],
)
def test_a_batch_that_does_not_fit_is_one_line(error, checkpoint, tmp_path, monkeypatch):
    command = ("num_samples=12", "batch_size=4", f"output={tmp_path / 'out'}")
    batch = Sampler.batch

    def failing(sampler, indices, observer=None):
        if indices[0] == 8:
            raise error
        return batch(sampler, indices, observer)

    monkeypatch.setattr(Sampler, "batch", failing)
    with pytest.raises(UserError, match=r"^Memory does not suffice for batch_size=4: set a smaller batch_size\."):
        run_sample(checkpoint, *command)
    assert len(list((tmp_path / "out" / "shards").glob("part-*.npz"))) == 2  # what was finished is kept


def test_another_error_is_not_taken_for_the_end_of_memory():
    with pytest.raises(RuntimeError, match="shapes"), fitting_into_memory("batch_size=4", "set a smaller batch_size"):
        raise RuntimeError("shapes do not match")


@pytest.mark.parametrize("processes", [1, 2, 8])
def test_whole_batches_are_dealt_to_processes(processes):
    dealt = []
    for rank in range(processes):
        data = SampleIndices([range(0, 4), range(4, 8), range(8, 10)])
        data.trainer = type("Trainer", (), {"global_rank": rank, "world_size": processes})()
        dealt += list(data.predict_dataloader())
    assert sorted(batch for batch in dealt if batch) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
