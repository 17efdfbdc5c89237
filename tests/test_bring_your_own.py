"""The page about models of one's own is a program: it runs, and does what it says."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

import lit_parallel
from callbacks import SampleGrid
from lit_parallel.errors import UserError
from lit_parallel.sampling.noise import generator
from lit_parallel.solvers import SolverOptions

PAGE = (Path(__file__).parent.parent / "docs" / "bring_your_own.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page's names after all of its blocks have run, in order, in a folder of their own, and what they printed."""
    folder = tmp_path_factory.mktemp("page")
    names: dict = {}
    printed: list[str] = []
    names["print"] = lambda *words: printed.append(" ".join(map(str, words)))
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        patch.chdir(folder)
        patch.setattr("wandb.init", lambda *_, **__: pytest.fail("W&B was asked for"))
        for number, block in enumerate(blocks("python")):
            exec(compile(block, f"block {number} of the page", "exec"), names)
    return SimpleNamespace(names=names, printed=printed, folder=folder)


def quick_trainer(**arguments):
    switches = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return pl.Trainer(accelerator="cpu", max_epochs=1, **dict.fromkeys(switches, False), **arguments)


def test_it_learns(page):
    (bits,) = [float(line.split()[0]) for line in page.printed if "bits per dimension" in line]
    counts = page.names["images"].flatten().bincount().double()
    frequencies = counts[counts > 0] / counts.sum()
    assert bits < float(-(frequencies * frequencies.log2()).sum())  # all a model knows that does not look around


def test_it_needs_no_tracking_and_writes_nothing_but_what_it_says(page):
    files = {str(path.relative_to(page.folder)) for path in page.folder.rglob("*") if path.is_file()}
    assert files == {"grids/epoch-0001.png", "digits.ckpt", "transformer.pt"}


def test_the_callback_draws_a_grid_of_16_samples(page):
    picture = Image.open(page.folder / "grids" / "epoch-0001.png")
    assert min(picture.size) >= 4 * 7
    assert len(picture.convert("L").getcolors()) > 10


@pytest.mark.parametrize("model", ["model", "restored", "elsewhere", "convolutional", "binary"])
def test_all_solvers_agree_bit_for_bit_and_are_certified(page, model):
    model = page.names[model]
    expected, reference = lit_parallel.sample(model, 4, solver="sequential", seed=3)
    assert len(expected.unique()) > 1
    for solver in (*("jacobi", "jacobi_gs", "gs_jacobi"), SolverOptions(name="gs_jacobi", window=5)):
        samples, solution = lit_parallel.sample(model, 4, solver=solver, seed=3)
        assert torch.equal(samples, expected)
        assert torch.equal(solution.value, reference.value)
        assert solution.certified.all()
        assert (solution.certificate_iterations == 1).all()


def test_jacobi_needs_far_fewer_iterations_than_there_are_equations(page):
    lines = [line for line in page.printed if "certified" in line]
    assert [line.split()[0] for line in lines] == ["jacobi", "gs_jacobi", "jacobi_gs"]
    assert all(line.endswith("certified: True, equal: True") for line in lines)
    assert int(re.search(r"at most +(\d+) of 49", lines[0])[1]) <= 25


def test_the_printed_output_on_the_page_has_the_form_of_the_real_one(page):
    shown = [line for block in blocks("text") for line in block.splitlines() if "certified" in line]
    real = [line for line in page.printed if "certified" in line]
    without_numbers = [[re.sub(r"[\d.]+", "#", " ".join(line.split())) for line in lines] for lines in (shown, real)]
    assert without_numbers[0] == without_numbers[1]


def test_a_model_that_peeks_is_named_as_the_page_says(page):
    (message,) = [line for line in page.printed if "not causal" in line]
    assert message in PAGE.splitlines()
    names = page.names
    network = names["CausalConvolutions"](1, 1)
    network.left.register_forward_pre_hook(lambda _, inputs: inputs[0].roll(-1, dims=3))  # left and here
    peeking = lit_parallel.ConditionalModule(network, names["Bernoulli"](), (1, 7, 7), layout="image")
    with pytest.raises(UserError, match=r"^CausalConvolutions is not causal: its output at position 48 changes with"):
        lit_parallel.check_causality(peeking)


def test_ones_own_conditional_samples_its_own_distribution(page):
    bernoulli = page.names["Bernoulli"]()
    logits = torch.full((20_000, 1), 0.8)
    for coupling in bernoulli.couplings:
        noise = torch.from_numpy(bernoulli.draw_noise(generator(0, 0), 20_000, coupling))
        share = bernoulli.sample(logits, noise.float(), coupling, 1.0).mean()
        exact = bernoulli.log_prob(logits[:1], torch.ones(1, 1)).exp()
        assert abs(share - exact) < 0.015  # four standard deviations


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(TensorDataset(torch.rand(4, 1, 7, 7)), batch_size=2),
        DataLoader(TensorDataset(torch.zeros(4, 1, 28, 28, dtype=torch.uint8)), batch_size=2),
        DataLoader(torch.zeros(4, 1, 7, 7, dtype=torch.uint8), batch_size=2),
    ],
    ids=["0 to 1", "of another size", "not in a tuple"],
)
@pytest.mark.filterwarnings("ignore:.*(does not have many workers|no `val_dataloader`|smaller than the logging)")
def test_images_that_do_not_fit_are_refused_in_one_line(page, loader):
    with pytest.raises(UserError, match=r"^The loader must yield tuples that start with .*\[batch, 1, 7, 7\]"):
        quick_trainer().fit(page.names["binary"], loader)


@pytest.mark.filterwarnings("ignore:.*(does not have many workers|no `val_dataloader`|smaller than the logging)")
@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
@pytest.mark.parametrize("validation", ["some", "no images", "no loader", "switched off"])
def test_one_grid_is_drawn_per_epoch_with_and_without_validation(page, tmp_path, monkeypatch, validation):
    drawn = []
    monkeypatch.setattr("callbacks.sample_grid.save_image_grid", lambda images, path: drawn.append(path.name))
    loaders = {"no images": [], "no loader": None}.get(validation, page.names["validation"])
    trainer = quick_trainer(
        limit_train_batches=1,
        limit_val_batches=0 if validation == "switched off" else 1,
        callbacks=[SampleGrid(every_n_epochs=1, folder=tmp_path)],
    )
    trainer.fit(page.names["binary"], page.names["training"], loaders)
    assert drawn == ["epoch-0000.png"]
