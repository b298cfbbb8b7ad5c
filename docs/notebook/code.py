# %% setup
import copy
import os
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import CIFAR10
from torchvision.models import MobileNet_V3_Small_Weights, mobilenet_v3_small, resnet18
from torchvision.transforms import v2

IMAGES, SIZE, EPOCHS = 5000, 64, 8
ASSETS = os.environ.get("ASSETS_DIR")  # a folder with the data and the weights, without internet
torch.manual_seed(0)
print("torch", torch.__version__, "torchvision", torchvision.__version__)

# %% load
weights = MobileNet_V3_Small_Weights.IMAGENET1K_V1
model = mobilenet_v3_small(weights=None if ASSETS else weights)
if ASSETS:
    state = torch.load(Path(ASSETS, "mobilenet_v3_small-IMAGENET1K_V1-features.pth"))
    model.load_state_dict(state, strict=False)


def count(module, trainable=False):
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)


for name, child in model.named_children():
    print(f"{name:12} {type(child).__name__:20} {count(child):>10,} parameters")
print("last layer:", model.classifier[-1])

# %% blocks
x = torch.zeros(1, 3, SIZE, SIZE)
model.eval()
for number, block in enumerate(model.features):
    x = block(x)
    shape = " x ".join(map(str, x.shape[1:]))
    print(f"features[{number}] {type(block).__name__:22} {shape:14} {count(block):>8,}")

# %% resnet
resnet = resnet18(weights=None if ASSETS else "IMAGENET1K_V1")
resnet.requires_grad_(False)
resnet.fc = nn.Linear(resnet.fc.in_features, 2)
print(f"{count(resnet, trainable=True):,} of {count(resnet):,} parameters are trained")

# %% network
backbone = model.features[:5]
head = nn.Sequential(
    nn.Conv2d(40, 128, kernel_size=3, padding=1),
    nn.BatchNorm2d(128),
    nn.ReLU(),
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
    nn.Linear(128, 10),
)
frozen = nn.Sequential(backbone, head)
print(tuple(frozen(torch.zeros(2, 3, SIZE, SIZE)).shape))

# %% data
normalise = v2.Normalize(weights.transforms().mean, weights.transforms().std)
to_input = [v2.ToImage(), v2.Resize(SIZE), v2.ToDtype(torch.float32, scale=True), normalise]
augment = [v2.RandomCrop(32, padding=4, padding_mode="reflect"), v2.RandomHorizontalFlip()]
root = ASSETS or Path(torch.hub.get_dir(), "datasets")


def cifar10(train, transforms):
    return CIFAR10(root, train, v2.Compose(transforms), download=not ASSETS)


test_set = cifar10(False, to_input)
training = Subset(cifar10(True, [*augment, *to_input]), range(IMAGES))
validation = Subset(cifar10(True, to_input), range(IMAGES, IMAGES + IMAGES // 5))
batches = DataLoader(training, 64, shuffle=True, drop_last=True)
print(len(training), len(validation), len(test_set), test_set.classes)


# %% training
@torch.no_grad()
def predict(network, images):
    """Probabilities, float32 (N, 10), and labels, int64 (N,)."""
    network.eval()
    parts = [(network(x).softmax(1), y) for x, y in DataLoader(images, 256)]
    return tuple(map(torch.cat, zip(*parts, strict=True)))


def accuracy(probabilities, labels):
    return (probabilities.argmax(1) == labels).double().mean().item()


def train(network, head_lr, backbone_lr=None):
    backbone, head = network
    backbone.requires_grad_(backbone_lr is not None)
    groups = [{"params": head.parameters()}]
    rates = [head_lr]
    if backbone_lr:
        groups.append({"params": backbone.parameters()})
        rates.append(backbone_lr)
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, EPOCHS * len(batches))
    for epoch in range(EPOCHS):
        network.train()
        backbone.eval()  # otherwise BatchNorm's running statistics would change
        total = 0.0
        for x, y in batches:
            loss = F.cross_entropy(network(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        reached = accuracy(*predict(network, validation))
        print(f"epoch {epoch + 1}: loss {total / len(batches):.3f}, validation {reached:.1%}")


# %% frozen
train(frozen, head_lr=1e-2)

# %% finetuned
finetuned = copy.deepcopy(frozen)
train(finetuned, head_lr=2e-3, backbone_lr=1e-3)

# %% comparison
results = {}
for name, network in {"frozen": frozen, "finetuned": finetuned}.items():
    probabilities, labels = predict(network, test_set)
    results[name] = probabilities
    network.requires_grad_(True)
    print(f"{name:10} {accuracy(probabilities, labels):.2%}")
correct = {name: probabilities.argmax(1) == labels for name, probabilities in results.items()}
won = int((correct["finetuned"] & ~correct["frozen"]).sum())
lost = int((correct["frozen"] & ~correct["finetuned"]).sum())
print(f"{won} corrected, {lost} broken; gain {(won - lost) / len(labels):+.2%}")
print(f"standard error of the gain {(won + lost) ** 0.5 / len(labels):.2%}")

# %% batch
figure, axes = plt.subplots(2, 8, figsize=(14, 5))
for i, axis in enumerate(axes.flat):
    axis.imshow(test_set.data[i])
    axis.axis("off")
    lines = [test_set.classes[labels[i]]]
    for name, probabilities in results.items():
        share, label = probabilities[i].max(0)
        mark = "✓" if label == labels[i] else "✗"
        lines.append(f"{name}: {mark} {test_set.classes[label]} {share:.0%}")
    axis.set_title("\n".join(lines), fontsize=8, loc="left")
figure.tight_layout()
plt.show()
