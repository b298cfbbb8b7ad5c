"""Stage `download`: CIFAR-10 or one's own images, checked, as uint8 arrays in data/prepared/."""

from transfer.common.arrays import PREPARED, require_all, write_arrays
from transfer.common.params import load_params
from transfer.common.stage import run_stage
from transfer.sources.read import read_source, select_classes


def main() -> None:
    params = load_params()
    settings = params.data
    splits, classes = read_source(
        settings.source, params.model.image_size, settings.test_share, params.seed
    )
    if wanted := settings.classes:
        splits = {name: select_classes(split, classes, wanted) for name, split in splits.items()}
        classes = wanted
    for name, split in splits.items():
        require_all(split.labels, classes, f"data.source = {settings.source}: {name}")
    write_arrays(PREPARED, splits, classes)


if __name__ == "__main__":
    run_stage("download", main)
