"""Random parts of a data set: stratified ones, and few images, balanced over the classes."""

import re

import pytest
import torch
from helpers import refusal

from transfer.common.dataset import balanced, stratified

UNEQUAL = torch.arange(4).repeat_interleave(torch.tensor([1000, 100, 10, 2]))


def draw(labels: torch.Tensor, share: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    names = [f"class {number}" for number in range(int(labels.max()) + 1)]
    return stratified(labels, share, names, seed, "share")


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
        assert rest.tolist() == sorted(rest.tolist())
        counts = labels[drawn].bincount(minlength=classes)
        assert 1 <= counts.min() <= counts.max() <= counts.min() + 1
        assert labels[rest].bincount(minlength=classes).min() >= 1


def test_classes_of_different_size_keep_their_proportions():
    assert UNEQUAL[draw(UNEQUAL, 0.1)[1]].bincount().tolist() == [99, 10, 1, 1]


def test_the_seed_decides_which_images_are_drawn_and_in_which_order():
    labels = torch.arange(10).repeat(10)
    first, again, other = (draw(labels, 0.3, seed)[1].tolist() for seed in (3, 3, 4))
    assert first == again
    assert sorted(first) != sorted(other)
    assert first != sorted(first)


@pytest.mark.parametrize(
    ("labels", "share", "words"),
    [
        (torch.arange(10).repeat(10), 0.05, "share = 0.05: draws 5 of 100 images; .* 10 classes"),
        (torch.arange(10).repeat(10), 0.99, "share = 0.99: draws 99 of 100 .* take 0.1 to 0.9"),
        (torch.arange(7).repeat(3), 0.2, "share = 0.2: draws 4 of 21 .* take 0.334 to 0.666"),
        (torch.tensor([0, 0, 0, 1]), 0.5, "share = 0.5: needs 2 images or more of class 1$"),
    ],
)
def test_what_cannot_be_drawn_is_refused_with_what_can(labels, share, words):
    message = refusal(lambda: draw(labels, share))
    assert re.match(words, message), message
    for number in re.findall("take (.*) to (.*)", message):
        for advised in map(float, number):
            draw(labels, advised)


def test_few_images_are_balanced_and_more_include_them():
    some = torch.randperm(len(UNEQUAL), generator=torch.Generator().manual_seed(0))[:1100]
    index = torch.cat([some, (UNEQUAL >= 2).nonzero().flatten()]).unique()
    available, before = UNEQUAL[index].bincount().tolist(), set()
    for count in (4, 8, 40, 400, len(index)):
        drawn = balanced(UNEQUAL, index, count, 0, "images").tolist()
        assert drawn == sorted(set(drawn))
        assert len(drawn) == count
        assert before <= set(drawn) <= set(index.tolist())
        before = set(drawn)
        counts = UNEQUAL[drawn].bincount().tolist()
        assert all(n == a or n >= max(counts) - 1 for n, a in zip(counts, available, strict=True))
    first, other = (balanced(UNEQUAL, index, 40, seed, "images").tolist() for seed in (0, 1))
    assert first != other


@pytest.mark.parametrize("count", [3, 41])
def test_images_that_are_not_there_are_refused(count):
    message = refusal(lambda: balanced(torch.arange(4).repeat(10), torch.arange(40), count, 0, "i"))
    words = "must be at least 4, one of each class, and at most 40, the training images without"
    assert message.startswith(f"i = {count}: {words}")
