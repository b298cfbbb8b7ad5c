"""What training gets and does: on stripes, exactly the same again, or not at all."""

import re

import numpy as np
import pytest
import torch
from helpers import ROOT, refusal
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import Compose, Normalize, Resize, ToPILImage, ToTensor

from transfer.common.dataset import Split
from transfer.common.settings import MODES, load_params
from transfer.inference import predict, set_up_torch, to_input
from transfer.model import Network, build, linear_head
from transfer.training import checkpoint, modes
from transfer.training.loop import train
from transfer.training.modes import make_mode, random_stream
from transfer.training.optimizer import make_optimizers, orthogonalise, slanted_triangle
from transfer.training.temperature import calibrate, fit_temperature

CPU = torch.device("cpu")
DEFAULT = load_params(str(ROOT / "params.yaml"))
NOISE = torch.randint(0, 256, (500, 32, 32, 3), dtype=torch.uint8, generator=random_stream(0))
TINY = Split(NOISE[:8, :16, :16], torch.arange(8))


def weights(network) -> dict[str, bytes]:
    return {key: value.cpu().numpy().tobytes() for key, value in network.state_dict().items()}


@pytest.fixture
def learn(params, stripes):
    """Train a small network; returns it, its weights, which have changed, and a row an epoch."""

    def learn(mode, others=None, data=stripes, damage=None, device=CPU, kept=None, **settings):
        changed = params.changed({"train": {mode: settings}}).changed(others or {})
        torch.manual_seed(0)
        network = build(changed.model, 10)
        if damage:
            damage(network)
        before = weights(network)
        rows = train(make_mode(mode, network, data, changed, device), data, kept)
        after = weights(network)
        return network, after, {key for key in after if after[key] != before[key]}, rows

    return learn


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "densenet121"])  # not all can be folded
@pytest.mark.parametrize(("mode", "until"), [("frozen", 0), ("finetuned", 0), ("finetuned", 0.5)])
def test_exactly_what_must_learn_changes(learn, mode, until, name):
    """The statistics of the backbone's BatchNorm move for a share of the epochs."""
    finetuned = {"batch_norm_until": float(until)}
    others = {"model": {"name": name}, "train": {"finetuned": finetuned}}
    network, _, changed, rows = learn(mode, others, epochs=2)
    assert [row["epoch"] for row in rows] == [1, 2]
    parameters = {name for name, _ in network.named_parameters()}
    statistics = {key for key in network.state_dict() if re.search("running_|num_batches", key)}
    head = {key for key in parameters | statistics if key.startswith("head.")}
    learned = head | (parameters if mode == "finetuned" else set())
    assert changed == learned | (statistics if until else set())
    first = next(m for m in network.backbone.modules() if isinstance(m, nn.BatchNorm2d))
    norms = first, network.head[0][1]
    assert norms[0].num_batches_tracked == until * norms[1].num_batches_tracked


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shared", [{}, {"batch_size": 4096, "min_steps": 4}])
def test_training_learns_also_of_fewer_images_than_a_batch(learn, mode, shared):
    """On an accelerator, if there is one."""
    others = {"train": {"finetuned": {"initial_scale": 1.0}, "shared": shared}}
    *_, rows = learn(mode, others, device=set_up_torch("auto", 1), epochs=12)
    assert rows[-1]["train_accuracy"] > 0.5  # chance is 0.1


@pytest.mark.parametrize("mode", MODES)
def test_on_the_cpu_the_seed_decides_and_bf16_does_not(learn, mode):
    changes = ({}, {"train": {"bf16": False}}, {"seed": 1})
    first, again, other = (learn(mode, change, epochs=2)[1:] for change in changes)
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    ("mode", "model"),
    [
        ("frozen", {}),
        ("finetuned", {}),
        ("finetuned", {"name": "efficientnet_b0", "blocks": 3}),  # drops blocks at random
    ],
)
def test_interrupted_training_resumes_after_the_last_epoch_kept(
    learn, mode, model, tmp_path, capsys, monkeypatch
):
    settings = {"others": {"model": model}, "epochs": 4}
    save = checkpoint.save

    def interrupted(path, state):
        if len(state["rows"]) == 3:
            raise KeyboardInterrupt
        save(path, state)

    monkeypatch.setattr(checkpoint, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        learn(mode, kept=tmp_path / "kept", **settings)
    monkeypatch.setattr(checkpoint, "save", save)
    resumed = learn(mode, kept=tmp_path / "kept", **settings)
    assert "resuming after epoch 2," in capsys.readouterr().out
    assert resumed[1:] == learn(mode, **settings)[1:]


def test_each_part_has_its_own_learning_rate(params):
    network = build(params.model, 10)
    peaks = {"muon": 0.1, "head": 0.03, "backbone": 0.01}
    decaying = params.changed({"train": {"finetuned": {"weight_decay": 0.2}}})
    optimizers = make_optimizers(network, peaks, decaying.train)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    found = {p: (g["lr"], g["weight_decay"] > 0) for g in groups for p in g["params"]}
    of_head = {2: 0.03, 1: 0.03, 4: 0.1}  # by the number of dimensions
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
    torch.manual_seed(0)
    quadrants = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.PixelUnshuffle(2))
    network = Network(quadrants, linear_head(12, 4, 0))
    shared = {"label_smoothing": 0.0, "min_steps": 100}
    changes = {"model": {"image_size": 16}, "train": {"shared": shared, "frozen": {"views": 1}}}
    learning = make_mode("frozen", network, data, DEFAULT.changed(changes), CPU)
    train(learning, data)
    features = learning.view(0).float()  # as they were trained on
    best = LogisticRegression(C=1e9, max_iter=1000).fit(features.flatten(1), labels)
    with torch.no_grad():
        reached = F.cross_entropy(network.head(features), data.labels).item()
    assert reached < log_loss(labels, best.predict_proba(features.flatten(1))) + 0.003


def test_cached_features_are_what_the_backbone_extracts(params, stripes, monkeypatch):
    changes = {"model": {"batch_norm_momentum": 1.0}, "train": {"shared": {"batch_size": 340}}}
    changed = params.changed(changes)
    network = build(changed.model, 10)
    network.mean += 0.1
    network.train()(to_input(stripes.images, 32, network.mean, network.std))
    frozen = make_mode("frozen", network, stripes, changed, CPU)
    some = torch.arange(256)
    for epoch, view in enumerate([0, 1, 0]):  # each view in turn
        [(x, labels)] = frozen.batches(epoch)
        [order] = modes.shuffled_batches(340, 1, 340, random_stream(0, 0, epoch, 0))
        assert torch.equal(labels, stripes.labels[order])
        images = modes.shift_and_flip(stripes.images, some, 4, random_stream(0, 1, view, 0))
        wanted = network.backbone(to_input(images, 32, network.mean, network.std))
        got = x[order.argsort()][some]  # rounded to float16
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)
    room = frozen.views * x.nbytes // 2
    for cached, enough in ((True, room), (False, room - 1)):
        monkeypatch.setattr(modes, "CACHE_BYTES", enough)
        [(other, _)] = modes.Frozen(network, stripes, changed).batches(2)
        assert (other.shape, other.dtype) == (x.shape, torch.float32)
        assert torch.equal(other, x) == cached  # else augmented anew


def test_images_grow_to_their_full_size(params, stripes):
    for mode, size, wanted in (
        ("finetuned", 32, [16, 16, 16, 32, 32, 32]),
        ("finetuned", 100, [48, 64, 64, 80, 96, 100]),
        ("frozen", 100, [100] * 6),
    ):
        changed = params.changed({"model": {"image_size": size}})
        learning = make_mode(mode, build(changed.model, 10), stripes, changed, CPU)
        assert [learning.image_size(epoch) for epoch in range(6)] == wanted


@pytest.mark.parametrize(("count", "sizes"), [(103, [10] * 10), (25, [10] * 7), (4, [4] * 7)])
def test_an_epoch_has_each_image_equally_often(params, count, sizes):
    changed = params.changed({"train": {"shared": {"batch_size": 10, "min_steps": 7}}})
    data = Split(NOISE[:count], torch.arange(count))
    learning = make_mode("finetuned", build(params.model, 10), data, changed, CPU)
    drawn = [labels for _, labels in learning.batches(0)]
    assert [len(labels) for labels in drawn] == sizes
    times = torch.cat(drawn).bincount(minlength=count)
    assert times.max() - times.min() <= 1


@pytest.mark.parametrize("most", [0, 4])
def test_augmentation_is_a_mirrored_shift_and_a_flip(most):
    index = torch.randperm(500, generator=random_stream(1))
    got = modes.shift_and_flip(NOISE, index, most, random_stream(2)).numpy()
    flips, shifts = 0, set()
    for image, original in zip(got, NOISE[index].numpy(), strict=True):
        padded = np.pad(original, ((most, most), (most, most), (0, 0)), mode="reflect")
        [(shift, flip)] = [
            ((dy, dx), flip)
            for dy in range(2 * most + 1)
            for dx in range(2 * most + 1)
            for flip in (1, -1)
            if (padded[dy : dy + 32, dx : dx + 32][:, ::flip] == image).all()
        ]
        shifts.add(shift)
        flips += flip < 0
    assert 200 < flips < 300
    assert len(shifts) == (2 * most + 1) ** 2


@pytest.mark.parametrize("size", [16, 32, 96])
def test_the_input_is_what_torchvision_makes_of_an_image(size):
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    steps = [ToPILImage(), Resize((size, size)), ToTensor(), Normalize(mean, std)]
    reference = torch.stack([Compose(steps)(image.numpy()) for image in NOISE[:4]])
    got = to_input(NOISE[:4], size, torch.tensor(mean), torch.tensor(std))
    assert got.is_contiguous(memory_format=torch.channels_last)
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
def test_the_temperature_undoes_over_and_under_confidence(factor):
    logits = 2 * torch.randn(20_000, 5, generator=random_stream(0))
    labels = torch.multinomial(logits.softmax(1), 1, generator=random_stream(1)).flatten()
    assert fit_temperature(factor * logits, labels) == pytest.approx(factor, rel=0.05)


def test_calibration_keeps_the_predictions_and_lowers_the_loss(learn, stripes):
    network, *_ = learn("finetuned", epochs=4)
    network.head[-1].weight.data *= 20  # far too confident
    before = predict(network, stripes.images, 32)
    temperature = calibrate(network, stripes, 32)
    after = predict(network, stripes.images, 32)
    torch.testing.assert_close(after, before / temperature, rtol=1e-3, atol=1e-3)
    assert F.cross_entropy(after, stripes.labels) < F.cross_entropy(before, stripes.labels)


@pytest.mark.parametrize(
    ("words", "mode", "given"),
    [
        *((f"{mode} epoch 1/2: the loss is not finite; lower .* train.{mode}$", mode,
           {"damage": lambda network: nn.init.constant_(network.head[-1].bias, float("inf"))})
          for mode in MODES),
        ("frozen epoch 1/2: the loss is not finite; lower", "frozen",  # in validation alone
         {"damage": lambda network: network.head[0][1].running_var.fill_(float("nan"))}),
        ("frozen epoch 2/2: a logit is the same for all .* lower .* train.frozen$", "frozen",
         {"damage": lambda network: nn.init.constant_(network.head[0][1].bias, -1e6)}),
        (r"train\.shared\.images = null: .* two .* for each process \(1\); there are 1$", "frozen",
         {"data": TINY.take(torch.arange(1))}),
        (r"train\.shared\.max_shift = 16: the images have only 16 pixels a side", "frozen",
         {"data": TINY, "others": {"train": {"shared": {"max_shift": 16}}}}),
        (r"train\.finetuned\.initial_scale = 0\.5: .* no feature map of .* 16 pixels", "finetuned",
         {"others": {"model": {"name": "squeezenet1_1", "blocks": None}}}),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(learn, words, mode, given):
    assert re.match(words, refusal(lambda: learn(mode, epochs=2, **given)))


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
@pytest.mark.parametrize("device", ["cuda", "mps", "xpu"])
def test_a_device_that_torch_does_not_find_is_refused(device):
    reason = r" \(.+\)" if device == "cuda" else ""  # no driver, or a build without CUDA
    words = rf"train\.device = '{device}': torch finds no accelerator{reason}; use auto or cpu"
    assert re.fullmatch(words, refusal(lambda: set_up_torch(device, 1)))
