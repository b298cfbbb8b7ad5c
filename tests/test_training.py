import functools
import re

import pytest
import torch
from helpers import dvc, refusal, set_params
from torch import nn

from transfer.common.dataset import Split, stratified
from transfer.inference import choose_device, predict, to_input
from transfer.model import freeze
from transfer.model import build
from transfer.training import batches, checks
from transfer.training.loop import train
from transfer.training.optimizer import make_optimizers, orthogonalise, slanted_triangle
from transfer.training.temperature import calibrate, fit_temperature

CPU = torch.device("cpu")


def run(mode, params, data, network=None, **changes):
    """Train a small network; returns it, its first state dict and what was logged."""
    params = params.changed({"train": {mode: changes}})
    names = [str(label) for label in range(10)]
    rest, held = stratified(data.labels, 20 / len(data.labels), names, 0, "share")
    torch.manual_seed(0)
    network = network or build(params.model, 10)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    logged = []
    train(
        network, mode, data.take(rest), data.take(held), params, choose_device("cpu", 1),
        lambda *row: logged.append(row),
    )  # fmt: skip
    return network, before, logged


def changes_in(network, before):
    return {key: not torch.equal(value, before[key]) for key, value in network.state_dict().items()}


def test_frozen_leaves_the_backbone_bit_for_bit_and_trains_the_head(params, stripes):
    network, before, logged = run("frozen", params, stripes, epochs=2)
    changed = changes_in(network, before)
    assert any("running_mean" in key for key in changed if key.startswith("backbone."))
    assert not any(changed[key] for key in changed if key.startswith("backbone."))
    assert all(changed[key] for key in changed if key.startswith("head."))
    assert [epoch for epoch, _ in logged] == [1, 2]


def test_finetuned_trains_both_and_moves_batchnorm(params, stripes):
    network, before, _ = run("finetuned", params, stripes, epochs=2)
    assert all(changes_in(network, before).values())


def test_batchnorm_of_the_backbone_moves_until_its_statistics_are_fixed(params, stripes):
    for until, moves in ((0.0, False), (0.5, True)):
        settings = {"epochs": 2, "batch_norm_until": until}
        network, before, _ = run("finetuned", params, stripes, **settings)
        changed = changes_in(network, before)
        statistics = {key for key in changed if "running_" in key or "num_batches" in key}
        assert all(changed[key] for key in changed.keys() - statistics)
        assert all(changed[key] for key in statistics if key.startswith("head."))
        assert {changed[key] for key in statistics if key.startswith("backbone.")} == {moves}
        backbone, head = (
            int(network.state_dict()[f"{part}.1.num_batches_tracked"])
            for part in ("backbone.features.0", "head.0")
        )
        assert backbone == until * head


def test_the_backbone_has_its_own_lower_learning_rate(params):
    network = build(params.model, 10)
    optimizers = make_optimizers(network, "finetuned", params)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    rates = {p: group["lr"] for group in groups for p in group["params"]}
    assert len(rates) == sum(len(group["params"]) for group in groups)
    settings, shared = params.train.finetuned, params.train.shared
    convolutions = [p for p in network.head.parameters() if p.ndim == 4]
    rest = [p for p in network.head.parameters() if p.ndim != 4]
    assert {rates[p] for p in convolutions} == {shared.muon_lr}
    assert {rates[p] for p in rest} == {settings.head_lr}
    assert {rates[p] for p in network.backbone.parameters()} == {settings.backbone_lr}
    assert settings.backbone_lr < settings.head_lr


@pytest.mark.parametrize("mode", ["frozen", "finetuned"])
def test_training_learns(params, stripes, mode):
    params = params.changed({"train": {"finetuned": {"initial_scale": 1.0}}})
    _, _, logged = run(mode, params, stripes, epochs=12)
    assert logged[-1][1]["train_accuracy"] > 0.5  # chance is 0.1
    assert logged[-1][1]["train_loss"] < logged[0][1]["train_loss"]


@pytest.mark.parametrize("mode", ["frozen", "finetuned"])
def test_the_seed_alone_decides_the_result(params, stripes, mode):
    first, again, other = (
        run(mode, params.changed({"seed": seed}), stripes)[0].state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["head.0.0.weight"], other["head.0.0.weight"])


def test_without_room_for_cached_features_they_are_computed_anew(params, stripes, monkeypatch):
    backbone = build(params.model, 10).backbone
    freeze(backbone)
    shapes = []
    for room in (batches.CACHE_BYTES, 0):
        monkeypatch.setattr(batches, "CACHE_BYTES", room)
        epoch = list(batches.cached_features(backbone, stripes, params)(0))
        assert all(x.dtype == torch.float32 for x, _ in epoch)
        shapes.append([x.shape for x, _ in epoch])
        assert len(run("frozen", params, stripes, epochs=1)[2]) == 1
    assert shapes[0] == shapes[1]


def test_cached_features_are_what_the_backbone_extracts(params, stripes):
    params = params.changed({"train": {"shared": {"batch_size": len(stripes.labels)}}})
    backbone = build(params.model, 10).backbone
    freeze(backbone)
    [(features, labels)] = batches.cached_features(backbone, stripes, params)(0)
    order = batches.shuffled_batches(340, params, batches.random_stream(params.seed, 0, 0, 0))[0]
    images = batches.augment(
        stripes.images, torch.arange(256), params.train.shared.max_shift,
        batches.random_stream(params.seed, 1, 0, 0),
    )  # fmt: skip
    wanted = backbone(to_input(images, params.model.image_size))
    place = {int(i): n for n, i in enumerate(order)}
    got = features[[place[i] for i in range(256)]]
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)  # float16 in between
    assert (labels == stripes.labels[order]).all()


@pytest.mark.parametrize(
    ("count", "sizes", "most"),
    [
        (103, [10] * 10, 1),  # each image once, but three
        (25, [10] * 7, 3),  # few images are passed over again
        (4, [4] * 7, 7),  # fewer than a batch
    ],
)
def test_an_epoch_has_each_image_equally_often(params, count, sizes, most):
    shared = {"batch_size": 10, "min_steps": 7}
    changed = params.changed({"train": {"shared": shared}})
    drawn = batches.shuffled_batches(count, changed, torch.Generator().manual_seed(0))
    assert [len(batch) for batch in drawn] == sizes
    times = torch.cat(drawn).bincount(minlength=count)
    assert times.max() == most
    assert times.max() - times.min() <= 1


@pytest.mark.parametrize("mode", ["frozen", "finetuned"])
def test_training_on_fewer_images_than_a_batch(params, stripes, mode):
    params = params.changed({"train": {"shared": {"batch_size": 4096, "min_steps": 10}}})
    _, _, logged = run(mode, params, stripes, epochs=4)
    assert logged[-1][1]["train_loss"] < logged[0][1]["train_loss"]


def test_images_grow_to_their_full_size(params):
    sizes = [batches.image_size_in(epoch, "finetuned", params) for epoch in range(6)]
    assert sizes == [16, 16, 16, 32, 32, 32]
    large = params.changed({"model": {"image_size": 100}})
    sizes = [batches.image_size_in(epoch, "finetuned", large) for epoch in range(6)]
    assert sizes == [48, 64, 64, 80, 96, 100]
    assert [batches.image_size_in(epoch, "frozen", large) for epoch in range(3)] == [100] * 3


def test_bf16_changes_nothing_on_the_cpu(params, stripes):
    one, other = (
        run("finetuned", params.changed({"train": {"bf16": bf16}}), stripes, epochs=1)[0]
        for bf16 in (True, False)
    )
    assert not any(changes_in(one, other.state_dict()).values())


@pytest.mark.parametrize("warm_up", [0.0, 0.2, 1.0])
def test_the_learning_rate_rises_then_falls(warm_up):
    shares = [slanted_triangle(step, 100, warm_up) for step in range(100)]
    peak = shares.index(max(shares))
    assert max(shares) == 1.0
    assert peak == max(0, 100 * warm_up - 1)
    assert shares[:peak] == sorted(shares[:peak])
    assert shares[peak:] == sorted(shares[peak:], reverse=True)
    assert min(shares) > 0


@pytest.mark.parametrize("shape", [(128, 360), (300, 20), (5, 5)])
def test_an_orthogonalised_matrix_has_singular_values_near_1(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    before, after = (torch.linalg.svdvals(m) for m in (matrix, orthogonalise(matrix, steps=8)))
    assert before.max() > 2  # far from 1
    assert ((after > 0.6) & (after < 1.3)).all()
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(
        orthogonalise(matrix, steps=8).flatten(), (u @ v).flatten(), dim=0
    ) > 0.95  # fmt: skip


def test_the_temperature_of_over_and_under_confident_logits():
    draw = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, 5, generator=draw)
    labels = torch.multinomial(logits.softmax(1), 1, generator=draw).flatten()
    for factor in (0.2, 1.0, 3.0):
        assert fit_temperature(factor * logits, labels) == pytest.approx(factor, rel=0.05)


def test_calibration_keeps_the_predictions_and_lowers_the_loss(params, stripes):
    network = run("finetuned", params, stripes, epochs=4)[0]
    with torch.no_grad():
        network.head[-1].weight *= 20  # far too confident
    before = predict(network, stripes.images, 32)
    temperature = calibrate(network, stripes, 32)
    after = predict(network, stripes.images, 32)
    assert temperature > 1
    assert torch.equal(before.argmax(1), after.argmax(1))
    loss = torch.nn.functional.cross_entropy
    assert loss(after, stripes.labels) < loss(before, stripes.labels)
    torch.testing.assert_close(after, before / temperature, rtol=1e-3, atol=1e-3)


class TestRefusals:
    def test_a_single_image(self, params, stripes):
        network = build(params.model, 10)
        one = stripes.take(torch.arange(1))
        message = refusal(lambda: train(network, "frozen", one, one, params, CPU, print))
        assert message == (
            "train.shared.images = None: each of the 1 processes needs two training images or "
            "more; there are 1"
        )

    def test_the_largest_shift(self, params, stripes):
        changed = params.changed({"train": {"shared": {"max_shift": 31}}})
        assert run("frozen", changed, stripes, epochs=1)[2]

    def test_a_shift_by_more_than_the_image(self, params):
        params = params.changed({"train": {"shared": {"max_shift": 16, "batch_size": 4}}})
        tiny = Split(torch.zeros(8, 16, 16, 3, dtype=torch.uint8), torch.arange(8))
        network = build(params.model, 10)
        start = functools.partial(train, network, "frozen", tiny, tiny, params, CPU, print)
        message = refusal(start)
        assert "train.shared.max_shift = 16: the images have only 16 pixels" in message

    @pytest.mark.parametrize("mode", ["frozen", "finetuned"])
    def test_a_loss_that_is_not_finite(self, params, stripes, mode):
        network = build(params.model, 10)
        with torch.no_grad():
            network.head[-1].bias.fill_(float("inf"))
        message = refusal(lambda: run(mode, params, stripes, network))
        assert message.startswith(f"{mode} epoch 1/6, step 1: the loss is nan at learning rates 0.")

    def test_a_learning_rate_that_is_too_high(self, params, stripes):
        network = build(params.model, 10)
        with torch.no_grad():
            network.head[-1].weight *= 1e38
        message = refusal(lambda: run("frozen", params, stripes, network, head_lr=1.0))
        assert "the loss is" in message

    def test_dead_units(self, params, stripes):
        network = build(params.model, 10)
        network.head = nn.Sequential(
            nn.Flatten(), nn.Linear(160, 8), nn.ReLU(), nn.Linear(8, 10)
        )  # fmt: skip
        with torch.no_grad():
            network.head[1].bias.fill_(-1e6)
        message = refusal(lambda: run("frozen", params, stripes, network))
        assert re.match(r"frozen epoch 1/6: outputs \[0, 1, .* are dead units", message)

    def test_a_frozen_backbone_that_changed(self, params, stripes):
        class Restless(nn.Module):
            """Changes with every image, in eval mode, too."""

            def __init__(self):
                super().__init__()
                self.register_buffer("count", torch.zeros(1))

            def forward(self, x):
                self.count += 1
                return x

        network = build(params.model, 10)
        network.backbone.add_module("restless", Restless())
        assert "backbone has changed" in refusal(lambda: run("frozen", params, stripes, network))

    @pytest.mark.parametrize("free", [10**7, 10**9])
    def test_what_cannot_fit_into_memory(self, params, stripes, monkeypatch, free):
        monkeypatch.setattr(checks, "free_memory", lambda: free)
        large = {"train": {"shared": {"batch_size": 300}}, "model": {"image_size": 112}}
        params = params.changed(large)
        message = refusal(lambda: run("finetuned", params, stripes))
        words = "train.shared.batch_size = 300, model.image_size = 112: a step needs about"
        assert words in message

    @pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
    @pytest.mark.parametrize("device", ["cuda", "mps", "xpu"])
    def test_a_device_that_torch_does_not_find(self, device):
        message = refusal(lambda: choose_device(device, 1))
        reason = r" \(.+\)" if device == "cuda" else ""  # no driver, or a build without CUDA
        words = rf"train\.device = '{device}': torch finds no accelerator{reason}; use auto or cpu"
        assert re.fullmatch(words, message)

    def test_a_share_too_small_for_each_class_is_refused_before_training(self, project):
        set_params(project, {"train": {"shared": {"validation_share": 0.01}}})
        output = dvc(project, "repro", "train@frozen", fails=True)
        assert "error: train.shared.validation_share = 0.01: draws 4 of 400 images" in output
        assert "Traceback" not in output
