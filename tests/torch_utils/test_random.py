"""Random streams: distinct, reproducible, the same however they are cut."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dnnlib import UserError
from torch_utils.random import derive_seed, draw_classes, generator, sample_generators, stacked_randn
from training.conditions import DROPOUT, INIT, LABELS, NOISE, STEPS
from training.config import DistillConfig, micro_batch

numbers = st.integers(0, 2**32 - 1)


@given(st.integers(1, 4).flatmap(lambda n: st.tuples(st.tuples(*[numbers] * n), st.tuples(*[numbers] * n))))
@settings(max_examples=300, deadline=None)
def test_different_streams_of_one_length_have_different_seeds(pair):
    a, b = pair
    assume(a != b)
    assert derive_seed(*a) != derive_seed(*b)
    assert derive_seed(*a) == derive_seed(*a) and 0 <= derive_seed(*a) < 2**63


def test_streams_of_a_run_do_not_meet():
    seeds, iterations = [], range(300)
    for seed in range(4):
        seeds += [derive_seed(seed, name, i) for name in (NOISE, LABELS, STEPS) for i in iterations]
        seeds += [derive_seed(seed, DROPOUT, i, rank) for i in iterations for rank in range(4)]
        seeds.append(derive_seed(seed, INIT))
    assert len(set(seeds)) == len(seeds) == 4 * (3 * 300 + 4 * 300 + 1)


def test_derived_seeds_are_the_recorded_ones():
    """A run of an earlier version can be continued only while these stay as they are."""
    assert derive_seed(0, 0, 0) == 6569863346532939966
    a, b = generator(1, 2, 3), generator(1, 2, 3)
    assert torch.equal(torch.randn(5, generator=a), torch.randn(5, generator=b))
    assert a.device.type == "cpu"


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=6), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_a_row_depends_on_its_seed_alone(seeds, cut):
    whole = stacked_randn(sample_generators(seeds), (2, 3))
    cut = min(cut, len(seeds))
    parts = [stacked_randn(sample_generators(part), (2, 3)) for part in (seeds[:cut], seeds[cut:]) if part]
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(whole.flip(0), stacked_randn(sample_generators(seeds[::-1]), (2, 3)))
    for seed, row in zip(seeds, whole):  # as EDM draws it, so that seeds mean the same there
        assert torch.equal(row, torch.randn(2, 3, generator=torch.Generator().manual_seed(seed)))


def test_integers_follow_the_noise_and_stay_in_range():
    generators = sample_generators(range(200))
    stacked_randn(generators, (3,))
    drawn = draw_classes(generators, 3)
    assert drawn.dtype == torch.int64 and set(drawn.tolist()) == {0, 1, 2}
    assert not torch.equal(drawn, draw_classes(sample_generators(range(200)), 3))


def test_classes_are_as_frequent_as_stated():
    frequencies, seeds = [0.0, 0.6, 0.0, 0.3, 0.1, 0.0], range(3000)
    drawn = draw_classes(sample_generators(seeds), 6, frequencies)
    assert drawn.dtype == torch.int64 and drawn.shape == (3000,)
    counts = torch.bincount(drawn, minlength=6) / 3000
    assert torch.allclose(counts, torch.tensor(frequencies), atol=0.03) and set(drawn.tolist()) == {1, 3, 4}
    assert torch.equal(drawn[5:9], draw_classes(sample_generators(seeds[5:9]), 6, frequencies))  # by its seed alone
    assert torch.equal(drawn, draw_classes(sample_generators(seeds), 6, [10 * f for f in frequencies]))
    assert draw_classes([generator(1)], 6, frequencies, 7).shape == (7,)


def test_classes_without_frequencies_are_drawn_as_ever():
    one_by_one = [torch.randint(4, [1], generator=g) for g in sample_generators(range(50))]
    assert torch.equal(draw_classes(sample_generators(range(50)), 4), torch.cat(one_by_one))
    expected = torch.randint(5, [9], generator=generator(2, 3))
    assert torch.equal(draw_classes([generator(2, 3)], 5, None, 9), expected)


@given(st.integers(1, 64), st.integers(1, 8), st.one_of(st.none(), st.integers(1, 80)))
@settings(max_examples=300, deadline=None)
def test_micro_batches_share_the_batch_evenly_or_are_refused(batch, processes, batch_gpu):

    fits = batch % processes == 0 and (batch // processes) % min(batch_gpu or batch, batch // processes) == 0
    try:
        size = micro_batch(batch, batch_gpu, processes)
    except UserError as error:
        assert not fits and "choose a" in error.message
    else:
        assert fits and size <= (batch_gpu or batch) and (batch // processes) % size == 0
        assert size == min(batch_gpu or batch, batch // processes)


@given(st.floats(0.001, 5, allow_nan=False), st.integers(1, 300))
@settings(max_examples=200, deadline=None)
def test_total_covers_the_request_with_less_than_one_batch_too_many(total_kimg, batch):
    config = DistillConfig("x", total_kimg=total_kimg, batch=batch)
    wanted = round(total_kimg * 1000)
    assert config.total_images % batch == 0 and wanted <= config.total_images < max(wanted, 1) + batch
    assert config.learning_rate(0) == config.lr and config.learning_rate(config.total_images) == config.lr * 0.1
    linear = replace(config, lr_schedule="linear")
    rates = [linear.learning_rate(images) for images in range(0, config.total_images, batch)]
    assert rates[0] == config.lr and rates[-1] > 0 and linear.learning_rate(config.total_images) == 0
    assert np.allclose(np.diff(rates), -config.lr * batch / config.total_images, rtol=1e-6, atol=0)


@given(st.integers(4, 7), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_every_inserted_timestamp_counts(num_steps, m):
    config = DistillConfig("x", num_steps=num_steps, M=m)
    assert (config.teacher_steps(num_steps) - 1) % (m + 1) == 0
    assert len(range(0, config.teacher_steps(num_steps), m + 1)) == num_steps
