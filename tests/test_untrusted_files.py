"""Files are data: nothing in one is executed, however it gets in, nor does it take more memory than it is large."""

import gzip
import hashlib
import io
import os
import pickle
import tarfile
import tracemalloc
import zipfile

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

import lit_parallel
from lit_parallel.checkpoint import as_checkpoint, build_model, saved_config
from lit_parallel.config import SampleConfig, TrainConfig, from_container, load_config, save_config, to_container
from lit_parallel.data import cifar10, download, mnist, official
from lit_parallel.data.options import DataOptions
from lit_parallel.errors import UserError
from lit_parallel.memory import weights_at_most
from lit_parallel.modules.densenet import DenseNetModule
from lit_parallel.modules.options import DenseNetOptions
from lit_parallel.networks.densenet_weights import PUBLISHED
from lit_parallel.published import convert
from lit_parallel.sampling.given import load_given
from lit_parallel.sampling.options import InpaintOptions
from lit_parallel.weights_file import ForeignFileError, read
from sample import sample
from train import evaluate

TINY = ["model.hidden_sizes=[4]", "data.side=8"]
SHAPE = (1, 8, 8)


def checkpoint_of(*overrides):
    """What a checkpoint of an untrained model holds."""
    return as_checkpoint(build_model(load_config(TrainConfig, None, [*TINY, *overrides]), SHAPE))


def save(content, path, **options):
    torch.save(content, path, **options)
    return path


# -- payloads ---------------------------------------------------------------------------------------------------------


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def resume(path):
    """As a training that goes on reads its checkpoint: by Lightning's own loading."""
    model = build_model(load_config(TrainConfig, None, TINY), SHAPE)
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_epochs=1
    )
    trainer.fit(model, torch.utils.data.DataLoader([0]), ckpt_path=path)


WAYS_IN = {
    "lit_parallel.load": lit_parallel.load,
    "sample.py": lambda path: sample(load_config(SampleConfig, None, [f"checkpoint={path}", "wandb.mode=disabled"])),
    "stage=test": lambda path: evaluate(
        load_config(TrainConfig, None, ["stage=test", f"checkpoint={path}", "wandb.mode=disabled"])
    ),
    "resume": resume,
    "model.weights": lambda path: DenseNetModule(
        DenseNetOptions(architecture="cifar", depth=10, weights=str(path)), (3, 32, 32)
    ).load_initial_weights(),
    "published": lambda path: convert(path, path.with_name("converted.ckpt")),
    "inpaint.images": lambda path: load_given(InpaintOptions(images=str(path)), SHAPE, None),
    "inpaint.given": lambda path: load_given(InpaintOptions(images="test", given=str(path)), SHAPE, torch.zeros(1)),
}

WRITERS = {
    "archive": lambda content, path: torch.save(content, path),
    "older format": lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
    "pickle": lambda content, path: path.write_bytes(pickle.dumps(content)),
    "numpy": lambda content, path: np.save(path, np.array([content], dtype=object), allow_pickle=True),
}


@pytest.mark.filterwarnings("ignore")  # Lightning's, about the loader
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("way", WAYS_IN)
def test_a_payload_is_refused_and_not_executed(tmp_path, monkeypatch, way, write):
    monkeypatch.chdir(tmp_path)
    # A name that numpy keeps, and that leads to its reader.
    path, executed = tmp_path / "hostile.npy", tmp_path / "executed"
    content = checkpoint_of()
    write(content | {"hyper_parameters": content["hyper_parameters"] | {"more": Payload(executed)}}, path)
    # Lightning's own words where it reads the file itself; whoever calls it has read the file before.
    expected = pickle.UnpicklingError if way == "resume" else UserError
    with pytest.raises(expected) as caught:
        WAYS_IN[way](path)
    assert not executed.exists()
    assert way == "resume" or str(caught.value).isprintable()


def test_the_payload_of_these_tests_works(tmp_path):
    path = save({"more": Payload(tmp_path / "executed")}, tmp_path / "hostile.ckpt")
    torch.load(path, weights_only=False)
    assert (tmp_path / "executed").is_dir()


@pytest.mark.filterwarnings("ignore")  # scripts are deprecated
def test_a_script_in_the_place_of_weights_is_not_run(tmp_path):
    path = tmp_path / "script.pt"
    torch.jit.script(torch.nn.Linear(1, 1)).save(path)
    with pytest.raises(UserError):
        read(path)


@pytest.mark.parametrize("key", ["seed", "model", "experiment", "trainer.strategy", "_target_"])
@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir [executed]", "!!python/name:os.mkdir"])
def test_a_config_executes_and_imports_nothing(tmp_path, monkeypatch, key, tag):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hostile.yaml").write_text(f"{key.replace('.', ': {')}: {tag}{'}' * key.count('.')}\n")
    for arguments in ((tmp_path / "hostile.yaml",), (None, [f"{key}={tag}"])):
        with pytest.raises(UserError):
            load_config(TrainConfig, *arguments)
    assert not (tmp_path / "executed").exists()


# -- what a checkpoint says of itself ---------------------------------------------------------------------------------


def test_a_text_in_a_checkpoint_is_no_reference(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "leaked")
    content = checkpoint_of()
    references = ["${oc.env:SECRET}", "\\${seed}", "a\\\\${seed}${experiment}"]
    content["hyper_parameters"]["config"]["wandb"] |= {"tags": references, "name": "${oc.env:SECRET}"}
    model = lit_parallel.load(save(content, tmp_path / "a.ckpt"))
    config = saved_config(model)
    assert (config.wandb.tags, config.wandb.name) == (references, "${oc.env:SECRET}")
    assert from_container(TrainConfig, to_container(config)) == config
    save_config(config, tmp_path / "config.yaml")
    assert load_config(TrainConfig, tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"model": {"hidden_sizes": [1 << 20, 1 << 20]}}}, "a larger model than the file holds"),
        ({"config": {"model": {"name": "pixelcnnpp", "filters": 512}}}, "a larger model than the file holds"),
        ({"config": {"model": {"name": "rnn", "layers": 1000, "hidden_size": 1000}}}, "a larger model than the file"),
        ({"config": {"model": {"name": "os.system"}}}, "'model.name' cannot be 'os.system'"),
        ({"config": {"model": {"_target_": "os.system"}}}, "Unknown option 'model._target_'"),
        ({"config": {"seed\x1b[31m": 1}}, r"Unknown option 'seed [31m'"),
        ({"config": {"seed": {(1, 2): torch.zeros(2)}}}, "Option 'seed' must be of type integer"),
        ({"sample_shape": [1, 8, 10**9]}, "is too large"),
        ({"sample_shape": [1, 8, -8]}, "cannot have the shape [1, 8, -8]"),
        ({"sample_shape": [1, 8, 8.0]}, "cannot have the shape [1, 8, 8.0]"),
        ({"sample_shape": "188"}, "cannot have the shape '188'"),
        ({"sample_shape": None}, "not iterable"),
        ({"sample_shape": [1]}, "cannot have the shape [1]"),
    ],
)
def test_a_checkpoint_that_lies_about_itself(tmp_path, change, message):
    content = checkpoint_of()
    content["hyper_parameters"] |= change
    path = save(content, tmp_path / "a.ckpt")
    with pytest.raises(UserError) as caught:
        lit_parallel.load(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def doubled(levels):
    """A list of lists ... that stands for 2 ** levels values."""
    value = [1]
    for _ in range(levels):
        value = [value, value]
    return value


def nested(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize("value", [doubled(60), nested(100)], ids=["doubled", "deep"])
def test_a_config_in_a_checkpoint_is_small(tmp_path, value):
    content = checkpoint_of()
    content["hyper_parameters"]["config"]["wandb"]["tags"] = value
    with pytest.raises(UserError, match="does not fit its own config"):
        lit_parallel.load(save(content, tmp_path / "a.ckpt"))


@pytest.mark.parametrize(
    "text",
    [
        "a0: &a0 [1]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(60)),
        "a: &a [*a]",
        "a: " + "[" * 100 + "]" * 100,
        "a: " + "[" * 3000 + "]" * 3000,
        "# " + "x" * (1 << 20),
    ],
    ids=["doubled", "holds itself", "deep", "deeper", "long"],
)
def test_a_config_file_is_small(tmp_path, text):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"more than a config can|that is no config"):
        load_config(TrainConfig, path)


# -- tensors ----------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_is_noticed(tmp_path):
    path = save({"weight": torch.zeros(999)}, tmp_path / "a.pth")
    content = bytearray(path.read_bytes())
    content[content.index(bytes(999 * 4)) + 2000] ^= 1
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)["weight"].any()  # torch does not look
    with pytest.raises(UserError, match=r"^It is damaged or incomplete"):
        read(path)


def test_a_record_that_is_marked_as_a_folder_is_refused(tmp_path):
    path = save({"weight": torch.ones(999)}, tmp_path / "a.pth")
    content = bytearray(path.read_bytes())
    entry = content.index(b"a/data/0", content.index(b"PK\x01\x02")) - 46  # in the directory at the end
    assert content[entry : entry + 4] == b"PK\x01\x02"
    content[entry + 38] = 0x10
    path.write_bytes(content)
    torch.load(path, weights_only=True)  # torch leaves the memory as it finds it
    with pytest.raises(UserError, match=r"^It is damaged or incomplete"):
        read(path)


def test_a_compressed_archive_is_refused(tmp_path):
    plain = save({"weight": torch.zeros(1 << 22)}, tmp_path / "a.pth")
    bomb = tmp_path / "bomb.pth"
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in source.namelist():
            archive.writestr(name, source.read(name))
    assert bomb.stat().st_size < 1 << 16
    with pytest.raises(UserError, match=r"^It is damaged or incomplete"):
        read(bomb)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(1).expand(1 << 40),
        lambda: torch.zeros(1).expand(2),
        lambda: torch.sparse_coo_tensor(size=(1 << 20, 1 << 20)),
        lambda: torch.empty(3, device="meta"),
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    ],
    ids=["expanded", "expanded a little", "sparse", "meta", "quantised"],
)
@pytest.mark.filterwarnings("ignore")
def test_a_tensor_without_its_numbers_is_refused(tmp_path, make):
    path = save({"a": [{"weight": make()}]}, tmp_path / "a.pth")
    with pytest.raises(ForeignFileError, match="without as many numbers"):
        read(path)


def test_views_and_shared_tensors_are_read(tmp_path):
    weight = torch.arange(12.0).reshape(3, 4)
    content = {"a": weight, "again": weight, "part": weight[:, 1:3], "turned": weight.T, "none": weight[:0]}
    content["itself"] = content
    found = read(save(content, tmp_path / "a.pth"))
    for name in ("a", "again", "part", "turned", "none"):
        assert torch.equal(found[name], content[name])


def test_weights_are_counted_before_they_are_written():
    with pytest.raises(UserError, match="too large"), weights_at_most(4 * 4000, "too large"):
        torch.nn.Sequential(torch.nn.Linear(10, 100), torch.nn.Linear(1 << 20, 1 << 14))
    with weights_at_most(4 * 110, "too large"):
        torch.nn.Linear(10, 10)
    torch.nn.Linear(10, 100)  # no longer counted


def test_what_memory_cannot_hold_is_refused():
    with pytest.raises(UserError, match="too large"), weights_at_most(1 << 62, "too large"):
        torch.nn.Linear(1 << 28, 1 << 28)


# -- data files -------------------------------------------------------------------------------------------------------


def test_a_gzip_bomb_is_not_unpacked(tmp_path):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    with gzip.open(path, "wb") as file:
        for _ in range(16):
            file.write(bytes(1 << 24))
    assert path.stat().st_size < 1 << 19
    tracemalloc.start()
    with pytest.raises(UserError, match="it holds more than 67,108,864 bytes"):
        mnist.read_idx(path, dimensions=3)
    assert tracemalloc.get_traced_memory()[1] < 2.5 * official.MOST_BYTES
    tracemalloc.stop()


def test_a_file_larger_than_any_official_one_is_not_read(tmp_path):
    path = tmp_path / "data_batch_1.bin"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # takes no room on the disk
    with pytest.raises(UserError, match="it holds more than 67,108,864 bytes"):
        official.read_bytes(path)


@pytest.mark.parametrize("shape", [(1 << 31, 28, 28), ((1 << 32) - 1,) * 3])
def test_a_header_allocates_nothing(tmp_path, shape):
    path = tmp_path / "images"
    path.write_bytes(bytes([0, 0, 8, 3]) + b"".join(size.to_bytes(4) for size in shape) + bytes(784))
    with pytest.raises(UserError, match="it is truncated"):
        mnist.read_idx(path, dimensions=3)


@pytest.fixture
def hostile_archive(tmp_path, monkeypatch):
    """Makes the official archive of one batch and of members that point elsewhere."""

    def make(batch=b"batch", **kinds):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
            for name, content in {
                "../outside": b"x",
                "/tmp/lit-parallel-outside": b"x",
                f"{cifar10.ARCHIVE_FOLDER}/../../outside": b"x",
                f"{cifar10.ARCHIVE_FOLDER}/data_batch_1.bin/../../../outside": b"x",
                f"{cifar10.ARCHIVE_FOLDER}/data_batch_1.bin": batch,
            }.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                for key, value in kinds.items() if name.endswith("batch_1.bin") else ():
                    setattr(member, key, value)
                tar.addfile(member, io.BytesIO(content))
        folder = tmp_path / "a" / "b"
        folder.mkdir(parents=True)
        (folder / "cifar-10-binary.tar.gz").write_bytes(buffer.getvalue())
        monkeypatch.setattr(cifar10, "MD5", hashlib.md5(buffer.getvalue()).hexdigest())
        return cifar10.Cifar10Data(DataOptions(folder=str(folder)), seed=0)

    return make


def test_an_archive_cannot_leave_its_folder(tmp_path, hostile_archive):
    data = hostile_archive()
    data.fetch(["data_batch_1.bin"])
    assert data.path("data_batch_1.bin").read_bytes() == b"batch"
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"a/b/cifar-10-binary.tar.gz", f"a/b/{cifar10.ARCHIVE_FOLDER}/data_batch_1.bin"}
    assert not os.path.exists("/tmp/lit-parallel-outside")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_a_link_in_an_archive_is_not_followed(tmp_path, hostile_archive, kind):
    (tmp_path / "secret").write_text("secret")
    data = hostile_archive(b"", type=kind, linkname=str(tmp_path / "secret"))
    with pytest.raises(UserError, match=r"it cannot be unpacked .*is no file"):
        data.fetch(["data_batch_1.bin"])
    assert not list((tmp_path / "a" / "b" / cifar10.ARCHIVE_FOLDER).iterdir())


def test_every_download_has_a_checksum():
    assert all(len(bytes.fromhex(digest)) == 16 for digest in (cifar10.MD5, *mnist.MD5.values()))
    assert "md5" in download.download.__annotations__
    for url in PUBLISHED.values():  # torch.hub compares the file with what its name ends in
        assert len(bytes.fromhex(url.removesuffix(".pth").rpartition("-")[2])) >= 4
