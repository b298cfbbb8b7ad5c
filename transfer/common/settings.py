"""params.yaml as checked, immutable objects. The only reader of params.yaml.

`params` always means all settings, `settings` one section of them.
"""

import sys
import unicodedata
from typing import Annotated, Any, Literal, Self

from dvc.utils.serialize import loads_yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from transfer.common.errors import InputError, exit_cleanly, printable

MODES = ("frozen", "finetuned")

Epochs = Annotated[int, Field(ge=1, le=1000)]
LearningRate = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]
ClassName = Annotated[str, AfterValidator(lambda name: unicodedata.normalize("NFC", name))]


class Section(BaseModel):
    """A mapping in params.yaml: no key unknown or missing, no type guessed, never changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class DataSettings(Section):
    source: Text
    classes: list[ClassName] | None
    test_share: Share

    @model_validator(mode="after")
    def two_or_more_classes(self) -> Self:
        if self.classes is not None and len(set(self.classes)) != max(len(self.classes), 2):
            raise ValueError("classes must be null or two or more different names")
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
    max_shift: Annotated[int, Field(ge=0, le=31)]
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
    bf16: bool
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

    def changed(self, changes: dict[str, Any]) -> "Params":
        """A copy with `changes` (nested as in params.yaml) made, checked as the file would be."""
        return Params.model_validate(merge(self.model_dump(), changes))


def merge(document: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`document` with `changes` in it; both may be nested."""
    return document | {
        key: merge(document.get(key, {}), value) if isinstance(value, dict) else value
        for key, value in changes.items()
    }


def load_params(path: str = "params.yaml") -> Params:
    """Read the settings at `path` with DVC's own reader, and check them.

    DVC reads YAML 1.2, where `010` is ten and `yes` is text; with another reader DVC would record
    one value and a stage use another. Raises InputError, one line that names the key, its value and
    what is allowed.
    """
    try:
        with open(path, encoding="utf-8") as file:
            document = loads_yaml(file.read())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    except Exception as error:  # the reader raises whatever it meets
        problem = getattr(error, "problem", None)
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark else ""
        raise InputError(f"{path}: not YAML: {printable(problem or repr(error))}{where}") from None
    try:
        return Params.model_validate(document)
    except ValidationError as error:
        raise InputError(f"{path}: {_explain(error.errors()[0])}") from None


def _explain(error: Any) -> str:
    """One error of pydantic as a line: the key, its value and what is allowed."""
    key = printable(".".join(map(str, error["loc"]))) or "the document"
    value = repr(error["input"])
    value = value if len(value) <= 60 else value[:57] + "..."
    match error["type"]:
        case "missing":
            return f"{key}: is missing"
        case "extra_forbidden":
            section: Any = Params
            for name in error["loc"][:-1]:
                section = section.model_fields[name].annotation
            return f"{key} = {value}: unknown key; allowed here: {', '.join(section.model_fields)}"
        case "value_error":
            return f"{key} = {value}: {error['ctx']['error']}"
        case _:
            return f"{key} = {value}: {error['msg'].replace('Input should', 'must')}"


if __name__ == "__main__":
    exit_cleanly(lambda: load_params(*sys.argv[1:]))
