"""From images to logits: the device, the input of a network, and prediction without gradients."""

import ctypes
import sys

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import resize
from tqdm import tqdm

from transfer.common.errors import InputError
from transfer.model import Network

CHUNK = 256  # images of 128 pixels a side in one forward pass without gradients


def set_up_torch(device: str, threads: int) -> torch.device:
    """The device that `device` names; fixes what results and speed depend on besides the code.

    Floating-point sums depend on the number of threads, so the machine does not choose it. Raises
    InputError when torch does not find the device.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    if device not in ("auto", "cpu") and (found is None or found.type != device):
        has = found.type if found else "no accelerator"
        if device == "cuda" and not found:
            try:
                torch.cuda.init()
            except (RuntimeError, AssertionError) as error:  # no driver, too old, no CUDA in torch
                has += f" ({str(error).splitlines()[0].split('. ')[0]})"
        raise InputError(f"train.device = {device!r}: torch finds {has}; use auto or cpu")
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False  # its 10 bits are too few to check a folded backbone
    if sys.platform == "linux":
        # glibc gives large blocks back to the system at once and clears them anew for the next
        # step. Keeping them (M_MMAP_THRESHOLD -3, M_TRIM_THRESHOLD -1, mallopt(3)) makes a step
        # about twice as fast; musl has no mallopt.
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)
        mallopt(-3, 2**30)
        mallopt(-1, 2**31 - 1)
    return torch.device("cpu") if device == "cpu" or found is None else torch.device(found.type)


def to_input(images: Tensor, size: int, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 NHWC -> what a backbone takes: float32 NCHW, `size` pixels a side, channels last.

    Scaled bilinearly (with antialiasing when it shrinks) and rounded to uint8, as PIL does, which
    is several times as fast as in float32; then normalised with `mean` and `std`, float32 (3,), of
    the channels on a scale of 0 to 1.
    """
    scaled = resize(images.permute(0, 3, 1, 2), [size, size])
    mean, std = (255 * value.view(1, 3, 1, 1) for value in (mean, std))
    return torch.addcmul(-mean / std, scaled, 1 / std)  # (scaled - mean) / std, in one pass


def autocast(device: torch.device, bf16: bool) -> torch.autocast:
    """bfloat16 where it is wanted and autocast considers it safe; the CPU always has float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16 and device.type != "cpu")


def chunk_size(image_size: int) -> int:
    """How many images go through at a time where there is no gradient: it bounds memory."""
    return max(1, CHUNK * 128**2 // max(image_size, 128) ** 2)


def predict(network: Network, images: Tensor, image_size: int) -> Tensor:
    """Logits, float32 (N, classes) on the CPU, for uint8 NHWC `images`; no augmentation."""
    mean, std = network.mean, network.std
    network.eval()
    with torch.inference_mode():
        chunks = tqdm(images.split(chunk_size(image_size)), "predict", leave=False, disable=None)
        return torch.cat(
            [
                network(to_input(chunk.to(mean.device), image_size, mean, std)).cpu()
                for chunk in chunks
            ]
        )
