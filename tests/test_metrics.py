import math

import numpy as np
import pytest
import torch
from torch import nn

from transfer import metrics


def test_scores_by_hand():
    probabilities = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.55, 0.45]])
    scores = metrics.scores(probabilities, np.array([0, 1, 1, 0]))
    assert scores["accuracy"] == 0.75
    assert scores["loss"] == pytest.approx(-np.log([0.9, 0.4, 0.8, 0.55]).mean())
    # Fifteenths: 0.9 in bin 13, 0.6 in 9 (wrong), 0.8 in 12, 0.55 in 8.
    assert scores["ece"] == pytest.approx((0.1 + 0.6 + 0.2 + 0.45) / 4)
    perfect = metrics.scores(np.eye(3), np.arange(3))
    assert perfect == {"accuracy": 1, "loss": 0, "ece": 0}


# Pairs of images on which one model alone is right, and McNemar's mid-P: twice the probability of a
# result at least as uneven in tosses of a coin, the result itself counted half.
@pytest.mark.parametrize(
    ("won", "lost", "both", "p"),
    [
        (10, 2, 88, (2 * (1 + 12) + 66) / 2**12),
        (2, 10, 88, (2 * (1 + 12) + 66) / 2**12),
        (3, 0, 0, 1 / 2**3),
        (2, 2, 6, 1 - 6 / 2**4 / 2),
        (0, 0, 9, 1),
    ],
)
def test_the_comparison_by_hand(won, lost, both, p):
    n = won + lost + both
    frozen = np.array([False] * won + [True] * (lost + both))
    finetuned = np.array([True] * won + [False] * lost + [True] * both)
    got = metrics.compare(frozen, finetuned)
    assert got["gain"] == (won - lost) / n
    assert got["mcnemar_p"] == pytest.approx(p)
    # Bonett and Price: Wald's interval with one more image won, and one more lost.
    middle, variance = (won - lost) / (n + 2), (won + lost + 2 - (won - lost) ** 2 / (n + 2))
    half = 1.959964 * math.sqrt(variance) / (n + 2)
    interval = (got["gain_low"], got["gain_high"])
    assert interval == pytest.approx((max(-1, middle - half), min(1, middle + half)))


@pytest.mark.parametrize("images", [30, 1000])
def test_the_interval_covers_the_truth_about_as_often_as_it_says(images):
    draw, covered = np.random.default_rng(0), 0
    for _ in range(400):
        u = draw.random(images)
        got = metrics.compare(u < 0.85, (u < 0.80) | (u > 0.92))  # true gain: 0.03
        covered += got["gain_low"] <= 0.03 <= got["gain_high"]
    assert 0.92 <= covered / 400 <= 0.99


def test_movement_by_hand():
    def backbone() -> nn.Sequential:
        layers = nn.Conv2d(1, 1, 2), nn.BatchNorm2d(1), nn.ReLU()
        return nn.Sequential(*layers)

    before, after = backbone(), backbone()
    with torch.no_grad():
        for module, values in ((before, (2, 3, 5, 12)), (after, (4, 9, 8, 16))):
            parameters = (module[0].weight, module[0].bias, module[1].weight, module[1].bias)
            for parameter, value in zip(parameters, values, strict=True):
                parameter.fill_(value)
    norm = 5 / 13  # 3 and 4 of 5 and 12
    expected = [("0", 1, None), ("1", None, norm), ("2", None, None), ("backbone", 1, norm)]
    found = [(*row.values(),) for row in metrics.movement(before, after)]
    assert [*map(str, found)] == [*map(str, ((n, w and float(w), s) for n, w, s in expected))]
