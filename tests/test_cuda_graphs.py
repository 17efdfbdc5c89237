"""How work is recorded in a CUDA graph."""

import contextlib
import gc

import pytest
import torch

from lit_parallel.cuda_graphs import capturing


class Recorder:
    """In place of graph and stream: notes what happens to them, and whether garbage would be collected."""

    def __init__(self):
        self.happened = []

    def note(self, what):
        self.happened.append((what, gc.isenabled()))

    def capture_begin(self, capture_error_mode):
        self.note(capture_error_mode)

    def capture_end(self):
        self.note("end")


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()

    @contextlib.contextmanager
    def current(stream):
        assert stream is recorder
        recorder.note("stream")
        yield
        recorder.note("no stream")

    monkeypatch.setattr(torch.cuda, "stream", current)
    return recorder


@pytest.mark.parametrize("collects", [True, False])
def test_on_the_stream_and_without_garbage_collection(recorder, collects):
    before = gc.isenabled()
    try:
        gc.enable() if collects else gc.disable()
        with capturing(recorder, recorder):
            recorder.note("work")
        assert gc.isenabled() is collects
    finally:
        gc.enable() if before else gc.disable()
    wanted = ["stream", "thread_local", "work", "end", "no stream"]
    assert recorder.happened == [(what, False) for what in wanted]


def test_a_capture_that_fails_is_ended(recorder):
    with pytest.raises(ValueError, match="failed"), capturing(recorder, recorder):
        raise ValueError("failed")
    assert gc.isenabled()
    assert recorder.happened[-1] == ("end", False)


@pytest.mark.gpu
def test_replays_what_was_recorded_while_graphs_are_forgotten():
    device = torch.device("cuda", torch.cuda.device_count() - 1)  # not the current one, if there are several
    x = torch.zeros(4, device=device)
    replays = 0
    for _ in range(3):
        graph = torch.cuda.CUDAGraph()
        with capturing(graph, torch.cuda.Stream(device)):
            assert torch.cuda.current_device() == device.index
            x += 1
            holder: dict[str, object] = {"graph": graph}
            holder["itself"] = holder  # only garbage collection gets rid of it
        for _ in range(2):
            graph.replay()
            replays += 1
        del graph, holder
    assert x.tolist() == [replays] * 4
