"""Numbers gone wrong stop the work instead of becoming a result."""

import pytest
import torch
from conftest import dvc
from torch import nn

from tools import synthetic
from transfer import data, model, training
from transfer.errors import InputError


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "stripes"
    synthetic.write(folder, 100, 20)
    return data.read_cifar10(str(folder))[0]["train"]


def train(network, mode, split, settings):
    training.train(network, mode, split, split, settings, torch.device("cpu"), lambda *_: None)


@pytest.mark.parametrize(
    ("mode", "where", "rates"),
    [
        ("frozen", "epoch 1/6, step 1", r"0\.00"),
        ("finetuned", "epoch 1/6, step 1", r"0\.00.* and "),
    ],
)
def test_a_loss_that_is_not_finite_stops_training(settings, split, mode, where, rates):
    network = model.build(settings.model, 10)
    with torch.no_grad():
        network.head[-1].bias.fill_(float("inf"))
    with pytest.raises(InputError, match=f"{mode} epoch 1/6, step 1: the loss is nan at .*{rates}"):
        train(network, mode, split, settings)


def test_a_learning_rate_that_is_too_high_is_named(settings, split):
    frozen = settings.train.frozen.model_copy(update={"head_lr": 1e30})
    settings = settings.model_copy(
        update={"train": settings.train.model_copy(update={"frozen": frozen})}
    )
    with pytest.raises(InputError, match=r"the loss is (nan|inf) at learning rates 1?.*e\+"):
        train(model.build(settings.model, 10), "frozen", split, settings)


def test_a_head_with_a_dead_output_is_refused(settings, split):
    network = model.build(settings.model, 10)
    network.head = nn.Sequential(nn.Flatten(), nn.Linear(160, 8), nn.ReLU(), nn.Linear(8, 10))
    with torch.no_grad():
        network.head[1].bias.fill_(-1e6)
    with pytest.raises(InputError, match=r"frozen epoch 1/6: outputs \[0, 1, .* say the same"):
        train(network, "frozen", split, settings)


class Restless(nn.Module):
    """Changes with every picture, eval mode or not."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x):
        self.count += 1
        return x


def test_a_frozen_backbone_that_changed_is_refused(settings, split):
    network = model.build(settings.model, 10)
    network.backbone.add_module("restless", Restless())
    with pytest.raises(InputError, match="backbone has changed"):
        train(network, "frozen", split, settings)


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_class_without_pictures_is_refused(settings, tmp_path, part):
    splits = dict.fromkeys(("train", "test"), data.Split(torch.zeros(9, 4, 4, 3).byte(),
                                                         torch.arange(9) % 3))  # fmt: skip
    splits[part] = data.Split(*(t[:2] for t in splits[part]))
    data.write_arrays(tmp_path / "data", splits, ["a", "b", "c"])
    with pytest.raises(InputError, match=rf"{part}_labels\.npy: there is no picture of c"):
        data.load_split(tmp_path / "data", part, ["a", "b", "c"])


def test_a_class_of_which_nothing_is_held_out_is_refused_before_training(project):
    text = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(text.replace("validation: 50", "validation: 5"))
    output = dvc(project, "repro", "train@frozen", fails=True)
    assert "error: data.validation = 5: held out: there is no picture of " in output
    assert "Traceback" not in output


def test_what_cannot_fit_into_memory_is_refused_early(settings, split):
    settings = settings.model_copy(
        update={
            "model": settings.model.model_copy(update={"image_size": 512}),
            "train": settings.train.model_copy(update={"batch_size": 4096}),
        }
    )
    many = data.Split(*(torch.cat([t] * 41) for t in split))
    network = model.build(settings.model, 10)
    with pytest.raises(
        InputError, match=r"train\.batch_size = 4096, model\.image_size = 512: .*GiB"
    ):
        train(network, "finetuned", many, settings)
