"""Stage `evaluate`: both models on the test set, and what fine-tuning adds."""

from pathlib import Path

import numpy as np

from transfer import metrics
from transfer.common.arrays import PREPARED, load_classes, load_split
from transfer.common.files import write_csv, write_json
from transfer.common.params import MODES, load_params
from transfer.common.stage import run_stage
from transfer.inference import choose_device, predict
from transfer.model.backbone import freeze
from transfer.model.network import load_trained, parameter_count

METRICS = Path("metrics")


def main() -> None:
    params = load_params()
    device = choose_device(params.train.device, params.train.threads)
    classes = load_classes(PREPARED)
    names = np.array(classes, object)
    images, label_tensor = load_split(PREPARED, "test", classes)
    labels = label_tensor.numpy()

    scores, recalls, correct = {}, {}, {}
    predictions = {"image": np.arange(len(labels)), "label": names[labels]}
    for mode in MODES:
        path = Path(f"models/{mode}.safetensors")
        network = load_trained(params.model, len(classes), path, device)
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
        recalls[mode] = metrics.recall(predicted, labels, classes)
        bins = metrics.calibration(confidence, correct[mode])
        write_csv(METRICS / f"calibration/{mode}.csv", bins)
        predictions[mode] = names[predicted]
        predictions[f"{mode}_confidence"] = confidence.round(4)

    write_json(METRICS / "evaluation.json", metrics.summary(scores, recalls, correct))
    per_class = [{"class": name} | {m: recalls[m][name] for m in MODES} for name in classes]
    write_csv(METRICS / "per_class.csv", per_class)
    rows = zip(*(column.tolist() for column in predictions.values()), strict=True)
    table = [dict(zip(predictions, row, strict=True)) for row in rows]
    write_csv(METRICS / "predictions.csv", table)


if __name__ == "__main__":
    run_stage("evaluate", main)
