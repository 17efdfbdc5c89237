"""Run folders: names, the newest checkpoint, and paths a user would type."""

import os
from pathlib import Path

import pytest

from lit_parallel.errors import UserError
from lit_parallel.runs import new_run_folder, newest_checkpoint, run_folder_of, short_path


def test_two_runs_of_one_second_get_two_folders(tmp_path):
    first, second = (new_run_folder(tmp_path, "made") for _ in range(2))
    assert first != second
    assert first.parent == second.parent == tmp_path / "made"


@pytest.mark.parametrize("name", ["..", "a/b", "../elsewhere"])
def test_an_experiment_is_a_plain_name(tmp_path, name):
    with pytest.raises(UserError, match="plain name"):
        new_run_folder(tmp_path, name)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"Cannot create the run folder .*file"):
        new_run_folder(tmp_path / "file", "made")


def test_the_newest_checkpoint_is_the_one_written_last(tmp_path):
    paths = [tmp_path / "made" / run / "checkpoints" / "last.ckpt" for run in ("b", "a")]
    for age, path in zip((100, 0), paths, strict=True):
        path.parent.mkdir(parents=True)
        path.write_text("")
        os.utime(path, (10_000 - age, 10_000 - age))
    assert newest_checkpoint(tmp_path) == paths[1]
    assert newest_checkpoint(tmp_path, "made") == paths[1]
    with pytest.raises(UserError, match=r"no checkpoint below .*other"):
        newest_checkpoint(tmp_path, "other")
    assert run_folder_of(paths[1]) == paths[1].parent.parent.resolve()
    assert run_folder_of(tmp_path / "moved.ckpt") is None


def test_short_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert short_path(tmp_path / "runs" / "x") == Path("runs/x")
    assert short_path(Path("/elsewhere")) == Path("/elsewhere")
