"""params.yaml, checked. `params` always means all settings, `settings` one section of them."""

import argparse
import sys
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML, YAMLError

MODES = ("frozen", "finetuned")

Epochs = Annotated[int, Field(ge=1, le=1000)]
LearningRate = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]


class InputError(Exception):
    """What the user gave is wrong. The message is one line: where, what is wrong, what to do."""


class Section(BaseModel):
    """A mapping in params.yaml: no unknown or missing key, strict types, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class DataSettings(Section):
    source: Text
    classes: list[str] | None
    test_share: Share

    @model_validator(mode="after")
    def two_or_more_classes(self) -> Self:
        if self.classes is not None and len(set(self.classes)) != max(len(self.classes), 2):
            raise ValueError("take null, or two or more different names")
        return self


class ModelSettings(Section):
    name: Text
    weights: Text | None
    blocks: Annotated[int, Field(ge=1)] | None
    head: Literal["conv", "linear"]
    head_width: Annotated[int, Field(ge=1, le=4096)]
    batch_norm_momentum: Annotated[float, Field(gt=0, le=1)]
    image_size: Annotated[int, Field(ge=16, le=512)]


class SharedSettings(Section):
    images: Annotated[int, Field(ge=2)] | None
    validation_share: Share
    batch_size: Annotated[int, Field(ge=2, le=4096)]
    min_steps: Annotated[int, Field(ge=1, le=100_000)]
    label_smoothing: Annotated[float, Field(ge=0, le=0.9)]
    flip: bool
    class_weights: Literal["balanced"] | None
    max_shift: Annotated[int, Field(ge=0, le=15)]
    warm_up: Annotated[float, Field(ge=0, le=1)]


class FrozenSettings(Section):
    epochs: Epochs
    muon_lr: LearningRate
    head_lr: LearningRate
    views: Annotated[int, Field(ge=1, le=1000)]


class FinetunedSettings(Section):
    start: Literal["frozen", "new"]
    epochs: Epochs
    muon_lr: LearningRate
    head_lr: LearningRate
    backbone_lr: LearningRate
    weight_decay: Annotated[float, Field(ge=0, le=1)]
    initial_scale: Annotated[float, Field(gt=0, le=1)]
    batch_norm_until: Annotated[float, Field(ge=0, le=1)]


class TrainSettings(Section):
    launcher: Text
    device: Literal["auto", "cpu", "cuda", "mps", "xpu"]
    threads: Annotated[int, Field(ge=1, le=256)]
    shared: SharedSettings
    frozen: FrozenSettings
    finetuned: FinetunedSettings


class FiguresSettings(Section):
    first_batch_size: Annotated[int, Field(ge=1, le=400)]


class Params(Section):
    seed: Annotated[int, Field(ge=0, lt=2**31)]
    data: DataSettings
    model: ModelSettings
    train: TrainSettings
    figures: FiguresSettings


def load_params(path: str = "params.yaml") -> Params:
    """Read and check the settings at `path`.

    Raises InputError, one line that names every wrong key, its value and what is allowed.
    """
    try:
        with open(path, encoding="utf-8") as file:
            # As DVC reads it, YAML 1.2: `010` is ten and `yes` is text.
            document = YAML(typ="safe", pure=True).load(file)
    except (YAMLError, LookupError, ValueError) as error:
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    try:
        return Params.model_validate(document)
    except ValidationError as error:
        raise InputError(f"{path}: {'; '.join(map(_explain, error.errors()))}") from None


def _explain(error: Any) -> str:
    key = ".".join(map(str, error["loc"])) or "the document"
    if error["type"] == "missing":
        return f"{key} is missing"
    return f"{key} = {error['input']!r:.60}: {error['msg'].replace('Input should', 'must')}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        "python -m transfer.settings", description="Check a file of settings."
    )
    parser.add_argument("path", nargs="?", default="params.yaml")
    try:
        load_params(parser.parse_args().path)
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
