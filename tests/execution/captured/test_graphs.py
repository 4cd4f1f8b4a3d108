"""A tape does what a CUDA graph does: the same operations on the same tensors, and Python does not run again."""

import pytest
import torch

from microglia.errors import MicrogliaError
from microglia.execution.captured.graphs import TapeCapture


def recorded(work):
    capture = TapeCapture()
    with capture.recording(), torch.inference_mode():
        graph = capture.graph()
        graph.begin()
        try:
            out = work()
        finally:
            graph.end()
    return graph, out


def test_a_replay_reads_the_tensors_as_they_are_now_and_writes_where_it_wrote():
    x, total = torch.arange(6.0).view(2, 3), torch.zeros(3)

    def work():
        total.add_(x.sum(0))
        return torch.softmax(x.t().reshape(3, 2) * 2, -1)

    graph, out = recorded(work)
    place = out.data_ptr()
    x.mul_(-1)
    with torch.inference_mode():
        graph.replay()
    assert out.equal(torch.softmax(x.t() * 2, -1))
    assert out.data_ptr() == place
    assert total.equal(torch.zeros(3))  # once up, once down


def test_what_python_knew_stays_what_it_was():
    factor, x = [2.0], torch.ones(2)
    graph, out = recorded(lambda: x * factor[0])
    factor[0] = 5.0
    graph.replay()
    assert out.tolist() == [2, 2]


@pytest.mark.parametrize("read", [lambda x: x.sum().item(), lambda x: bool((x > 0).all()), lambda x: x.nonzero()])
def test_looking_at_values_is_refused(read):
    with pytest.raises(MicrogliaError, match=r"a captured step may not look at values, but .* does"):
        recorded(lambda: read(torch.ones(3)))


def test_an_error_ends_what_it_left_open():
    capture = TapeCapture()
    graph = capture.graph()

    def breaks():
        with capture.recording():
            graph.begin()
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        breaks()
    assert capture.opened == []
    before = len(graph.calls)
    torch.ones(2).sum()
    assert len(graph.calls) == before
