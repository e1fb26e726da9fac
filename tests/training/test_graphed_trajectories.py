"""Trajectories and samples of every kind of model, replayed as CUDA graphs, by a stand-in for these."""

import pytest
import torch
from graph_stand_in import graphs_on_the_cpu
from test_distill import GOLDEN, make_distiller

from models.conditions import Conditions
from models.sampling import draw_latents, student_sampler
from torch_utils.graphs import Graphs


@pytest.mark.parametrize("name", ["sfd", "stage2_v"])
def test_a_training_with_graphs_has_the_same_bits(name):
    """Other noise in each iteration, two micro-batches; also after half precision was given up, in the second."""
    weights = []
    for mode in ("off", "on"):
        distiller = make_distiller(name, micro=2)
        distiller.teacher.graphs = Graphs(mode)
        labels = torch.eye(distiller.student.label_dim)[:4] if distiller.student.label_dim else None
        steps = distiller.config.step_choices
        with graphs_on_the_cpu() as made:
            for i in range(3):
                distiller.teacher.model.compute_dtype = torch.bfloat16 if i < 1 else None
                noise = torch.randn(GOLDEN["noise"][0].shape, generator=torch.Generator().manual_seed(i))
                distiller.iterate(noise, None if labels is None else labels.roll(i, 0), steps[0])
            assert (len(made) > 0) == (mode == "on")
        weights.append([p.detach().clone() for p in distiller.trained])
    assert all(map(torch.equal, *weights))


def test_samples_from_graphs_have_the_same_bits():
    student = make_distiller("sfd").student.eval()
    sampler, seeds = student_sampler(student), range(64)
    expected = sampler.images(seeds)
    sampler = student_sampler(student)
    object.__setattr__(sampler, "graphs", Graphs("on"))
    with graphs_on_the_cpu() as made:
        assert (sampler.images(seeds) == expected).all()
    assert [graph.replays for graph in made] == [3]  # the first of four batches of 16 runs as it is


def test_a_callback_sees_every_step():
    distiller, seen = make_distiller("sfd"), []
    distiller.teacher.graphs = Graphs("on")
    x, _ = draw_latents(distiller.student, range(2))
    with graphs_on_the_cpu() as made:
        for _ in range(3):
            distiller.teacher.trajectory(x, None, 4, lambda **step: seen.append(step["i"]))
    assert made == [] and len(seen) == 3 * (distiller.config.teacher_steps(4) - 1)


def test_conditions_of_several_parts_are_copied_in():
    model = make_distiller("sfd").teacher.model
    given = [Conditions(torch.full([2, 1, 1], float(i)), torch.full([2, 1], i + 0.5)) for i in range(4)]

    def function(x, cond):
        assert isinstance(cond, Conditions) and cond.time_ids is None
        return x + cond.tokens.sum() + cond.pooled.sum()

    with graphs_on_the_cpu() as made:
        graphs, x = Graphs("on"), torch.zeros(2)
        found = [float(model.replayed(graphs, function, None, x, one)[0]) for one in given]
    assert found == [4 * i + 1 for i in range(4)] and len(made) == 1
