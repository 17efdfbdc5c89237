"""Reports side by side: the numbers are the reports' own, whatever else a file holds is one line."""

import json
import math

import pytest
from PIL import Image

from lit_parallel.cli import run_command
from lit_parallel.compare import main, read_report


def row(solver, seconds, **others):
    return {
        "solver": solver,
        "equations": 784,
        "samples": 4,
        "iterations_mean": 50.25,
        "iterations_max": 61,
        "certificate_iterations_max": 1,
        "iteration_speedup": 15.6,
        "work": 9.5,
        "seconds": seconds,
        "solved": 4,
        "speedup_over_sequential": 2.5,
        "bitwise_equal_to_sequential": True,
    } | others


@pytest.fixture
def write(tmp_path):
    def write(name, rows, what="4 images, a CPU", **others):
        folder = tmp_path / name
        folder.mkdir()
        report = {"comparison": {"what": what, "rows": rows}} | others
        (folder / "report.json").write_text(json.dumps(report))
        return folder

    return write


def lines_of(capsys, *argv):
    assert run_command(main, [str(argument) for argument in argv]) == 0
    return capsys.readouterr().out.splitlines()


def refusal(capsys, *argv):
    assert run_command(main, [str(argument) for argument in argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_every_solver_of_every_run_has_a_line(write, capsys, tmp_path):
    runs = [
        write("small", [row("jacobi", 2.0), row("sequential", 5.0)]),
        write("large", [row("gs_jacobi", 1.0, speedup_over_cached_sequential=0.5)], what="4 images, a GPU"),
    ]
    lines = lines_of(capsys, *runs, "--output", tmp_path / "new" / "figure.png")
    of = {line.partition("x")[0].split()[1]: line.split() for line in lines if "50.25/61+1" in line}
    # ms per image: 2 s for 4 images are 500 ms.
    assert of["jacobi"] == ["1", "jacobi", "50.25/61+1", "15.6x", "9.5", "500", "2.5x", "-", "yes"]
    assert of["sequential"][0] == "1"
    assert of["gs_jacobi"] == ["2", "gs_jacobi", "50.25/61+1", "15.6x", "9.5", "250", "2.5x", "0.5x", "yes"]
    assert "   4 images, a GPU" in lines
    assert lines[-1] == f"look at:  {tmp_path / 'new' / 'figure.png'}"
    with Image.open(tmp_path / "new" / "figure.png") as image:
        assert image.width > 1000


def test_the_table_fits_80_columns(write, capsys, tmp_path):
    run = write("a", [row("cached_sequential", 123.45, iterations_mean=1023.5, iterations_max=1024)])
    lines = lines_of(capsys, run, "--output", tmp_path / "a.png")
    table = lines[lines.index(next(line for line in lines if line.startswith("solver"))) :]
    assert max(len(line.rstrip()) for line in table if "cached_sequential" in line) <= 80


def test_a_solver_that_failed_has_no_speedup(write, capsys, tmp_path):
    run = write("a", [row("jacobi", 1.0, solved=3, iteration_speedup=None, bitwise_equal_to_sequential=None)])
    lines = lines_of(capsys, run, "--output", tmp_path / "a.png")
    (line,) = [line for line in lines if "jacobi" in line]
    assert line.split()[3] == line.split()[6] == "unsolved"
    assert line.split()[-1] == "?"


def test_what_is_missing_is_no_number(write):
    (found,) = read_report(write("a", [row("jacobi", 1.0, iteration_speedup=None)])).rows
    assert math.isnan(found.iteration_speedup)
    assert math.isnan(found.speedup["cached_sequential"])
    assert found.speedup["sequential"] == 2.5


def test_what_a_report_says_cannot_write_on_the_terminal(write, capsys, tmp_path):
    run = write("a", [row("[red]jacobi\x1b[2J", 1.0)], what="a\x1b[31m device\n" + "x" * 5000)
    text = "\n".join(lines_of(capsys, run, "--output", tmp_path / "a.png"))
    assert "\x1b" not in text
    assert "[red]jacobi" in text
    assert text.count("x") < 300


def test_a_folder_without_report_is_refused(capsys, tmp_path):
    assert f"There is no '{tmp_path / 'report.json'}'" in refusal(capsys, tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "compares no solvers"),
        ('{"metrics": {}}', "compares no solvers"),  # the report of a test
        ('{"comparison": []}', "is damaged, or of another version"),
        ('{"comparison": {"what": "", "rows": [{"samples": 1}]}}', "is damaged, or of another version"),
    ],
)
def test_other_files_are_refused(capsys, tmp_path, content, said):
    path = tmp_path / "report.json"
    path.write_text(content)
    assert said in refusal(capsys, path, "--output", tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_the_figures_ending_is_checked_first(capsys, tmp_path):
    assert "must end with .png" in refusal(capsys, tmp_path, "--output", "a.txt")
