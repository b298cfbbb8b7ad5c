"""Stage `download`: CIFAR-10 or your own images, checked, as uint8 arrays in data/prepared/."""

from pathlib import Path

from transfer.common.dataset import require_all, select_classes, write_dataset
from transfer.common.paths import PREPARED
from transfer.common.run import run_stage
from transfer.common.settings import load_params
from transfer.sources.cifar10 import read_cifar10
from transfer.sources.folders import read_folders


def main() -> None:
    params = load_params()
    settings = params.data
    source = Path(settings.source)
    if source.suffix == ".md5" and not source.is_dir():
        splits, classes = read_cifar10(source)
    else:
        splits, classes = read_folders(
            source, params.model.image_size, settings.test_share, params.seed
        )
    if wanted := settings.classes:
        splits = {name: select_classes(split, classes, wanted) for name, split in splits.items()}
        classes = wanted
    for name, split in splits.items():
        require_all(split.labels, classes, f"data.source = {settings.source}: {name}")
    write_dataset(PREPARED, splits, classes)


if __name__ == "__main__":
    run_stage("download", main)
