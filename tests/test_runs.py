"""Run folders: names, the newest checkpoint, and paths a user would type."""

import os
import signal
import time
from pathlib import Path

import pytest

from lit_parallel.errors import UserError
from lit_parallel.runs import alone_in, new_run_folder, newest_checkpoint, run_folder_of, short_path


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


def test_one_command_at_a_time_in_a_folder(tmp_path):
    folder = tmp_path / "new"
    told, tell = os.pipe()
    with alone_in(folder):
        child = os.fork()  # as a data worker, which may outlive its parent
        if child == 0:
            os.write(tell, b"!")
            time.sleep(20)
            os._exit(0)
        os.read(told, 1)
        with pytest.raises(UserError, match="Another command is at work in"), alone_in(folder):
            pass
    try:
        with alone_in(folder):
            assert not any(folder.iterdir())
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(told)
        os.close(tell)


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
