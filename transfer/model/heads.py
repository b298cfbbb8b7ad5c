"""The new heads: a feature map (N, C, h, w) -> logits (N, classes)."""

import torch
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation


class Residual(nn.Module):
    """Two 3x3 convolutions and a skip connection (He et al. 2015): NCHW -> the same shape."""

    def __init__(self, channels: int):
        super().__init__()
        self.convolutions = nn.Sequential(
            Conv2dNormActivation(channels, channels), Conv2dNormActivation(channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.convolutions(x)


class MeanAndMax(nn.Module):
    """Pool a feature map to each channel's mean and maximum: (N, C, h, w) -> (N, 2C)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1)


def linear_head(channels: int, classes: int, width: int) -> nn.Sequential:
    """The classical new last layer: global mean, then one linear layer. `width` is not used."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def conv_head(channels: int, classes: int, width: int) -> nn.Sequential:
    """Convolutions on the feature map, `width` channels, before it is pooled."""
    return nn.Sequential(
        Conv2dNormActivation(channels, width),
        Residual(width),
        MeanAndMax(),
        nn.Linear(2 * width, classes),
    )


HEADS = {"linear": linear_head, "conv": conv_head}
