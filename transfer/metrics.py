"""From predictions to metrics; the paired comparison of the modes; how far weights moved."""

import math

import numpy as np
import torch
from scipy.stats import binom, binomtest, norm
from torch import nn

from transfer.model import feature_blocks

Pair = tuple[nn.Parameter, nn.Parameter]  # before and after training
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


def calibration(confidence: np.ndarray, correct: np.ndarray) -> list[dict[str, float]]:
    """Mean confidence, accuracy and count in each non-empty of 15 equally wide bins of confidence.

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
    """What answers the question (accuracies, gain), and all other metrics, by MODE.NAME or name."""
    names = list(scores["frozen"])
    details = {f"{mode}.{name}": scores[mode][name] for name in names for mode in scores}
    answer = {f"{mode}.accuracy": details.pop(f"{mode}.accuracy") for mode in scores}
    comparison = compare(correct["frozen"], correct["finetuned"])
    details["mcnemar_p"] = comparison.pop("mcnemar_p")
    return answer | comparison, details


def movement(before: nn.Module, after: nn.Module) -> list[dict[str, str | float | None]]:
    """How far training moved the parameters of each block of a backbone, from `before` to `after`.

    A row for each block and, last, one for the whole backbone: the Euclidean norm of the difference
    divided by the norm before. `weights` are those of convolutions and linear layers,
    `scale_and_shift` the parameters of normalisation layers; None where there are none.
    """
    rows: list[dict[str, str | float | None]] = []
    old_blocks = feature_blocks(before) | {"backbone": before}
    new_blocks = feature_blocks(after) | {"backbone": after}
    for name, old in old_blocks.items():
        pairs = zip(layers(old), layers(new_blocks[name]), strict=True)
        groups: dict[str, list[Pair]] = {"weights": [], "scale_and_shift": []}
        for old_layer, new_layer in pairs:
            if old_layer["weight"].dim() > 1:  # its bias is none of a normalisation layer
                groups["weights"].append((old_layer["weight"], new_layer["weight"]))
            else:
                groups["scale_and_shift"] += [(old_layer[key], new_layer[key]) for key in old_layer]
        rows.append({"block": name} | {kind: distance(group) for kind, group in groups.items()})
    return rows


def layers(module: nn.Module) -> list[dict[str, nn.Parameter]]:
    """The parameters `weight` and `bias`, where it has them, of each layer with a weight."""
    found = [dict(layer.named_parameters(recurse=False)) for layer in module.modules()]
    return [parameters for parameters in found if "weight" in parameters]


def distance(pairs: list[Pair]) -> float | None:
    """The norm of all differences, relative to the norm of the first ones; None if that is 0."""
    if not any(old.any() for old, _ in pairs):
        return None
    old, new = (
        torch.cat([parameter.detach().cpu().double().flatten() for parameter in side])
        for side in zip(*pairs, strict=True)
    )
    return float((new - old).norm() / old.norm())
