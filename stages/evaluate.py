"""Stage `evaluate`: both models on the test set, and what fine-tuning adds."""

import math
from typing import Any

import numpy as np
import torch
from scipy.stats import binom, binomtest, norm
from sklearn.metrics import precision_recall_fscore_support
from torch import nn

from transfer.data import load_json, load_split
from transfer.model import block_names, freeze, load, parameter_count, predict
from transfer.run import METRICS, model_path, run_stage, set_up_torch, write_csv, write_json
from transfer.settings import MODES, InputError, load_params

BINS = 15  # of confidence, as in Guo et al. 2017


def main() -> None:
    params, classes = load_params(), load_json("classes")
    device = set_up_torch(params.train.device, params.train.threads)
    test = load_split("test")
    labels = test.labels.numpy()

    answer, correct, backbones = {}, {}, []
    details: dict[str, float] = {}
    names = zip(load_json("test_names"), labels, strict=True)
    predictions = [{"image": name, "label": classes[label]} for name, label in names]
    counts = np.bincount(labels, minlength=len(classes)).tolist()
    per_class = [{"class": c, "images": n} for c, n in zip(classes, counts, strict=True)]
    for mode in MODES:
        network = load(model_path(mode), device)
        if network.classes != classes:
            raise InputError(f"{model_path(mode)}: has other classes than the data; run dvc repro")
        backbones.append(network.backbone.body)
        if mode == "frozen":
            freeze(network.backbone)
        probabilities = predict(network, test.images).double().softmax(1).numpy()
        predicted, confidence = probabilities.argmax(1), probabilities.max(1)
        correct[mode] = predicted == labels
        likelihood = probabilities[range(len(labels)), labels].clip(np.finfo(float).tiny)
        bins = calibration(confidence, correct[mode])
        gaps = [row["count"] * abs(row["accuracy"] - row["confidence"]) for row in bins]
        precision, recall, f1, _ = precision_recall_fscore_support(
            labels, predicted, labels=range(len(classes)), zero_division=0
        )
        answer[f"{mode}.accuracy"] = float(correct[mode].mean())
        details |= {
            f"{mode}.balanced_accuracy": float(recall.mean()),
            f"{mode}.macro_f1": float(f1.mean()),
            f"{mode}.loss": float(-np.log(likelihood).mean()),
            f"{mode}.ece": sum(gaps) / len(labels),  # Guo et al. 2017, equation 3
            f"{mode}.temperature": network.temperature.item(),
            f"{mode}.parameters": parameter_count(network),
            f"{mode}.trainable": parameter_count(network, trainable=True),
        }
        write_csv(METRICS / "calibration" / f"{mode}.csv", bins)
        for row, label, share in zip(predictions, predicted, confidence, strict=True):
            row |= {mode: classes[label], f"{mode}_confidence": round(float(share), 8)}
        for row, *scores in zip(per_class, precision, recall, f1, strict=True):
            row |= zip(
                (f"{mode}_{name}" for name in ("precision", "recall", "f1")), scores, strict=True
            )

    for label, row in enumerate(per_class):  # the change of this class alone
        row |= compare(*(correct[mode][labels == label] for mode in MODES))

    moved = movement(*backbones)
    answer |= compare(correct["frozen"], correct["finetuned"])
    details |= {"mcnemar_p": answer.pop("mcnemar_p"), "finetuned.moved": moved[-1]["moved"]}
    write_json(METRICS / "evaluation.json", answer)
    write_json(METRICS / "details.json", details)
    write_csv(METRICS / "movement.csv", moved)
    write_csv(METRICS / "per_class.csv", per_class)
    write_csv(METRICS / "predictions.csv", predictions)
    # Adding 0 turns -0 into 0.
    values = (f"{round(100 * value, 2) + 0:.2f}" for value in answer.values())
    frozen, finetuned, gain, low, high = values
    print(
        f"Accuracy on the test set: frozen {frozen} %, finetuned {finetuned} %: fine-tuning adds "
        f"{gain} percentage points (95 % interval {low} to {high})",
        flush=True,
    )
    if max(counts) > 1.1 * min(counts):  # the classes are not balanced
        largest = 100 * max(counts) / len(labels)
        balanced = [f"{mode} {100 * details[f'{mode}.balanced_accuracy']:.2f} %" for mode in MODES]
        print(f"Balanced accuracy: {', '.join(balanced)}. Always predicting the largest class "
              f"would reach an accuracy of {largest:.2f} %.", flush=True)  # fmt: skip


def calibration(confidence: np.ndarray, correct: np.ndarray) -> list[dict[str, float]]:
    """Mean confidence, accuracy and count in each non-empty of BINS equally wide bins of
    `confidence`, float (N,); `correct` is bool (N,).
    """
    rows, bins = [], np.minimum((confidence * BINS).astype(int), BINS - 1)
    for b in np.unique(bins):
        inside, right = confidence[bins == b], correct[bins == b]
        rows.append({"confidence": inside.mean(), "accuracy": right.mean(), "count": len(right)})
    return rows


def compare(frozen_correct: np.ndarray, finetuned_correct: np.ndarray) -> dict[str, float]:
    """How much `finetuned` gains over `frozen` on the same images; both bool (N,).

    The 95 % interval is that of Bonett and Price for paired proportions (adjusted Wald). mcnemar_p
    is the two-sided p-value of McNemar's mid-P test. Fagerland, Lydersen and Laake, "Recommended
    tests and confidence intervals for paired binomial proportions", 2014, recommend both: Wald's
    own interval is too narrow for few images, and the exact test is too conservative.
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


def movement(before: nn.Module, after: nn.Module) -> list[dict[str, Any]]:
    """How far training moved the weights of each block of a backbone, and, last, of all of it.

    The Euclidean norm of the difference, divided by the norm before. Biases and the parameters of
    normalisation layers do not count.
    """
    old, new = (dict(backbone.named_parameters()) for backbone in (before, after))
    rows = []
    for block in (*block_names(before), "backbone"):
        prefix = "" if block == "backbone" else f"{block}."
        keys = [key for key in old if key.startswith(prefix) and old[key].ndim > 1]
        if keys:
            x, y = (torch.cat([side[key].detach().cpu().flatten() for key in keys])
                    for side in (old, new))  # fmt: skip
            rows.append({"block": block, "moved": float((y - x).norm() / x.norm())})
    return rows


if __name__ == "__main__":
    run_stage("evaluate", main)
