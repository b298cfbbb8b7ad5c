"""Stage `download`: CIFAR-10 or one's own pictures, checked, as uint8 arrays in data/cifar10/."""

from pathlib import Path

from transfer import data, params
from transfer.command import run_stage


def main() -> None:
    settings = params.load()
    splits, classes = data.read_source(settings.data.source, settings.model.image_size)
    if wanted := settings.data.classes:
        splits = {
            name: data.select_classes(split, classes, wanted) for name, split in splits.items()
        }
        classes = wanted
    for name, split in splits.items():
        data.require_all(split, classes, f"data.source = {settings.data.source}: {name}")
    data.write_arrays(Path("data/cifar10"), splits, classes)


if __name__ == "__main__":
    run_stage("download", main)
