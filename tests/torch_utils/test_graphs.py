"""CUDA graphs, by a stand-in for them (tests/graph_stand_in.py)."""

import pytest
import torch
from graph_stand_in import NOT_PERMITTED, graphs_on_the_cpu

from dnnlib import UserError
from torch_utils import graphs
from torch_utils.device import plain_operations
from torch_utils.graphs import Graphs, check_mode


def square(x, y=None):
    x = x * x
    return x if y is None else x + y


def test_the_third_call_is_a_replay():
    calls = []

    def function(x, y):
        calls.append(1)
        return square(x, y)

    with graphs_on_the_cpu() as made:
        run = Graphs("on")
        for i in range(6):
            x, y = torch.full([3], float(i)), torch.full([3], 0.5)
            assert torch.equal(run(function, "key", x, y), square(x, y))
        # As it is; then to warm up a stream, and to record.
        assert len(calls) == 3 and [graph.replays for graph in made] == [5]


def test_a_result_outlives_the_next_replay():
    with graphs_on_the_cpu():
        run = Graphs("on")
        results = [run(square, None, torch.full([2], float(i))) for i in range(5)]
    assert [float(r[0]) for r in results] == [0, 1, 4, 9, 16]


def test_inputs_are_left_alone():
    with graphs_on_the_cpu():
        run, inputs = Graphs("on"), [torch.full([2], float(i)) for i in range(4)]
        for x in inputs:
            run(lambda x: x.mul_(2), None, x.clone())
    assert [float(x[0]) for x in inputs] == [0, 1, 2, 3]


def test_keys_shapes_and_dtypes_have_graphs_of_their_own():
    kinds = [(1, torch.ones(2)), (1, torch.ones(3)), (2, torch.ones(2)), (1, torch.ones(2, dtype=torch.float64))]
    with graphs_on_the_cpu() as made:
        run = Graphs("on")
        for _ in range(3):
            for key, x in kinds:
                found = run(lambda x, key=key: x * key, key, x)
                assert torch.equal(found, x * key) and found.dtype == x.dtype
        assert len(made) == len(kinds)


def test_a_value_that_is_read_ends_graphs_with_one_line(capsys):
    lines = []
    with graphs_on_the_cpu() as made:
        run = Graphs("on", lines.append)
        for _ in range(4):
            assert float(run(lambda x: x * float(x.sum()), None, torch.ones(2))[0]) == 2
        run(square, "another", torch.ones(2))
        run(square, "another", torch.ones(2))
    assert lines == [f"Without CUDA graphs: {NOT_PERMITTED}"] and len(made) == 1 and run.mode == "off"


@pytest.mark.parametrize("replay, kept", [(0.5, True), (0.99, False)])
def test_auto_keeps_what_is_faster(monkeypatch, replay, kept):
    seconds = iter([replay, 1.0])
    with graphs_on_the_cpu() as made:
        monkeypatch.setattr(graphs, "_seconds", lambda function, *values: next(seconds))
        run = Graphs("auto")
        for i in range(4):
            assert float(run(square, None, torch.full([2], float(i)))[0]) == i * i
        assert [graph.replays for graph in made] == [3 if kept else 0]


def test_off_plain_and_other_devices_record_nothing():
    with graphs_on_the_cpu() as made:
        for _ in range(3):
            Graphs("off")(square, None, torch.ones(2))
        run = Graphs("on")
        with plain_operations():
            for _ in range(3):
                run(square, None, torch.ones(2))
        assert made == []
    run = Graphs("on")
    for _ in range(3):
        run(square, None, torch.ones(2))
    assert run._recordings == {}


def test_so_many_graphs_are_kept(monkeypatch):
    monkeypatch.setattr(graphs, "MOST", 2)
    with graphs_on_the_cpu() as made:
        run = Graphs("on")
        for _ in range(3):
            for n in (1, 2, 3):
                run(square, None, torch.ones(n))
        assert len(made) == 2


def test_on_needs_a_gpu():
    check_mode("auto", torch.device("cpu"))
    check_mode("on", torch.device("cuda", 0))
    with pytest.raises(UserError, match="needs a GPU of CUDA, and this is on cpu"):
        check_mode("on", torch.device("cpu"))
