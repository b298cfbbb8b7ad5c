"""The notebook way, as tutorials write it: `python -m benchmarks.notebook MODE IMAGES`.

One epoch over IMAGES training images. Prints JSON: the images per second, the seconds that the
epoch took and, if it was all of them, the accuracy on the test set.
"""

import json
import os
import sys
import time

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import CIFAR10
from torchvision.transforms import Compose, Normalize, Resize, ToTensor

from benchmarks.ours import pretrained
from transfer import model, params

WARM_UP = 5  # batches before the clock for the images per second starts
PICTURE = Compose(
    [Resize(224), ToTensor(), Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
)


def loader(train: bool, images: int | None = None) -> DataLoader:
    root = os.environ.get("ASSETS_DIR", "data")
    dataset = CIFAR10(root, train, PICTURE, download="ASSETS_DIR" not in os.environ)
    subset = Subset(dataset, range(images or len(dataset)))
    return DataLoader(subset, batch_size=64, shuffle=train, num_workers=2)


def main(mode: str, images: int) -> dict[str, float]:
    settings = params.load()
    torch.set_num_threads(settings.train.threads)
    torch.manual_seed(settings.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    linear = settings.model.model_copy(update={"head": "linear"})  # after global pooling
    network = pretrained(linear).to(device)
    network.train()
    if mode == "frozen":
        model.freeze(network.backbone)
    optimizer = torch.optim.Adam((p for p in network.parameters() if p.requires_grad), lr=1e-3)
    start = time.perf_counter()
    for batch, (x, labels) in enumerate(loader(True, images)):
        if batch == WARM_UP:
            warm = time.perf_counter()
        loss = nn.functional.cross_entropy(network(x.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    end = time.perf_counter()
    result = {"images_per_s": (images - WARM_UP * 64) / (end - warm), "seconds": end - start}
    if images == 50_000:
        network.eval()
        with torch.inference_mode():
            right = sum(
                (network(x.to(device)).argmax(1).cpu() == labels).sum().item()
                for x, labels in loader(False)
            )
        result["accuracy"] = right / 10_000
    return result


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]))))
