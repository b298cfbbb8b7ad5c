"""From predictions to metrics, and the paired comparison of the two modes."""

import math

import numpy as np
from scipy.stats import binom, binomtest, norm

BINS = 15  # of confidence, as in Guo et al. 2017


def scores(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, loss and expected calibration error of one model.

    `probabilities` is float64 (N, classes) with rows that sum to 1, `labels` int (N,). The loss
    is the mean cross-entropy in nats.
    """
    correct = probabilities.argmax(1) == labels
    likelihood = probabilities[np.arange(len(labels)), labels]
    bins = calibration(probabilities.max(1), correct)
    return {
        "accuracy": float(correct.mean()),
        "loss": float(-np.log(likelihood.clip(np.finfo(float).tiny)).mean()),
        "ece": sum(b["count"] * abs(b["accuracy"] - b["confidence"]) for b in bins) / len(labels),
    }


def recall(predicted: np.ndarray, labels: np.ndarray, classes: list[str]) -> dict[str, float]:
    """The recall of each class: the share of its images that were predicted as this class."""
    return {name: float((predicted == c)[labels == c].mean()) for c, name in enumerate(classes)}


def calibration(confidence: np.ndarray, correct: np.ndarray) -> list[dict[str, float]]:
    """Mean confidence, accuracy and count in each non-empty of 15 equal bins of confidence.

    The expected calibration error is the count-weighted mean of |accuracy - confidence| (Guo et
    al., "On Calibration of Modern Neural Networks", 2017, equation 3).
    """
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    return [
        {
            "confidence": float(confidence[bins == b].mean()),
            "accuracy": float(correct[bins == b].mean()),
            "count": int((bins == b).sum()),
        }
        for b in np.unique(bins)
    ]


def compare(frozen_correct: np.ndarray, finetuned_correct: np.ndarray) -> dict[str, float]:
    """How much `finetuned` gains over `frozen` on the same images; both bool (N,).

    The 95 % interval is Bonett and Price's for paired proportions (adjusted Wald), which also holds
    for few images; mcnemar_p is McNemar's mid-P test, two-sided. Fagerland, Lydersen and Laake,
    "Recommended tests and confidence intervals for paired binomial proportions", 2014, recommend
    both: Wald's own interval is too narrow for few images, the exact test too cautious.
    """
    n = len(frozen_correct)
    won = int((finetuned_correct & ~frozen_correct).sum())
    lost = int((frozen_correct & ~finetuned_correct).sum())
    up, down = (won + 1) / (n + 2), (lost + 1) / (n + 2)
    half = float(norm.ppf(0.975)) * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    p = 1.0
    if different := won + lost:
        exact, point = binomtest(won, different).pvalue, binom.pmf(won, different, 0.5)
        p = float(exact - (point / 2 if won == lost else point))
    return {
        "gain": (won - lost) / n,
        "gain_low": max(-1.0, up - down - half),
        "gain_high": min(1.0, up - down + half),
        "mcnemar_p": p,
    }


def summary(
    scores: dict[str, dict[str, float]], correct: dict[str, np.ndarray]
) -> tuple[dict[str, float], dict[str, float]]:
    """What answers the question, and the details: `MODE.NAME` and the comparison in both."""
    names = list(scores["frozen"])
    details = {f"{mode}.{name}": scores[mode][name] for name in names for mode in scores}
    answer = {f"{mode}.accuracy": details.pop(f"{mode}.accuracy") for mode in scores}
    comparison = compare(correct["frozen"], correct["finetuned"])
    details["mcnemar_p"] = comparison.pop("mcnemar_p")
    return answer | comparison, details
