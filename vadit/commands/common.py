"""What several commands share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from vadit.config import ImageDataSpec
from vadit.runtime.errors import UsageError

if TYPE_CHECKING:
    import torch

    from vadit.models.autoencoder import Autoencoder

Device = Literal["auto", "cuda", "cpu"]
Arithmetic = Literal["auto", "fp32", "tf32", "bf16"]


def load_tokenizer(path: str, device: torch.device) -> Autoencoder:
    """The autoencoder of a run or an exported folder, for use and not for training."""
    from vadit.train.checkpoint.export import load_autoencoder

    return load_autoencoder(path).to(device).eval().requires_grad_(False)


def image_size(autoencoder: Autoencoder, size: int | None) -> int:
    """The side that images are cropped to: `size` where it fits the tokenizer, by default its training size."""
    spec = autoencoder.spec
    size = spec.image_size if size is None else size
    if size % spec.downsample_ratio:
        raise UsageError(
            f"--image-size {size} is not a multiple of the tokenizer's downsample ratio {spec.downsample_ratio}; "
            f"set it to {max(round(size / spec.downsample_ratio), 1) * spec.downsample_ratio}"
        )
    return size


def image_data(options: Any) -> ImageDataSpec:
    """The images of a command, by its settings of those names."""
    names = ("labels_file", "on_error", "max_bad_share", "alpha", "exif")
    return ImageDataSpec(options.images, **{name: getattr(options, name) for name in names if hasattr(options, name)})


@contextlib.contextmanager
def processes(choice: str) -> Iterator[Any]:
    """The device of this process, its kernels tried out; under a launcher, inside a process group."""
    from vadit.runtime import choices, distributed

    device = distributed.device(choice)
    for kernel in choices.kernels(device):
        choices.report(kernel)
    if distributed.world_size() == 1:
        yield device
        return
    from vadit.train import engine

    engine.start(device)
    distributed.set_collective_timeout(0)  # rank 0 may read all latents for their statistics while the others wait
    try:
        yield device
    finally:
        engine.finish()
