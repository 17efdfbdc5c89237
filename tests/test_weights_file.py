"""Reading files of weights: what is told of those that cannot be used, and that nothing in them runs."""

import re
from pathlib import Path

import pytest
import torch

from lit_parallel.errors import UserError
from lit_parallel.weights_file import ForeignFileError, read, state_dict_of


class Harmful:
    def __reduce__(self):
        return pytest.fail, ("code in the file was executed",)


@pytest.mark.parametrize("zipped", [True, False])
def test_what_was_saved_is_read(tmp_path, zipped):
    content = {"state_dict": {"weight": torch.rand(2, 3)}, "epoch": 3}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    found = read(tmp_path / "a.pth")
    assert found["epoch"] == 3
    assert torch.equal(found["state_dict"]["weight"], content["state_dict"]["weight"])


def test_nothing_in_a_file_is_executed(tmp_path):
    torch.save({"weight": torch.zeros(1), "other": Harmful()}, tmp_path / "a.pth")
    with pytest.raises(ForeignFileError, match=r"^It holds more than tensors .*; nothing in it was executed\.$"):
        read(tmp_path / "a.pth")


def test_a_missing_file_and_a_folder(tmp_path):
    for path in (tmp_path / "a.pth", tmp_path):
        with pytest.raises(UserError, match=r"^There is no such file\.$"):
            read(path)


def test_a_damaged_file_is_not_taken_for_a_foreign_one(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"weight": torch.zeros(99)}, path)
    for content in (b"", path.read_bytes()[:-200]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"^It is damaged or incomplete: copy it again\.$") as caught:
            read(Path(path))
        assert not isinstance(caught.value, ForeignFileError)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "model_state_dict"])
def test_the_state_dict_of_a_checkpoint(wrapper):
    state = {"weight": torch.zeros(2)}
    assert state_dict_of({"epoch": 3, wrapper: state} if wrapper else state, "No") == state


@pytest.mark.parametrize("content", [[1], {0: torch.zeros(3)}, {"model": {0: 1}}, None], ids=str)
def test_what_is_no_state_dict(content):
    kind = "list" if content == [1] else type(content).__name__
    expected = f"No weights: a state dict maps names to tensors, and this is of type {kind}."
    with pytest.raises(UserError, match=f"^{re.escape(expected)}$"):
        state_dict_of(content, "No weights")
