"""Random parts of a data set: stratified ones, and few images, balanced over the classes."""

import pytest
import torch
from helpers import refusal

from transfer.common.dataset import balanced, stratified

UNEQUAL = torch.arange(4).repeat_interleave(torch.tensor([1000, 100, 10, 2]))


def draw(labels: torch.Tensor, share: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    names = [f"class {number}" for number in range(int(labels.max()) + 1)]
    return stratified(labels, share, names, seed, "share")


@pytest.mark.parametrize(
    ("sizes", "share", "quotas"),
    [
        ([5000] * 10, 0.04, [200] * 10),
        ([1000, 100, 10, 2], 0.1, [100, 10, 1, 1]),
        ([10] * 3, 0.01, [1] * 3),  # never none
        ([10] * 3, 0.99, [9] * 3),  # never all
        ([2, 3, 4, 5], 0.5, [1, 2, 2, 2]),
    ],
)
def test_each_class_has_its_rounded_share_whatever_the_seed(sizes, share, quotas):
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    for seed in range(3):
        rest, drawn = draw(labels, share, seed)
        assert sorted([*rest.tolist(), *drawn.tolist()]) == list(range(len(labels)))
        assert rest.tolist() == sorted(rest.tolist())
        assert labels[drawn].bincount().tolist() == quotas


def test_the_seed_decides_which_images_are_drawn_and_in_which_order():
    labels = torch.arange(10).repeat(10)
    first, again, other = (draw(labels, 0.3, seed)[1].tolist() for seed in (3, 3, 4))
    assert first == again
    assert sorted(first) != sorted(other)
    assert first != sorted(first)


def test_a_class_with_a_single_image_is_refused():
    message = refusal(lambda: draw(torch.tensor([0, 0, 0, 1]), 0.5))
    assert message == "share = 0.5: needs 2 images or more of class 1"


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
