"""What training gets and does: on stripes, exactly the same again, or not at all."""

import itertools
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, refusal, with_settings
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import Compose, Normalize, Resize, ToPILImage, ToTensor

from stages import train as training
from stages.train import EPOCHS, VIEWS, fit_temperature, random_stream, shuffled_batches
from transfer.data import Split, shift_and_flip, to_input
from transfer.model import Network, linear_head, predict
from transfer.optim import make_optimizers, orthogonalise, slanted_triangle
from transfer.run import set_up_torch
from transfer.settings import MODES, load_params

CLASSES = [f"angle {number}" for number in range(10)]
NOISE = torch.randint(0, 256, (500, 32, 32, 3), dtype=torch.uint8, generator=random_stream(0))
FEW = torch.arange(96)
DRAWS = "finetuned", {"model.name": "efficientnet_b0", "model.blocks": 3}  # what it drops
INFINITE = {"prepare": lambda network: nn.init.constant_(network.head[-1].bias, float("inf"))}
UNKNOWN = {"prepare": lambda network: network.head[0][1].running_var.fill_(float("nan"))}


def view(images: torch.Tensor, number: int) -> torch.Tensor:
    """All `images` as a view of mode frozen has them."""
    chunks, stream = torch.arange(len(images)).split(256), random_stream(0, VIEWS, number, 0)
    return torch.cat([shift_and_flip(images, index, 4, True, stream) for index in chunks])


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def learn(params, stripes):
    """Train a small network; what came of it, and what went through its head in training."""

    def learn(mode, changes=(), data=stripes, index=FEW, prepare=None, device="cpu", kept=None):
        settings, inputs, logits = with_settings(params, dict(changes)), [], []
        torch.manual_seed(0)
        network = Network(settings.model, CLASSES).to(device)
        if prepare:
            prepare(network)

        def record(head, x, y):
            if head.training:
                inputs.append(x[0])
                logits.append(y.detach())

        def values():
            return {
                key: value.cpu().numpy().tobytes() for key, value in network.state_dict().items()
            }

        network.head.register_forward_hook(record)
        before, validation = values(), torch.arange(len(data.labels))[-40:]
        rows = training.train(mode, network, data, index, validation, settings, kept)
        changed = {key for key, value in values().items() if value != before[key]}
        found = {"network": network, "changed": changed, "inputs": inputs, "logits": logits}
        return SimpleNamespace(result=(values(), rows), **found)

    return learn


# densenet121 cannot be folded wholly.
@pytest.mark.parametrize("name", ["mobilenet_v3_small", "densenet121"])
@pytest.mark.parametrize(("mode", "until"), [("frozen", 0), ("finetuned", 0), ("finetuned", 0.5)])
def test_exactly_what_must_learn_changes(learn, name, mode, until):
    """The statistics of the backbone's BatchNorm move for a share of the epochs."""
    epochs = {f"train.{mode}.epochs": 2, "train.finetuned.batch_norm_until": float(until)}
    done = learn(mode, {"model.name": name} | epochs)
    parameters = {key for key, _ in done.network.named_parameters()}
    statistics = {key for key in done.result[0] if re.search("running_|num_batches", key)}
    head = {key for key in parameters | statistics if key.startswith("head.")}
    learned = head | (parameters if mode == "finetuned" else set())
    assert done.changed == learned | (statistics if until else set())
    counts = [value for key, value in done.network.state_dict().items() if "num_batches" in key]
    assert counts[0] == until * counts[-1]  # of the backbone, and of the head


@pytest.mark.parametrize("mode", MODES)
def test_training_learns_also_from_fewer_images_than_a_batch(learn, mode):
    """On an accelerator, if there is one."""
    shared = {"train.shared.batch_size": 4096, "train.shared.min_steps": 4}
    changes = shared | {f"train.{mode}.epochs": 12, "train.finetuned.initial_scale": 1.0}
    _, rows = learn(mode, changes, device=set_up_torch("auto", 1)).result
    assert [row["epoch"] for row in rows] == [*range(1, 13)]
    assert rows[-1]["train_accuracy"] > 0.5  # chance is 0.1


@pytest.mark.parametrize("mode", MODES)
def test_the_seed_alone_decides_the_result(learn, mode):
    epochs = {f"train.{mode}.epochs": 2}
    changes = ({}, {}, {"seed": 1})
    first, again, other = (learn(mode, epochs | change).result for change in changes)
    assert first == again
    assert first != other


@pytest.mark.parametrize(("mode", "model"), [("frozen", {}), ("finetuned", {}), DRAWS])
def test_training_resumes_after_the_last_epoch_kept(learn, mode, model, capsys, monkeypatch):
    changes, write = model | {f"train.{mode}.epochs": 4}, training.write_checkpoint

    def interrupt(path, state):
        if len(state["rows"]) == 3:
            raise KeyboardInterrupt
        write(path, state)

    monkeypatch.setattr(training, "write_checkpoint", interrupt)
    with pytest.raises(KeyboardInterrupt):
        learn(mode, changes, kept=Path("kept/here"))
    monkeypatch.setattr(training, "write_checkpoint", write)
    capsys.readouterr()
    resumed = learn(mode, changes, kept=Path("kept/here")).result
    said = [line.split(",")[0].split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert said == ["resuming after epoch 2", *(f"{mode} epoch {n}" for n in (1, 2, 3, 4))]
    assert resumed == learn(mode, changes).result


def test_each_part_has_its_own_learning_rate(params):
    rates = {"muon_lr": 0.1, "head_lr": 0.03, "backbone_lr": 0.01, "weight_decay": 0.2}
    settings = params.train.finetuned.model_copy(update=rates)
    network = Network(params.model, CLASSES)
    groups = [g for part in make_optimizers(network, settings, 0, 9)[:2] for g in part.param_groups]
    found = {p: (g["lr"], g["weight_decay"] > 0) for g in groups for p in g["params"]}
    of_head = {1: 0.03, 2: 0.03, 4: 0.1}  # by the number of dimensions
    head = {p: (of_head[p.ndim], p.ndim == 4) for p in network.head.parameters()}
    assert found == head | {p: (0.01, p.ndim > 1) for p in network.backbone.parameters()}


def test_a_linear_head_reaches_the_optimum_of_logistic_regression():
    """On the mean colours of four quadrants, which share the image's brightness; as often as not,
    classes overlap. scikit-learn finds the optimum.
    """
    draw, labels = np.random.default_rng(0), np.arange(2000) % 4
    tints = draw.normal(0, 15, (4, 2, 2, 3))[labels]
    colours = 128 + tints + draw.normal(0, 30, (2000, 1, 1, 1)) + draw.normal(0, 20, tints.shape)
    pixels = np.clip(colours, 0, 255).astype(np.uint8).repeat(8, 1).repeat(8, 2)
    data = Split(torch.from_numpy(pixels), torch.from_numpy(labels))
    changes = {
        "model.weights": None, "model.image_size": 16, "model.head": "linear",
        "train.shared.label_smoothing": 0.0, "train.shared.min_steps": 100, "train.frozen.views": 1,
    }  # fmt: skip
    settings = with_settings(load_params(str(ROOT / "params.yaml")), changes)
    torch.manual_seed(0)
    network = Network(settings.model, CLASSES[:4])
    network.backbone = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.PixelUnshuffle(2))
    network.head = linear_head(12, 4, 0)
    training.train("frozen", network, data, torch.arange(2000), FEW, settings)
    images = view(data.images, 0)  # what it was trained on
    features = network.backbone(to_input(images, 16, network.mean, network.std)).flatten(1)
    best = LogisticRegression(C=1e9, max_iter=1000).fit(features, labels)
    reached = F.cross_entropy(predict(network, images), data.labels).item()
    assert reached < log_loss(labels, best.predict_proba(features)) + 0.003


@pytest.mark.parametrize("fits", [True, False])
def test_cached_features_are_what_the_backbone_extracts(learn, stripes, monkeypatch, fits):
    """Of two views in turn; if they do not fit the memory for them, of images augmented anew."""
    monkeypatch.setattr(training, "CACHE_BYTES", 2 * 340 * 40 * 2 * 2 * 2 - (not fits))
    changes = {"train.shared.batch_size": 340, "train.frozen.epochs": 3}
    changes |= {"model.batch_norm_momentum": 1.0}

    def prepare(network):  # with BatchNorm's statistics, the features are not small
        network.train()(to_input(stripes.images, 32, network.mean, network.std))

    done = learn("frozen", changes, index=torch.arange(340), prepare=prepare)
    for epoch, found in enumerate(done.inputs):
        generator = random_stream(0, EPOCHS, epoch, 0)
        [order] = shuffled_batches(340, 1, 340, generator)
        images = view(stripes.images, epoch % 2)[order]
        if not fits:
            images = shift_and_flip(stripes.images, order, 4, True, generator)
        wanted = done.network.backbone(to_input(images, 32, done.network.mean, done.network.std))
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)  # it is kept as float16


def test_images_grow_to_their_full_size_in_fine_tuning(learn, params):
    for size, wanted in ((32, [16, 16, 16, 32, 32, 32]), (100, [48, 64, 64, 80, 96, 100])):
        sizes = [training.growing_size(epoch, size, params.train.finetuned) for epoch in range(6)]
        assert sizes == wanted
    sides = [x.shape[-1] for x in learn("finetuned").inputs]  # three steps an epoch, stride 16
    assert sides == [1] * 9 + [2] * 9


def test_with_class_weights_every_class_has_the_same_share_in_the_loss(learn, stripes):
    index = torch.arange(150)
    index = index[(index < 40) | (stripes.labels[:150] < 3)]  # 4 or 15 images of a class
    changes = {
        "train.shared.class_weights": "balanced", "train.shared.label_smoothing": 0.0,
        "train.shared.batch_size": len(index), "train.frozen.epochs": 1,
    }  # fmt: skip
    done = learn("frozen", changes, index=index)
    [order] = shuffled_batches(len(index), 1, len(index), random_stream(0, EPOCHS, 0, 0))
    labels = stripes.labels[index[order]]
    losses = F.cross_entropy(done.logits[0], labels, reduction="none")
    wanted = torch.stack([losses[labels == label].mean() for label in range(10)]).mean()
    assert done.result[1][0]["train_loss"] == pytest.approx(wanted.item(), rel=1e-5)
    assert losses.mean() != pytest.approx(wanted.item(), rel=1e-3)


@pytest.mark.parametrize(("count", "steps", "size"), [(103, 10, 10), (25, 7, 10), (4, 7, 4)])
def test_an_epoch_has_each_image_equally_often(count, steps, size):
    batches = shuffled_batches(count, steps, size, random_stream(0))
    assert [len(index) for index in batches] == [size] * steps
    times = torch.cat(batches).bincount(minlength=count)
    assert times.max() - times.min() <= 1


@pytest.mark.parametrize(("most", "flip"), [(0, True), (4, True), (4, False)])
def test_augmentation_is_a_mirrored_shift_and_a_flip(most, flip):
    index, found = torch.randperm(500, generator=random_stream(1)), []
    ways = [*itertools.product(range(2 * most + 1), range(2 * most + 1), (1, -1)[: 1 + flip])]
    got = shift_and_flip(NOISE, index, most, flip, random_stream(2)).numpy()
    for image, original in zip(got, NOISE[index].numpy(), strict=True):
        padded = np.pad(original, ((most, most), (most, most), (0, 0)), mode="reflect")
        moved = {way: padded[way[0] :][:32, way[1] :][:, :32][:, :: way[2]] for way in ways}
        found += [way for way in ways if (moved[way] == image).all()]
    assert len(found) == 500
    assert {way[:2] for way in found} == {way[:2] for way in ways}
    assert 200 * flip <= [way[2] for way in found].count(-1) <= 300 * flip


@pytest.mark.parametrize("size", [16, 32, 96])
def test_the_input_is_what_torchvision_makes_of_an_image(size):
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    steps = [ToPILImage(), Resize((size, size)), ToTensor(), Normalize(mean, std)]
    reference = torch.stack([Compose(steps)(image.numpy()) for image in NOISE[:4]])
    got = to_input(NOISE[:4], size, torch.tensor(mean), torch.tensor(std))
    one_level = 1 / 255 / min(std)  # PIL may round the other way
    torch.testing.assert_close(got, reference, atol=1.01 * one_level, rtol=0)
    assert (got - reference).abs().mean() < 0.1 * one_level


@pytest.mark.parametrize("warm_up", [0.0, 0.2, 1.0])
def test_the_learning_rate_rises_then_falls(warm_up):
    rates = [slanted_triangle(step, 100, warm_up) for step in range(100)]
    peak = max(0, round(100 * warm_up) - 1)
    assert (rates[peak], max(rates), min(rates) > 0) == (1, 1, True)
    assert rates[: peak + 1] == sorted(set(rates[: peak + 1]))
    assert rates[peak:] == sorted(set(rates[peak:]), reverse=True)


@pytest.mark.parametrize("shape", [(128, 360), (300, 20), (5, 5)])
def test_an_orthogonalised_matrix_has_singular_values_near_1(shape):
    matrix = torch.randn(shape, generator=random_stream(0))
    got = orthogonalise(matrix, steps=8)
    u, before, v = torch.linalg.svd(matrix, full_matrices=False)
    after = torch.linalg.svdvals(got)
    assert before.max() > 2  # far from 1
    assert ((after > 0.6) & (after < 1.3)).all()
    assert F.cosine_similarity(got.flatten(), (u @ v).flatten(), dim=0) > 0.95


@pytest.mark.parametrize("factor", [0.2, 1.0, 3.0])
def test_the_temperature_undoes_over_and_under_confidence(factor, capsys):
    logits = 2 * torch.randn(20_000, 5, generator=random_stream(0))
    labels = torch.multinomial(logits.softmax(1), 1, generator=random_stream(1)).flatten()
    assert fit_temperature(factor * logits, labels) == pytest.approx(factor, rel=0.05)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("wrong", [0, 40])
def test_a_temperature_that_the_images_do_not_determine_is_said_and_stays_1(wrong, capsys):
    labels = torch.arange(40) % 2
    logits = F.one_hot((labels + (torch.arange(40) < wrong)) % 2).float()
    assert fit_temperature(logits, labels) == 1
    assert "40 validation images do not determine the temperature" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "mode", "given"),
    [
        ("frozen epoch 1/6: the loss is not finite; lower .* train.frozen$", "frozen", INFINITE),
        ("finetuned epoch 1/6: the loss is not .* train.finetuned$", "finetuned", INFINITE),
        ("frozen epoch 1/6: the loss is not finite;", "frozen", UNKNOWN),  # in validation alone
        ("train.shared.batch_size = 32, .* two or more$", "frozen", {"index": FEW[:1]}),
        ("model.image_size = 16: .* train.finetuned.initial_scale", "finetuned",
         {"changes": {"model.name": "squeezenet1_1", "model.blocks": None}}),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(learn, words, mode, given):
    assert re.match(words, refusal(lambda: learn(mode, **given)))


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
@pytest.mark.parametrize("device", ["cuda", "mps", "xpu"])
def test_a_device_that_torch_does_not_find_is_refused(device):
    message = refusal(lambda: set_up_torch(device, 1))
    assert message == f"train.device = {device}: torch finds only cpu; use auto or cpu"
