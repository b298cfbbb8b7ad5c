"""Where things are: the results that dvc.yaml names, relative to the project, and the project."""

from pathlib import Path

PREPARED = Path("data/prepared")

METRICS = Path("metrics")
ARCHITECTURE = METRICS / "architecture.txt"
CALIBRATION = METRICS / "calibration"
COST = METRICS / "cost.json"
DETAILS = METRICS / "details.json"
EVALUATION = METRICS / "evaluation.json"
MOVEMENT = METRICS / "movement.csv"
PER_CLASS = METRICS / "per_class.csv"
PREDICTIONS = METRICS / "predictions.csv"
FIGURES = Path("figures")


def model_path(name: str) -> Path:
    """The network `new`, with a new head on the pretrained backbone, or that of a mode."""
    return Path("models", f"{name}.safetensors")


def curves_path(mode: str) -> Path:
    """The learning curves of `mode`: a line for each epoch."""
    return METRICS / "curves" / f"{mode}.csv"


def training_path(mode: str) -> Path:
    """What training in `mode` used and found: numbers of images, and the temperature."""
    return METRICS / "training" / f"{mode}.json"


def project_root() -> Path:
    """The folder of the project.

    DVC runs experiments with --temp or --queue in copies at ROOT/.dvc/tmp/exps/; also there, this
    is ROOT.
    """
    here = Path.cwd()
    copies = (above for above in here.parents if above.parts[-3:] == (".dvc", "tmp", "exps"))
    copy = next(copies, None)
    return copy.parents[2] if copy else here
