"""The split, the order and the loaders that every dataset shares."""

from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch

from lit_parallel.data.datasets import DATASETS, build_data
from lit_parallel.data.image_data import ImageData, ImageSet
from lit_parallel.data.options import DATA_OPTIONS, DataOptions
from lit_parallel.errors import UserError


class Numbered(ImageData):
    """Image i has the value i everywhere; the labels are sorted."""

    name = "numbered"
    image_shape = (1, 2, 2)
    num_classes = 10
    loads = 0

    def load(self):
        self.loads += 1
        numbers = torch.arange(120, dtype=torch.uint8)
        images = numbers[:, None, None, None].expand(-1, *self.image_shape)
        everything = ImageSet(images, numbers.long() // 10)
        return ImageSet(*everything[:100]), ImageSet(*everything[100:])


def numbered(seed=0, data_class=Numbered, **options):
    return data_class(DataOptions(**{"batch_size": 8, "validation_fraction": 0.2, **options}), seed)


def numbers(loader):
    return [int(image[0, 0, 0]) for images, _ in loader for image in images]


def test_batches_have_the_promised_types_and_shapes():
    data = numbered()
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        images, labels = next(iter(loader))
        assert (images.dtype, tuple(images.shape)) == (torch.uint8, (8, 1, 2, 2))
        assert (labels.dtype, tuple(labels.shape)) == (torch.int64, (8,))
        assert torch.equal(images[:, 0, 0, 0].long() // 10, labels)


def test_split_is_disjoint_and_complete():
    data = numbered(batch_size=1)
    train, validation, test = map(numbers, (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()))
    assert (len(train), len(validation), len(test)) == (80, 20, 20)
    assert sorted(train + validation) == list(range(100))
    assert test == list(range(100, 120))


def test_split_depends_on_the_seed_alone():
    held_out = [numbers(numbered(seed).val_dataloader()) for seed in (3, 3, 4)]
    assert held_out[0] == held_out[1]
    assert set(held_out[0]) != set(held_out[2])
    assert held_out[0] != sorted(held_out[0])


def test_groups_are_not_torn_apart():
    class Grouped(Numbered):
        group_size = 5

    data = numbered(data_class=Grouped, batch_size=1)
    train, validation = (
        {n // 5 for n in numbers(loader)} for loader in (data.train_dataloader(), data.val_dataloader())
    )
    assert len(validation) == 4
    assert not train & validation


def test_order_changes_every_epoch_and_repeats_for_the_seed():
    loader = numbered(seed=3).train_dataloader()
    first, second = numbers(loader), numbers(loader)
    assert first != second
    assert sorted(first) == sorted(second)
    torch.rand(5)  # what else draws random numbers does not matter
    loader = numbered(seed=3).train_dataloader()
    assert (numbers(loader), numbers(loader)) == (first, second)
    assert numbers(numbered(seed=4).train_dataloader()) != first


def test_validation_keeps_its_order():
    loader = numbered().val_dataloader()
    assert numbers(loader) == numbers(loader)


@pytest.mark.parametrize(("batch_size", "batches"), [(30, [30, 30]), (80, [80]), (100, [80])])
def test_only_a_remainder_is_dropped(batch_size, batches):
    data = numbered(batch_size=batch_size)
    assert [len(labels) for _, labels in data.train_dataloader()] == batches
    assert len(numbers(data.val_dataloader())) == 20


def test_remainder_is_kept_when_each_process_has_one_batch(monkeypatch):
    data = numbered(batch_size=50)
    assert data.train_dataloader().drop_last
    monkeypatch.setattr(data, "trainer", SimpleNamespace(world_size=2, global_rank=0))
    assert not data.train_dataloader().drop_last


@pytest.mark.parametrize(
    ("number", "processes", "batch_size", "largest"),
    [(20, 2, 4, 4), (20, 3, 8, 7), (21, 4, 5, 4), (25, 4, 3, 4), (9, 4, 1, 3), (4, 3, 8, 2), (4, 4, 1, 1)],
)
def test_processes_evaluate_each_sample_once_in_equally_many_batches(
    monkeypatch, number, processes, batch_size, largest
):
    data = numbered(evaluation_batch_size=batch_size)
    monkeypatch.setattr(data, "samples", lambda part: ImageSet(*Numbered.load(data)[0][:number]))
    found = []
    for rank in range(processes):
        monkeypatch.setattr(data, "trainer", SimpleNamespace(world_size=processes, global_rank=rank))
        found.append([images[:, 0, 0, 0].tolist() for images, _ in data.test_dataloader()])
    assert len(set(map(len, found))) == 1
    assert max(len(batch) for batches in found for batch in batches) == largest
    assert sorted(sample for batches in found for batch in batches for sample in batch) == list(range(number))


def test_processes_train_together_on_the_batches_of_one(monkeypatch):
    alone, parts = list(numbered(batch_size=16).train_dataloader()), []
    for rank in range(2):
        data = numbered(batch_size=8)
        monkeypatch.setattr(data, "trainer", SimpleNamespace(world_size=2, global_rank=rank))
        parts.append(list(data.train_dataloader()))
    for (images, _), *others in zip(alone, *parts, strict=True):
        together = torch.cat([part for part, _ in others])
        assert sorted(together[:, 0, 0, 0].tolist()) == sorted(images[:, 0, 0, 0].tolist())


def test_setup_reads_once():
    data = numbered()
    for stage in ("fit", "validate", "test", "predict", None):
        data.setup(stage)
    data.test_dataloader()
    assert data.loads == 1


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_workers_deliver_the_same_batches():
    loader = numbered(num_workers=1).train_dataloader()
    assert loader.persistent_workers
    assert numbers(loader) == numbers(numbered().train_dataloader())


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # between Lightning and torch, for any loader
@pytest.mark.parametrize("validation_fraction", [0.0, 0.2])
def test_trainer_runs_without_a_warning(validation_fraction, monkeypatch):
    # As on a machine with many cores, where Lightning asks for more workers.
    monkeypatch.setattr("pytorch_lightning.trainer.connectors.data_connector.suggested_max_num_workers", lambda _: 8)

    class Model(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(4, 1)
            self.seen = {"train": 0, "validation": 0, "test": 0}

        def training_step(self, batch, _):
            self.seen["train"] += len(batch[1])
            return self.linear(batch[0].flatten(1).float()).square().mean()

        def validation_step(self, batch, _):
            self.seen["validation"] += len(batch[1])

        def test_step(self, batch, batch_index):
            self.seen["test"] += len(batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-4)

    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=2,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model, data = Model(), numbered(validation_fraction=validation_fraction)
    trainer.fit(model, data)
    trainer.test(model, data, verbose=False)
    held_out = round(100 * validation_fraction)
    assert model.seen == {"train": 2 * ((100 - held_out) // 8 * 8), "validation": 2 * held_out, "test": 20}


def test_every_name_of_the_options_has_its_class():
    assert set(DATASETS) == set(DATA_OPTIONS)
    for name, options in DATA_OPTIONS.items():
        assert isinstance(build_data(options(name=name), seed=0), DATASETS[name])


def test_unknown_name_suggests_the_near_one():
    with pytest.raises(UserError, match=r"^Unknown dataset 'mnist5' \(data.name\). Did you mean 'mnist5k'\?$"):
        build_data(DataOptions(name="mnist5"), seed=0)
