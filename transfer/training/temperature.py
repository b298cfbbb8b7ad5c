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
    """Fit the temperature on `validation`, and divide the last layer's weights and biases by it.

    The predictions stay the same, their confidence changes. Returns the temperature. Says so where
    the bounds decide, as when all validation images are classified correctly.
    """
    logits = predict(network, validation.images, image_size)
    temperature = fit_temperature(logits, validation.labels)
    if abs(np.log(temperature)) > max(LOG_BOUNDS) - 0.01:
        print(
            f"the temperature, {temperature:.3g}, is at its bound: {len(logits)} validation images "
            "do not say how confident the model should be",
            flush=True,
        )
    for parameter in network.head[-1].parameters():
        parameter.div_(temperature)
    return temperature
