"""The inception score: closed forms and properties; tests/models/test_published_packages.py has torch-fidelity's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from torch_utils.metrics.inception_score import inception_score


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_certain_and_equally_frequent_classes_score_their_number(classes):
    features = np.tile(np.eye(classes, dtype=np.float32), [12, 1])
    mean, std = inception_score(features, 1000 * torch.eye(classes), splits=1)
    assert mean == pytest.approx(classes) and std == 0


def test_one_distribution_for_all_images_scores_one():
    features = np.ones([40, 3], dtype=np.float32)
    assert inception_score(features, torch.randn(7, 3)) == (pytest.approx(1), pytest.approx(0, abs=1e-12))


def test_the_score_is_between_one_and_the_number_of_classes():
    rng = np.random.default_rng(0)
    for scale in (0.1, 1, 30):
        mean, _ = inception_score(rng.standard_normal([100, 8]) * scale, torch.from_numpy(rng.standard_normal([5, 8])))
        assert 1 <= mean <= 5


def test_too_few_images_are_refused():
    with pytest.raises(ValueError, match="N ≥ 10"):
        inception_score(np.zeros([9, 4]), torch.zeros(3, 4))
