"""params.yaml as checked, immutable objects. The only reader of params.yaml."""

import re
import sys
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from transfer.errors import InputError, exit_cleanly

MODES = ("frozen", "finetuned")

Count = Annotated[int, Field(ge=1)]
Epochs = Annotated[int, Field(ge=1, le=1000)]
LearningRate = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    """A mapping in params.yaml: no key unknown or missing, no type guessed, never changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Data(Section):
    source: Annotated[str, Field(min_length=1)]
    classes: list[str] | None
    validation: Count

    @model_validator(mode="after")
    def two_or_more_classes(self):
        if self.classes is not None and len(set(self.classes)) != max(len(self.classes), 2):
            raise ValueError("classes must be null or two or more different names")
        return self


class Model(Section):
    name: str
    weights: str | None
    blocks: Count | None
    head: Literal["conv", "linear"]
    image_size: Annotated[int, Field(ge=16, le=512)]


class Frozen(Section):
    epochs: Epochs
    head_lr: LearningRate
    views: Annotated[int, Field(ge=1, le=1000)]


class Finetuned(Section):
    epochs: Epochs
    head_lr: LearningRate
    backbone_lr: LearningRate
    first_size: Annotated[float, Field(gt=0, le=1)]

    @model_validator(mode="after")
    def backbone_is_slower(self):
        if self.backbone_lr >= self.head_lr:
            raise ValueError(f"backbone_lr must be below head_lr, which is {self.head_lr:g}")
        return self


class Train(Section):
    launcher: Annotated[str, Field(min_length=1)]
    device: Literal["auto", "cpu", "cuda"]
    bf16: bool
    threads: Annotated[int, Field(ge=1, le=256)]
    batch_size: Annotated[int, Field(ge=2, le=4096)]
    label_smoothing: Annotated[float, Field(ge=0, le=0.9)]
    weight_decay: Annotated[float, Field(ge=0, le=1)]
    crop: Annotated[int, Field(ge=0, le=31)]
    frozen: Frozen
    finetuned: Finetuned


class Evaluate(Section):
    batch_size: Annotated[int, Field(ge=1, le=400)]


class Params(Section):
    seed: Annotated[int, Field(ge=0, lt=2**31)]
    data: Data
    model: Model
    train: Train
    evaluate: Evaluate


class Loader(yaml.SafeLoader):
    """YAML as DVC reads it: 3e-4 is a number (YAML 1.2), and no key may stand twice."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key!r} stands twice", problem_mark=node.start_mark
                )
        return super().construct_mapping(node, deep)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def load(path: str = "params.yaml") -> Params:
    """Read and check the settings at `path`.

    Raises InputError, one line that names the key, its value and what is allowed.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    try:
        document = yaml.load(text, Loader)
    except Exception as error:  # PyYAML's constructors raise whatever they meet
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    try:
        return Params.model_validate(document)
    except ValidationError as error:
        raise InputError(f"{path}: {_explain(error.errors()[0])}") from None


def _explain(error: dict) -> str:
    key = " ".join(".".join(map(str, error["loc"])).split()) or "the document"
    value = repr(error["input"])
    value = value if len(value) <= 60 else value[:57] + "..."
    match error["type"]:
        case "missing":
            return f"{key}: is missing"
        case "extra_forbidden":
            section = Params
            for name in error["loc"][:-1]:
                section = section.model_fields[name].annotation
            allowed = ", ".join(section.model_fields)
            return f"{key} = {value}: unknown key; allowed here: {allowed}"
        case "value_error":
            return f"{key} = {value}: {error['ctx']['error']}"
        case _:
            return f"{key} = {value}: {error['msg'].replace('Input should', 'must')}"


if __name__ == "__main__":
    exit_cleanly(lambda: load(*sys.argv[1:]))
