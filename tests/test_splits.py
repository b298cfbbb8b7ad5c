import re

import pytest
import torch
from helpers import refusal

from transfer.common.dataset import balanced, stratified


def names(count: int) -> list[str]:
    return [f"class {number}" for number in range(count)]


def draw(labels: torch.Tensor, share: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return stratified(labels, share, names(int(labels.max()) + 1), seed, "share")


@pytest.mark.parametrize(
    ("classes", "each", "share"),
    [(102, 10, 0.1), (37, 100, 0.05), (10, 5000, 0.04), (2, 2, 0.5), (5, 3, 0.6), (1000, 2, 0.5)],
)
def test_each_class_has_its_part_whatever_the_seed(classes, each, share):
    labels = torch.arange(classes).repeat(each)
    for seed in range(5):
        rest, drawn = draw(labels, share, seed)
        assert len(drawn) == round(share * len(labels))
        assert sorted([*rest.tolist(), *drawn.tolist()]) == list(range(len(labels)))
        counts = labels[drawn].bincount(minlength=classes)
        assert counts.max() - counts.min() <= 1
        assert counts.min() >= 1
        assert labels[rest].bincount(minlength=classes).min() >= 1


def test_classes_of_different_size_keep_their_proportions():
    labels = torch.cat([torch.full((n,), c) for c, n in enumerate((1000, 100, 10, 2))])
    drawn = labels[draw(labels, 0.1)[1]].bincount()
    assert drawn.sum() == 111
    assert drawn.tolist()[2:] == [1, 1]
    assert drawn[0] / drawn[1] == pytest.approx(10, rel=0.1)


def test_the_seed_decides_which_images_are_drawn():
    labels = torch.arange(10).repeat(10)
    first, again, other = (draw(labels, 0.3, seed)[1].tolist() for seed in (3, 3, 4))
    assert first == again != other
    assert first != sorted(first)


@pytest.mark.parametrize(
    ("classes", "each", "share", "words"),
    [
        (10, 10, 0.05, "share = 0.05: draws 5 of 100 images; .* 10 classes .* take 0.1 to 0.9"),
        (10, 10, 0.99, "draws 99 of 100"),
        (7, 3, 0.2, "draws 4 of 21 .* take 0.334 to 0.666"),
    ],
)
def test_what_cannot_be_drawn_is_refused_with_what_can(classes, each, share, words):
    labels = torch.arange(classes).repeat(each)

    message = refusal(lambda: draw(labels, share))
    assert re.search(words, message), message


def test_the_advice_of_the_refusal_can_be_followed():
    labels = torch.arange(7).repeat(3)
    for share in (0.334, 0.666):
        draw(labels, share)


def test_a_class_of_one_image_is_named():
    labels = torch.tensor([0, 0, 0, 1])
    assert "2 images or more of class 1" in refusal(lambda: draw(labels, 0.5))


def test_few_images_are_balanced_and_more_include_them():
    labels = torch.cat([torch.full((n,), c) for c, n in enumerate((1000, 100, 10, 2))])
    index = torch.randperm(len(labels))[:1100]
    index = torch.cat([index, (labels >= 2).nonzero().flatten()]).unique()
    before = set()
    for count in (4, 8, 40, 400, len(index)):
        drawn = balanced(labels, index, count, 0, "images")
        assert len(set(drawn.tolist())) == count
        assert set(drawn.tolist()) <= set(index.tolist())
        assert before <= set(drawn.tolist())
        before = set(drawn.tolist())
        per_class = labels[drawn].bincount().tolist()
        there = labels[index].bincount().tolist()
        assert all(n == t or n >= max(per_class) - 1 for n, t in zip(per_class, there, strict=True))
    assert not torch.equal(
        balanced(labels, index, 40, 0, "images"), balanced(labels, index, 40, 1, "images")
    )


@pytest.mark.parametrize("count", [3, 41])
def test_images_that_are_not_there_are_refused(count):
    labels = torch.arange(4).repeat(10)
    message = refusal(lambda: balanced(labels, torch.arange(40), count, 0, "images"))
    assert message.startswith(f"images = {count}: must be at least 4, one of each class, and at")
    assert "40 training images" in message
