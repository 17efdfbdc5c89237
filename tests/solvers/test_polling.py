"""How far the host runs ahead of the device, with a thread in the device's place."""

import threading
import time
from queue import SimpleQueue
from types import SimpleNamespace

import pytest
import torch

from lit_parallel.solvers.polling import replay_until_finished


class Device:
    """Does what it is told, one thing after another, and says in the flag when an iteration was the last."""

    def __init__(self, seconds, enough):
        self.flag = torch.zeros(1, dtype=torch.int64)
        self.launched = 0
        self._seconds, self._enough, self._work = seconds, enough, SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def launch(self):
        self.launched += 1
        self._work.put(self.launched)

    def _run(self):
        while True:
            number = self._work.get()
            if self._seconds:
                time.sleep(self._seconds)
            self.flag[0] = 2 * number + (number >= self._enough)


@pytest.fixture(autouse=True)
def busy_stream(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(query=lambda: False))


@pytest.mark.parametrize("enough", [1, 2, 5])
def test_a_long_iteration_is_never_launched_for_nothing(enough):
    device = Device(seconds=0.01, enough=enough)
    replay_until_finished(device.launch, device.flag, 100, torch.device("cpu"))
    assert device.launched == enough


@pytest.mark.parametrize("enough", [1, 2, 5])
def test_a_short_one_at_most_once(enough):
    device = Device(seconds=0, enough=enough)
    replay_until_finished(device.launch, device.flag, 100, torch.device("cpu"))
    assert enough <= device.launched <= enough + 1


def test_the_limit_ends_it():
    device = Device(seconds=0.002, enough=1000)
    replay_until_finished(device.launch, device.flag, 4, torch.device("cpu"))
    assert device.launched == 4
