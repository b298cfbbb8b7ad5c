import math

import numpy as np
import pytest

from transfer import metrics


def test_scores_by_hand():
    probabilities = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.55, 0.45]])
    scores = metrics.scores(probabilities, np.array([0, 1, 1, 0]))
    assert scores["accuracy"] == 0.75
    assert scores["loss"] == pytest.approx(-np.log([0.9, 0.4, 0.8, 0.55]).mean())
    # Fifteenths: 0.9 in bin 13, 0.6 in 9 (wrong), 0.8 in 12, 0.55 in 8.
    assert scores["ece"] == pytest.approx((0.1 + 0.6 + 0.2 + 0.45) / 4)


def test_perfect_confidence_is_perfectly_calibrated():
    scores = metrics.scores(np.eye(3), np.arange(3))
    assert (scores["accuracy"], scores["loss"], scores["ece"]) == (1, 0, 0)


def test_recall_by_hand():
    got = metrics.recall(np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1]), ["a", "b"])
    assert got == {"a": 1.0, "b": pytest.approx(2 / 3)}


def test_the_comparison_by_hand():
    frozen = np.array([True] * 60 + [False] * 10 + [True] * 2 + [False] * 28)
    finetuned = np.array([True] * 60 + [True] * 10 + [False] * 2 + [False] * 28)
    got = metrics.compare(frozen, finetuned)
    half = 1.959964 * math.sqrt(12 - 64 / 100) / 100
    assert got["gain"] == pytest.approx(0.08)
    assert got["gain_ci_low"] == pytest.approx(0.08 - half)
    assert got["gain_ci_high"] == pytest.approx(0.08 + half)
    # Two-sided sign test: 2 * P(at most 2 of 12 tosses).
    assert got["mcnemar_p"] == pytest.approx(2 * (1 + 12 + 66) / 2**12)


def test_equal_models_do_not_differ():
    correct = np.array([True, False])
    assert metrics.compare(correct, correct) == {
        "gain": 0, "gain_ci_low": 0, "gain_ci_high": 0, "mcnemar_p": 1,
    }  # fmt: skip


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    draw = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        u = draw.random(1000)
        frozen, finetuned = u < 0.85, (u < 0.80) | (u > 0.92)  # true gain: 0.03
        got = metrics.compare(frozen, finetuned)
        covered += got["gain_ci_low"] <= 0.03 <= got["gain_ci_high"]
    assert 0.92 <= covered / 400 <= 0.98


def test_a_class_may_have_the_name_of_a_metric():
    """Classes named accuracy, gain, frozen.accuracy: each metric keeps its value."""
    classes = ["accuracy", "gain", "frozen.accuracy"]
    labels = np.array([0, 1, 2, 2])
    probabilities = np.eye(3)[[0, 1, 0, 0]]
    predicted = probabilities.argmax(1)
    scores = dict.fromkeys(("frozen", "finetuned"), metrics.scores(probabilities, labels))
    recalls = dict.fromkeys(scores, metrics.recall(predicted, labels, classes))
    correct = dict.fromkeys(scores, predicted == labels)
    got = metrics.summary(scores, recalls, correct)
    assert got["frozen.accuracy"] == 0.5
    assert got["gain"] == 0
    assert got["recall"]["frozen"] == {"accuracy": 1.0, "gain": 1.0, "frozen.accuracy": 0.0}
