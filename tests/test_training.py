import pytest
import torch

from tools import synthetic
from transfer import data, model, training
from transfer.errors import InputError


def run(mode, settings, batches, seed=0, **changes):
    """Train a small model; returns the network, its first state dict and what was logged."""
    part = getattr(settings.train, mode).model_copy(update=changes)
    settings = settings.model_copy(
        update={"train": settings.train.model_copy(update={mode: part}), "seed": seed}
    )
    rest, held = data.hold_out(data.read_cifar10(str(batches))[0]["train"], 20, seed=0)
    torch.manual_seed(0)
    network = model.build(settings.model, 10)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    logged = []
    device = training.set_up("cpu", 1)
    training.train(network, mode, rest, held, settings, device, lambda *row: logged.append(row))
    return network, before, logged


@pytest.fixture(scope="module")
def stripes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "stripes"
    synthetic.write(folder, 340, 20)
    return folder


def changes_in(network, before):
    return {key: not torch.equal(value, before[key]) for key, value in network.state_dict().items()}


def test_frozen_leaves_the_backbone_bit_for_bit_and_teaches_the_head(settings, stripes):
    network, before, logged = run("frozen", settings, stripes, epochs=2)
    changed = changes_in(network, before)
    assert any("running_mean" in key for key in changed if key.startswith("backbone."))
    assert not any(changed[key] for key in changed if key.startswith("backbone."))
    assert all(changed[key] for key in changed if key.startswith("head."))
    assert [epoch for epoch, _ in logged] == [1, 2]


def test_finetuned_teaches_both_and_moves_batchnorm(settings, stripes):
    network, before, _ = run("finetuned", settings, stripes, epochs=2)
    assert all(changes_in(network, before).values())


def test_the_backbone_learns_at_its_own_lower_rate(settings, stripes):
    network = model.build(settings.model, 10)
    optimizer = training.optimizer_for(network, "finetuned", settings)
    rates = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            rates[parameter] = group["lr"]
    finetuned = settings.train.finetuned
    assert {rates[p] for p in network.head.parameters()} == {finetuned.head_lr}
    assert {rates[p] for p in network.backbone.parameters()} == {finetuned.backbone_lr}
    assert finetuned.backbone_lr < finetuned.head_lr


@pytest.mark.parametrize(("mode", "changes"), [("frozen", {}), ("finetuned", {"first_size": 1.0})])
def test_training_learns(settings, stripes, mode, changes):
    _, _, logged = run(mode, settings, stripes, epochs=12, **changes)
    assert logged[-1][1]["train_accuracy"] > 0.5  # chance is 0.1
    assert logged[-1][1]["train_loss"] < logged[0][1]["train_loss"]


@pytest.mark.parametrize("mode", ["frozen", "finetuned"])
def test_the_seed_alone_decides_the_result(settings, stripes, mode):
    first, again, other = (run(mode, settings, stripes, s)[0].state_dict() for s in (0, 0, 1))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["head.0.0.weight"], other["head.0.0.weight"])


def test_without_room_for_cached_views_the_features_are_computed_anew(
    settings, stripes, monkeypatch
):
    split = data.read_cifar10(str(stripes))[0]["train"]
    backbone = model.build(settings.model, 10).backbone
    model.freeze(backbone)
    shapes = []
    for room in (training.CACHE_BYTES, 0):
        monkeypatch.setattr(training, "CACHE_BYTES", room)
        batches = list(training.cached_views(backbone, split, settings)(0))
        assert all(x.dtype == torch.float32 for x, _ in batches)
        shapes.append([x.shape for x, _ in batches])
    assert shapes[0] == shapes[1]


def test_a_cached_view_is_what_the_backbone_says(settings, stripes, monkeypatch):
    split = data.read_cifar10(str(stripes))[0]["train"]
    settings = settings.model_copy(
        update={"train": settings.train.model_copy(update={"batch_size": len(split.labels)})}
    )
    backbone = model.build(settings.model, 10).backbone
    model.freeze(backbone)
    [(features, labels)] = training.cached_views(backbone, split, settings)(0)
    order = data.shuffled_batches(340, 340, training.generator(settings.seed, 0, 0))[0]
    pictures = data.augment(
        split.images,
        torch.arange(256),
        settings.train.crop,
        training.generator(settings.seed, 1, 0),
    )
    wanted = backbone(data.to_input(pictures, settings.model.image_size))
    place = {int(i): n for n, i in enumerate(order)}
    got = features[[place[i] for i in range(256)]]
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)  # float16 in between
    assert (labels == split.labels[order]).all()


def test_more_pictures_a_batch_than_there_are_is_refused(settings, stripes):
    train = settings.train.model_copy(update={"batch_size": 321})
    with pytest.raises(InputError, match=r"train\.batch_size = 321.*only 320 training images"):
        run("frozen", settings.model_copy(update={"train": train}), stripes)


def test_a_shift_by_more_than_the_picture_is_refused(settings):
    train = settings.train.model_copy(update={"crop": 16, "batch_size": 4})
    settings = settings.model_copy(update={"train": train})
    tiny = data.Split(torch.zeros(8, 16, 16, 3, dtype=torch.uint8), torch.arange(8))
    network = model.build(settings.model, 10)
    with pytest.raises(InputError, match=r"train\.crop = 16: .* 16 pixels"):
        training.train(network, "frozen", tiny, tiny, settings, torch.device("cpu"), None)


def test_pictures_grow_to_their_full_size(settings):
    sizes = [training.picture_size(settings, "finetuned", epoch) for epoch in range(6)]
    assert sizes == [16, 16, 16, 32, 32, 32]
    large = settings.model_copy(
        update={"model": settings.model.model_copy(update={"image_size": 100})}
    )
    sizes = [training.picture_size(large, "finetuned", epoch) for epoch in range(6)]
    assert sizes == [48, 64, 64, 80, 96, 100]
    assert [training.picture_size(large, "frozen", epoch) for epoch in range(3)] == [100] * 3


def test_bf16_changes_nothing_on_the_cpu(settings, stripes):
    states = []
    for bf16 in (True, False):
        train = settings.train.model_copy(update={"bf16": bf16})
        changed = settings.model_copy(update={"train": train})
        states.append(run("finetuned", changed, stripes, epochs=1)[0].state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_the_learning_rate_climbs_then_falls():
    shares = [training.slanted_triangle(step, 100) for step in range(100)]
    peak = shares.index(max(shares))
    assert max(shares) == 1.0
    assert peak == 19
    assert shares[:peak] == sorted(shares[:peak])
    assert shares[peak:] == sorted(shares[peak:], reverse=True)
    assert 0 < shares[0] <= 0.05
    assert 0 < shares[-1] <= 0.02


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused():
    with pytest.raises(InputError, match=r"train\.device"):
        training.set_up("cuda", 1)
