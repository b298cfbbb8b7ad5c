"""Stage `evaluate`: both models on the test set, and what fine-tuning adds."""

import numpy as np

from transfer import metrics
from transfer.common.dataset import load_classes, load_split
from transfer.common.files import write_csv, write_json
from transfer.common.paths import (
    CALIBRATION,
    DETAILS,
    EVALUATION,
    MOVEMENT,
    PER_CLASS,
    PREDICTIONS,
    PREPARED,
    model_path,
)
from transfer.common.run import run_stage
from transfer.common.settings import MODES, load_params
from transfer.inference import predict, set_up_torch
from transfer.model import freeze, load_network, parameter_count


def main() -> None:
    params = load_params()
    device = set_up_torch(params.train.device, params.train.threads)
    classes = load_classes(PREPARED)
    names = np.array(classes, object)
    images, label_tensor = load_split(PREPARED, "test", classes)
    labels = label_tensor.numpy()

    scores, recalls, correct, bins, backbones = {}, {}, {}, {}, {}
    predictions = {"image": np.arange(len(labels)), "label": names[labels]}
    for mode in MODES:
        network = load_network(params.model, len(classes), model_path(mode), device)
        backbones[mode] = network.backbone
        if mode == "frozen":
            freeze(network.backbone)
        logits = predict(network, images, params.model.image_size)
        probabilities = logits.double().softmax(1).numpy()
        predicted, confidence = probabilities.argmax(1), probabilities.max(1)
        correct[mode] = predicted == labels
        scores[mode] = metrics.scores(probabilities, labels) | {
            "parameters": parameter_count(network),
            "trainable": parameter_count(network, trainable=True),
        }
        # Of each class's images, the share that was predicted as this class.
        recalls[mode] = [float((predicted == c)[labels == c].mean()) for c in range(len(classes))]
        bins[mode] = metrics.calibration(confidence, correct[mode])
        predictions[mode] = names[predicted]
        predictions[f"{mode}_confidence"] = confidence.round(4)

    for mode in MODES:
        write_csv(CALIBRATION / f"{mode}.csv", bins[mode])
    moved = metrics.movement(backbones["frozen"], backbones["finetuned"])
    write_csv(MOVEMENT, moved)
    answer, details = metrics.summary(scores, correct)
    write_json(EVALUATION, answer)
    write_json(DETAILS, details | {"finetuned.moved": moved[-1]["weights"]})
    per_class = zip(classes, *recalls.values(), strict=True)
    write_csv(PER_CLASS, [dict(zip(("class", *MODES), row, strict=True)) for row in per_class])
    rows = zip(*(column.tolist() for column in predictions.values()), strict=True)
    table = [dict(zip(predictions, row, strict=True)) for row in rows]
    write_csv(PREDICTIONS, table)


if __name__ == "__main__":
    run_stage("evaluate", main)
