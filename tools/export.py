"""Export a trained model as one ONNX file that needs nothing of this project.

Its input "images" is uint8 (N, S, S, 3), RGB, with any N; its output "probabilities" is float32
(N, classes). Scaling, normalisation and temperature are inside. The file's metadata hold the names
of the classes, "classes" (JSON), and S, "pixels".
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transfer.model import Network, load, predict
from transfer.run import model_path, run_tool
from transfer.settings import MODES, InputError

TOLERANCE = 1e-4  # of a probability


class Exported(nn.Module):
    """uint8 (N, S, S, 3) -> probabilities, with the arithmetic of transfer.data.to_input."""

    matrix: Tensor

    def __init__(self, network: Network, pixels: int):
        super().__init__()
        self.network, self.size = network.eval(), network.settings.image_size
        # torch scales uint8 images along one axis and then the other, with weights of 16 bits, and
        # rounds after each. A matrix (size, S) of these whole numbers computes the same exactly.
        identity = torch.eye(pixels, dtype=torch.float64)[None, None]
        exact = F.interpolate(identity, (self.size, pixels), mode="bilinear", antialias=True)[0, 0]
        bits = next(n for n in range(22) if 0.5 + exact.max() * 2 ** (n + 1) >= 2**15)
        self.unit = 2.0**bits
        self.register_buffer("matrix", (exact * self.unit + 0.5).floor().float())

    def forward(self, images: Tensor) -> Tensor:
        x = images.permute(0, 3, 1, 2).float()
        x = self.rounded(x @ self.matrix.T)
        x = self.rounded(self.matrix @ x)
        mean, std = (255 * v.view(1, 3, 1, 1) for v in (self.network.mean, self.network.std))
        return self.network((x - mean) / std).softmax(1)

    def rounded(self, x: Tensor) -> Tensor:
        return (x / self.unit + 0.5).floor().clamp(0, 255)


def export(network: Network, images: Tensor, path: Path) -> float:
    """Write `path`; the largest difference between its probabilities and `predict`'s on `images`,
    uint8 (n, S, S, 3).
    """
    program = torch.onnx.export(
        Exported(network, images.shape[1]).eval(), (images[:2],), dynamo=True, verbose=False,
        input_names=["images"], output_names=["probabilities"],
        dynamic_shapes={"images": {0: torch.export.Dim("N")}},
    )  # fmt: skip
    assert program
    model = program.model_proto
    facts = {"classes": json.dumps(network.classes), "pixels": str(images.shape[1])}
    onnx.helper.set_model_props(model, facts)
    onnx.save(model, path)
    session = onnxruntime.InferenceSession(path)
    [got] = session.run(None, {"images": images.numpy()})
    return float(np.abs(got - predict(network, images).softmax(1).numpy()).max())


def main() -> None:
    parser = argparse.ArgumentParser("python -m tools.export", description=__doc__)
    parser.add_argument("mode", choices=MODES, help="which model")
    mode = parser.parse_args().mode
    path = Path(f"{mode}.onnx")
    network = load(model_path(mode))
    shape = (100, network.pixels, network.pixels, 3)
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    difference = export(network, images, path)
    if difference > TOLERANCE:
        raise InputError(f"{path}: its probabilities differ from the model's by {difference:.2g}")
    print(f"{path}: its probabilities differ from the model's by at most {difference:.1e}")


if __name__ == "__main__":
    run_tool(main)
