"""What stage evaluate computes, by hand and as scikit-learn computes it."""

import json
import math

import numpy as np
import pytest
from sklearn.metrics import log_loss
from torch import nn

from stages.evaluate import calibration, compare, movement
from transfer.data import load_json, load_split
from transfer.model import load, predict
from transfer.run import METRICS, model_path, read_csv
from transfer.settings import MODES


def test_confidence_is_compared_with_accuracy_in_fifteenths():
    confidence = np.array([0.9, 0.89, 0.6, 1.0, 0.96, 0.05])
    correct = np.array([True, False, False, True, True, True])
    found = [(*row.values(),) for row in calibration(confidence, correct)]
    wanted = [(0.05, 1, 1), (0.6, 0, 1), (0.895, 0.5, 2), (0.98, 1, 2)]
    assert np.array(found) == pytest.approx(np.array(wanted))


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
    got = compare(frozen, finetuned)
    assert got["gain"] == (won - lost) / n
    assert got["mcnemar_p"] == pytest.approx(p)
    # Bonett and Price: Wald's interval with one more image won, and one more lost.
    middle, variance = (won - lost) / (n + 2), (won + lost + 2 - (won - lost) ** 2 / (n + 2))
    half = 1.959964 * math.sqrt(variance) / (n + 2)
    interval = (got["gain_low"], got["gain_high"])
    assert interval == pytest.approx((max(-1, middle - half), min(1, middle + half)))


def test_movement_is_the_length_of_the_change_of_the_weights_alone():
    parts = []
    for first, last, others in ((3, 4, 5), (3, 7, 9)):
        layers = nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.ReLU(), nn.Conv2d(1, 1, 1)
        for layer, weight in ((layers[0], first), (layers[1], others), (layers[3], last)):
            nn.init.constant_(layer.weight, weight)
            nn.init.constant_(layer.bias, others)
        parts.append(nn.ModuleDict({"features": nn.Sequential(*layers)}))
    found = {row["block"]: row["moved"] for row in movement(*parts)}
    assert found == pytest.approx({"features.0": 0, "features.3": 3 / 4, "backbone": 3 / 5})


@pytest.mark.parametrize("mode", MODES)
def test_the_results_are_those_of_the_model_on_the_test_images(reproduced, mode, monkeypatch):
    monkeypatch.chdir(reproduced)
    (images, labels, _), classes = load_split("test"), load_json("classes")
    logits = predict(load(model_path(mode)), images).double()
    details = json.loads((METRICS / "details.json").read_text(encoding="utf-8"))
    assert details[f"{mode}.loss"] == pytest.approx(log_loss(labels, logits.softmax(1)), abs=1e-4)
    rows = read_csv(METRICS / f"calibration/{mode}.csv")
    bins = [{key: float(value) for key, value in row.items()} for row in rows]
    gaps = sum(row["count"] * abs(row["accuracy"] - row["confidence"]) for row in bins)
    assert details[f"{mode}.ece"] == pytest.approx(gaps / len(labels))
    table = read_csv(METRICS / "predictions.csv")
    assert [row["label"] for row in table] == [classes[label] for label in labels]
    assert [row[mode] for row in table] == [classes[label] for label in logits.argmax(1)]
