"""From predictions to metrics, and the paired comparison of the two modes."""

import math

import numpy as np
from scipy.stats import binomtest, norm

BINS = 15  # of confidence, as in Guo et al. 2017


def scores(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, loss and expected calibration error of one model.

    `probabilities` is float64 (N, classes) with rows that sum to 1, `labels` int (N,). The loss
    is the mean cross-entropy in nats.
    """
    right = probabilities.argmax(1) == labels
    likelihood = probabilities[np.arange(len(labels)), labels]
    bins = calibration(probabilities.max(1), right)
    return {
        "accuracy": float(right.mean()),
        "loss": float(-np.log(likelihood.clip(np.finfo(float).tiny)).mean()),
        "ece": sum(b["count"] * abs(b["accuracy"] - b["confidence"]) for b in bins) / len(labels),
    }


def per_class(predicted: np.ndarray, labels: np.ndarray, classes: list[str]) -> dict[str, float]:
    """The share of each class's pictures that were recognised (its recall)."""
    return {name: float((predicted == c)[labels == c].mean()) for c, name in enumerate(classes)}


def calibration(confidence: np.ndarray, right: np.ndarray) -> list[dict[str, float]]:
    """Mean confidence, accuracy and count in each non-empty of 15 equal bins of confidence.

    The expected calibration error is the count-weighted mean of |accuracy - confidence| (Guo et
    al., "On Calibration of Modern Neural Networks", 2017, equation 3).
    """
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    return [
        {
            "confidence": float(confidence[bins == b].mean()),
            "accuracy": float(right[bins == b].mean()),
            "count": int((bins == b).sum()),
        }
        for b in np.unique(bins)
    ]


def compare(frozen_right: np.ndarray, finetuned_right: np.ndarray) -> dict[str, float]:
    """How much `finetuned` gains over `frozen` on the same pictures; both bool (N,).

    The 95 % interval is Wald's for paired proportions; mcnemar_p is McNemar's exact test, two
    sided (both in Fagerland, Lydersen and Laake, "Recommended tests and confidence intervals for
    paired binomial proportions", 2014).
    """
    n = len(frozen_right)
    won = int((finetuned_right & ~frozen_right).sum())
    lost = int((frozen_right & ~finetuned_right).sum())
    gain = (won - lost) / n
    half = float(norm.ppf(0.975)) * math.sqrt(won + lost - (won - lost) ** 2 / n) / n
    return {
        "gain": gain,
        "gain_ci_low": gain - half,
        "gain_ci_high": gain + half,
        "mcnemar_p": float(binomtest(won, won + lost).pvalue) if won + lost else 1.0,
    }


def summary(
    scores: dict[str, dict[str, float]],
    recalls: dict[str, dict[str, float]],
    right: dict[str, np.ndarray],
) -> dict[str, float]:
    """One flat table of `MODE.NAME` and the comparison; what answers the question comes first."""
    names = list(scores["frozen"])
    ordered = {f"{mode}.{name}": scores[mode][name] for name in names for mode in scores}
    accuracies = {f"{mode}.accuracy": ordered.pop(f"{mode}.accuracy") for mode in scores}
    per_class = {f"{mode}.{name}": r for mode in recalls for name, r in recalls[mode].items()}
    return accuracies | compare(right["frozen"], right["finetuned"]) | ordered | per_class
