"""Stage `download`: CIFAR-10, checked, as uint8 arrays in data/cifar10/."""

from pathlib import Path

from transfer import data, params
from transfer.command import run_stage


def main() -> None:
    settings = params.load().data
    splits, classes = data.read_cifar10(settings.source)
    if settings.classes:
        splits = {
            name: data.select_classes(split, classes, settings.classes)
            for name, split in splits.items()
        }
        classes = settings.classes
    data.write_arrays(Path("data/cifar10"), splits, classes)


if __name__ == "__main__":
    run_stage("download", main)
