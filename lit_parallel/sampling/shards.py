"""Sampled images on disk: one shard per batch, and an index of the shards that are whole.

A folder of shards holds

* ``part-00000128.npz``, a batch, named by its first sample: ``images`` (uint8 ``[n, channels, height, width]``), and
  for each of them ``index``, ``status``, ``certified``, ``iterations``, ``certificate_iterations``, ``evaluations``
  and ``frontier``, as :class:`lit_parallel.solution.Solution` explains them;
* ``index.json``: the settings that decide about the images, and each shard's file, first sample, number of samples,
  SHA-256 and samples that are not finite;
* ``index-0.jsonl``, while sampling or after an interruption only: what process 0 has added since, a line for each
  shard.

A shard gets its name when it is whole and on the disk, and its line after that. So at any moment everything can stop:
what has a line and fits its checksum is finished, everything else is drawn again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_parallel.errors import UserError, one_line
from lit_parallel.options import format_value
from lit_parallel.runs import file_sha256, make_folder, short_path, written_whole
from lit_parallel.sampling.autoregressive import Given
from lit_parallel.sampling.sampler import What
from lit_parallel.solution import Solution, Status, concatenate
from lit_parallel.solvers import SolverOptions

_PER_SAMPLE = ("certified", "iterations", "certificate_iterations", "evaluations", "frontier")
_PER_BATCH = ("seconds", "certificate_seconds", "setup_seconds", "length", "solver", "given")


@dataclass(frozen=True)
class Shard:
    """A line of the index.

    Attributes:
        first: Index of its first sample.
        count: Number of samples.
        sha256: Of the file.
        non_finite: Indices of the samples that are not finite.
    """

    first: int
    count: int
    sha256: str
    non_finite: list[int]

    @property
    def file(self) -> str:
        """Its name in the folder."""
        return f"part-{self.first:08d}.npz"

    def line(self) -> dict[str, Any]:
        """As the index has it."""
        return {"file": self.file, **dataclasses.asdict(self)}

    @classmethod
    def of_line(cls, line: Any) -> Shard:
        """The shard that a line describes; raises a ``ValueError`` or ``KeyError`` if it is not one."""
        first, count = line["first"], line["count"]
        if not (type(first) is type(count) is int and first >= 0 and count > 0 and isinstance(line["sha256"], str)):
            raise ValueError("not a shard")
        return cls(first, count, line["sha256"], [int(index) for index in line["non_finite"]])


class Shards:
    """A folder of shards, of one checkpoint, seed and batch size.

    Several processes may :meth:`write`; the first one alone opens, closes and reads.

    Args:
        folder: Where they are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shards: dict[int, Shard] = {}
        self._settings: dict[str, Any] = {}

    def open(self, settings: dict[str, Any]) -> None:
        """Make the folder, or take it up again; what is not whole is forgotten.

        Args:
            settings: What decides about the images (see :func:`settings_of`).

        Raises:
            UserError: If it holds images of other settings, or cannot be read or written.
        """
        make_folder(self.folder)
        self._read_index()
        if self._shards:
            self._refuse_others(settings)
        self._settings = settings
        self._shards = {first: shard for first, shard in self._shards.items() if self._is_whole(shard)}
        for path in self.folder.glob("*.incomplete"):
            path.unlink(missing_ok=True)
        self._write_index()

    def missing(self, num_samples: int, batch_size: int) -> list[range]:
        """The batches that are still to be drawn, as ranges of sample indices.

        A last batch that was shorter than it is now is drawn again.

        Raises:
            UserError: If there are more samples than are asked for.
        """
        there = max((shard.first + shard.count for shard in self._shards.values()), default=0)
        if there > num_samples:
            raise UserError(
                f"'{self.folder}' holds images up to number {there} already: set num_samples={there} or more, or name "
                "another output."
            )
        batches = [range(first, min(first + batch_size, num_samples)) for first in range(0, num_samples, batch_size)]
        return [batch for batch in batches if not self._holds(batch)]

    def write(self, first: int, images: Tensor, solution: Solution, process: int = 0) -> None:
        """Write a batch as a shard.

        Args:
            first: Index of the first sample.
            images: 8-bit images ``[n, channels, height, width]``.
            solution: Of these samples; its value and its iteration map are not kept.
            process: Number of this process.

        Raises:
            UserError: If it cannot be written.
        """
        residual = solution.residual
        content: dict[str, Any] = {
            "images": images.cpu().numpy(),
            "index": np.arange(first, first + len(images)),
            "status": np.array([status.name.lower() for status in solution.status]),
            **{name: getattr(solution, name).cpu().numpy() for name in _PER_SAMPLE},
            **{name: np.array(getattr(solution, name)) for name in _PER_BATCH},
            **({} if residual is None else {"residual": residual.amax(dim=1).cpu().numpy()}),
        }
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **content)
        data = buffer.getvalue()
        non_finite = [first + i for i, status in enumerate(solution.status) if status is Status.NON_FINITE]
        shard = Shard(first, len(images), hashlib.sha256(data).hexdigest(), non_finite)
        with self._saying_how_to_go_on():
            with written_whole(self.folder / shard.file) as incomplete:
                _write_to_disk(incomplete, data)
            journal = self._journal(process)
            try:
                _write_to_disk(journal, f"{json.dumps(shard.line())}\n".encode(), mode="ab")
            except OSError as error:
                raise UserError(f"Cannot write '{journal}': {error.strerror}.") from error

    def close(self) -> None:
        """Join what all processes have written into one index.

        Raises:
            UserError: If it cannot be read or written.
        """
        self._read_index()
        self._write_index()

    def read(self) -> Iterator[tuple[int, Tensor, Solution]]:
        """Every shard in order: index of its first sample, images, and their solution without value.

        Raises:
            UserError: If one cannot be read.
        """
        for first in sorted(self._shards):
            path = self.folder / self._shards[first].file
            try:
                with np.load(path, allow_pickle=False) as content:
                    yield first, torch.from_numpy(content["images"]), _solution(content)
            except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
                raise UserError(f"Cannot read '{path}' ({one_line(error)}): run the command again.") from error

    def read_first(self, number: int) -> tuple[Tensor, Solution]:
        """The first images ``[<= number, channels, height, width]``, and the solution of all, without value.

        ``Solution.residual`` is the largest of all samples, ``[iterations, 1]``; ``Solution.solver`` names all solvers
        that were used.
        """
        images, solutions = [], []
        for first, batch, solution in self.read():
            if first < number:
                images.append(batch[: number - first])
            solutions.append(solution)
        joined = concatenate(solutions)
        joined.solver = ", ".join(dict.fromkeys(solution.solver for solution in solutions))
        if joined.residual is not None:
            joined.residual = joined.residual.amax(dim=1, keepdim=True)
        return torch.cat(images), joined

    def __len__(self) -> int:
        return len(self._shards)

    # -- the index ----------------------------------------------------------------------------------------------

    @property
    def _index(self) -> Path:
        return self.folder / "index.json"

    def _journal(self, process: int) -> Path:
        return self.folder / f"index-{process}.jsonl"

    def _journals(self) -> list[Path]:
        return sorted(self.folder.glob("index-*.jsonl"))

    def _read_index(self) -> None:
        self._settings, self._shards = {}, {}
        try:
            if self._index.exists():
                index = json.loads(self._index.read_text(encoding="utf-8"))
                self._settings = dict(index["settings"])
                for line in index["shards"]:
                    self._note(Shard.of_line(line))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"'{self._index}' is damaged, or no index of images ({one_line(error)}): name another output."
            ) from error
        for journal in self._journals():
            for text in journal.read_bytes().splitlines():
                try:
                    self._note(Shard.of_line(json.loads(text)))
                except (ValueError, KeyError, TypeError):  # the end of a line that the end of its process cut off
                    continue

    def _note(self, shard: Shard) -> None:
        self._shards[shard.first] = shard

    def _write_index(self) -> None:
        shards = [self._shards[first].line() for first in sorted(self._shards)]
        index = {"settings": self._settings, "samples": sum(line["count"] for line in shards), "shards": shards}
        with self._saying_how_to_go_on(), written_whole(self._index) as incomplete:
            _write_to_disk(incomplete, json.dumps(index, indent=2).encode())
        for journal in self._journals():
            journal.unlink()

    @contextlib.contextmanager
    def _saying_how_to_go_on(self) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            output = short_path(self.folder.parent)
            raise UserError(
                f"{error} When that is mended, the same command and output={output} continues with the missing images."
            ) from error

    def _refuse_others(self, settings: dict[str, Any]) -> None:
        for name in {**self._settings, **settings}:
            there, here = (format_value(each.get(name)) for each in (self._settings, settings))
            if there != here:
                raise UserError(
                    f"'{self.folder}' holds images that were drawn with {name}={there}, and now it is {here}: set it "
                    "back, or name another output."
                )

    def _is_whole(self, shard: Shard) -> bool:
        try:
            return file_sha256(self.folder / shard.file) == shard.sha256
        except OSError:
            return False

    def _holds(self, batch: range) -> bool:
        shard = self._shards.get(batch.start)
        return shard is not None and shard.count == len(batch)


def settings_of(
    checkpoint_sha256: str, what: What, solver: SolverOptions, batch_size: int, *, precision: str, device: str
) -> dict[str, Any]:
    """Everything that decides about the bits of the images, by the names of the options.

    Args:
        checkpoint_sha256: Of the file that the model was loaded from: its content counts, not its name.
        what: Seed, options and given pixels.
        solver: Does not count where its results are certified, since those are the same for all solvers.
        batch_size: Samples per evaluation of the network.
        precision: Lightning's word for the arithmetic of the weights.
        device: Type of the device.
    """
    exact = (solver.certify or solver.name == "sequential") and solver.max_iterations is None
    deciding = ("name", "block_size", "window", "max_iterations", "absolute_tolerance", "relative_tolerance", "certify")
    return {
        "checkpoint": f"sha256:{checkpoint_sha256}",
        "seed": what.seed,
        "batch_size": batch_size,
        **{f"sampling.{name}": value for name, value in vars(what.options).items()},
        "inpaint": None if what.given is None else f"sha256:{_sha256_of(what.given)}",
        **(
            {"solver.name": "any, certified"}
            if exact
            else {f"solver.{name}": getattr(solver, name) for name in deciding}
        ),
        "trainer.precision": precision,
        "device": device,
    }


def _solution(content: Any) -> Solution:
    count = len(content["index"])
    residual = content.get("residual")
    per_sample: dict[str, Any] = {name: torch.from_numpy(content[name]) for name in _PER_SAMPLE}
    per_batch: dict[str, Any] = {name: content[name].item() for name in _PER_BATCH}
    return Solution(
        value=torch.empty(count, 0),
        status=[Status[name.upper()] for name in content["status"].tolist()],
        **per_sample,
        **per_batch,
        residual=None if residual is None else torch.from_numpy(residual)[:, None],
    )


def _write_to_disk(path: Path, data: bytes, mode: str = "wb") -> None:
    with open(path, mode) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sha256_of(given: Given) -> str:
    digest = hashlib.sha256()
    for tensor in (given.images, given.mask):
        digest.update(str(list(tensor.shape)).encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
