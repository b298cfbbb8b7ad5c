"""Stage `evaluate`: both models on the test set, and what fine-tuning added."""

from pathlib import Path

import numpy as np

from transfer import data, evaluation, model, params, training
from transfer.command import run_stage
from transfer.files import write_csv, write_json

ARRAYS = Path("data/cifar10")
METRICS = Path("metrics")


def main() -> None:
    settings = params.load()
    device = training.set_up(settings.train.device, settings.train.threads)
    classes = data.load_classes(ARRAYS)
    images, labels = data.load_split(ARRAYS, "test", classes)
    labels = labels.numpy()

    scores, recalls, right = {}, {}, {}
    predictions = {"image": np.arange(len(labels)), "actual": np.array(classes)[labels]}
    for mode in params.MODES:
        path = Path(f"models/{mode}.safetensors")
        network = model.trained(settings.model, len(classes), path, device)
        if mode == "frozen":
            model.freeze(network.backbone)
        logits = training.predict(network, images, settings.model.image_size)
        probabilities = logits.double().softmax(1).numpy()
        predicted, confidence = probabilities.argmax(1), probabilities.max(1)
        right[mode] = predicted == labels
        scores[mode] = evaluation.scores(probabilities, labels) | {
            "parameters": model.parameters(network),
            "trainable": model.parameters(network, trainable=True),
        }
        recalls[mode] = evaluation.per_class(predicted, labels, classes)
        bins = evaluation.calibration(confidence, right[mode])
        write_csv(METRICS / f"calibration/{mode}.csv", bins)
        predictions[mode] = np.array(classes)[predicted]
        predictions[f"{mode}_confidence"] = confidence.round(4)

    write_json(METRICS / "evaluation.json", evaluation.summary(scores, recalls, right))
    write_csv(
        METRICS / "per_class.csv",
        [{"class": name} | {mode: recalls[mode][name] for mode in recalls} for name in classes],
    )
    rows = zip(*(column.tolist() for column in predictions.values()), strict=True)
    write_csv(
        METRICS / "predictions.csv", [dict(zip(predictions, row, strict=True)) for row in rows]
    )


if __name__ == "__main__":
    run_stage("evaluate", main)
