"""The objective: values by hand, its gradient, its best vector, and bad ones refused."""

import numpy as np
import pytest

from promptrec.errors import InputError
from promptrec.prompt_bank import shipped_prompts
from promptrec.search_space import Objective


@pytest.fixture(scope="module")
def objective(minilm):
    return Objective.mean(minilm.encode(shipped_prompts()["rewrite_prompt"].tolist()[::60]))


def test_the_value_is_the_weighted_scs_by_hand():
    targets = np.array([[1.0, 0.0], [0.0, 1.0]])
    objective = Objective(targets, np.array([3.0, 1.0]))
    assert objective.value(np.array([[1.0, 0.0], [0.6, 0.8]])) == pytest.approx([0.75, 0.75 * 0.216 + 0.25 * 0.512])


def test_the_slope_is_the_values_gradient(objective):
    vector = objective.targets[:3].mean(0)
    step = np.random.default_rng(0).normal(size=vector.shape).astype(np.float32) * 1e-2
    rise = objective.value((vector + step)[None])[0] - objective.value((vector - step)[None])[0]
    assert rise / 2 == pytest.approx(float(objective.slope(vector[None])[0] @ step), rel=0.02)


def test_the_best_vector_beats_every_target_and_the_mean(objective):
    vector, value = objective.best_vector(seed=1)
    mean = objective.targets.mean(0)
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
    assert value == pytest.approx(objective.value(vector[None])[0], abs=1e-6)
    assert value >= objective.value(objective.targets).max() - 1e-6
    assert value >= objective.value((mean / np.linalg.norm(mean))[None])[0] - 1e-6


def test_the_best_vector_of_one_target_is_the_target(minilm):
    target = minilm.encode(["Rewrite it as a poem"])
    vector, value = Objective(target, np.ones(1)).best_vector()
    assert vector == pytest.approx(target[0], abs=1e-5) and value == pytest.approx(1, abs=1e-5)


def test_targets_without_weight_change_nothing(objective):
    vectors = objective.targets[:6]
    some, all_ = Objective(vectors[:3], np.ones(3)), Objective(vectors, np.array([1, 1, 1, 0, 0, 0]))
    assert len(all_.targets) == 3 and all_.value(vectors) == pytest.approx(some.value(vectors))


@pytest.mark.parametrize(
    ("targets", "weights", "message"),
    [
        (np.zeros((0, 4)), np.zeros(0), "need one weight each"),
        (np.eye(3), np.ones(2), "need one weight each"),
        (np.eye(3), np.array([1, -1, 1]), "not negative"),
        (np.eye(3), np.zeros(3), "not all zero"),
        (np.eye(3), np.array([1, np.nan, 1]), "finite"),
        (np.eye(3) * 2, np.ones(3), "unit vectors"),
    ],
)
def test_a_bad_objective_is_refused(targets, weights, message):
    with pytest.raises(InputError, match=message):
        Objective(targets, weights)
