"""Augmentation and the input of a network, against what torchvision makes of an image."""

import numpy as np
import pytest
import torch
from torchvision.transforms import Compose, Normalize, Resize, ToPILImage, ToTensor

from transfer.inference import to_input
from transfer.training.batches import augment


def test_augmentation_is_a_mirrored_shift_and_a_flip():
    images = torch.randint(0, 256, (500, 32, 32, 3), dtype=torch.uint8)
    index = torch.randperm(500)
    got = augment(images, index, 4, torch.Generator().manual_seed(0)).numpy()
    flips, shifts = 0, set()
    for image, original in zip(got, images[index].numpy(), strict=True):
        padded = np.pad(original, ((4, 4), (4, 4), (0, 0)), mode="reflect")
        found = [
            (dy, dx, flip)
            for dy in range(9)
            for dx in range(9)
            for flip in (False, True)
            if (padded[dy : dy + 32, dx : dx + 32][:, :: -1 if flip else 1] == image).all()
        ]
        assert len(found) == 1
        shifts.add(found[0][:2])
        flips += found[0][2]
    assert 200 < flips < 300
    assert len(shifts) == 81


def test_no_shift_leaves_images_whole():
    images = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8)
    got = augment(images, torch.arange(8), 0, torch.Generator().manual_seed(0))
    for image, original in zip(got, images, strict=True):
        assert (image == original).all() or (image == original.flip(1)).all()


@pytest.mark.parametrize("size", [16, 32, 96])
def test_the_input_is_what_torchvision_makes_of_an_image(size):
    images = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    as_notebooks_do = Compose(
        [
            ToPILImage(),
            Resize((size, size)),
            ToTensor(),
            Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    reference = torch.stack([as_notebooks_do(image.numpy()) for image in images])
    got = to_input(images, size)
    assert got.is_contiguous(memory_format=torch.channels_last)
    one_level = 1 / 255 / 0.224  # PIL may round the other way
    torch.testing.assert_close(got, reference, atol=1.01 * one_level, rtol=0)
    assert (got - reference).abs().mean() < 0.1 * one_level
