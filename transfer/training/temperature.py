"""Calibration: one temperature, fitted on validation images."""

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn import functional as F

from transfer.common.dataset import Split
from transfer.inference import predict
from transfer.model import Network

LOG_BOUNDS = (-3, 3)  # of the logarithm of the temperature: 0.05 to 20


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature by which logits (N, classes) must be divided for the least cross-entropy, as
    far as it lies within LOG_BOUNDS.

    Guo et al., "On Calibration of Modern Neural Networks", 2017, section 4.2.
    """
    exact = logits.double()

    def loss(log_temperature: float) -> float:
        return F.cross_entropy(exact / np.exp(log_temperature), labels).item()

    return float(np.exp(minimize_scalar(loss, bounds=LOG_BOUNDS, method="bounded").x))


@torch.no_grad()
def calibrate(network: Network, validation: Split, image_size: int) -> float:
    """Fit the temperature of `network`, which must be 1, on `validation`, and return it.

    The predictions stay the same, their confidence changes. Prints a line where the images do not
    determine the temperature: it is at a bound, or all images are classified correctly, so that the
    cross-entropy falls as long as the temperature does.
    """
    logits = predict(network, validation.images, image_size)
    temperature = fit_temperature(logits, validation.labels)
    all_correct = torch.equal(logits.argmax(1), validation.labels)
    if all_correct or abs(np.log(temperature)) > max(LOG_BOUNDS) - 0.01:
        print(
            f"temperature {temperature:.3g}: {len(logits)} validation images do not determine how "
            "confident the model should be",
            flush=True,
        )
    network.temperature.fill_(temperature)
    return temperature
