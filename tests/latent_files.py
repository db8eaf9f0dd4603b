"""Small latent folders for the tests: the authors' layout and ours."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from vadit.config import AutoencoderSpec
from vadit.images.loader import ImageSet, Request
from vadit.images.pillow import decode
from vadit.images.pixels import to_signed
from vadit.images.sources.folders import FolderSource
from vadit.latents.shards import LatentSettings, LatentShardWriter, save_index
from vadit.latents.statistics import compute_statistics

CHANNELS, SIDE, CLASSES = 4, 3, 5
COUNTS = (7, 5, 1)
IMAGE_SIDE, NUM_IMAGES = 16, 11
TOKENIZER = AutoencoderSpec(
    image_size=IMAGE_SIDE,
    latent_channels=3,
    base_channels=8,
    channel_multipliers=(1, 2, 2),
    num_res_blocks=1,
    attention_resolutions=(),
    norm_groups=4,
)


def write_images(folder: Path, *, classes: int = 2, **options: Any) -> ImageSet:
    """Image i, of noise, is of class i % classes."""
    for number in range(NUM_IMAGES):
        path = folder / f"class{number % classes}" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (20, 18, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return ImageSet(FolderSource(folder), IMAGE_SIDE, **options)


def signed_pixels(images: ImageSet) -> Tensor:
    """All images, (N, 3, H, W) in [-1, 1]."""
    pixels = np.stack([decode(images, Request(index)) for index in range(len(images))])
    return to_signed(torch.from_numpy(pixels).permute(0, 3, 1, 2))


def reference_folder(folder: Path, *, dtype: torch.dtype = torch.float32, stats: bool = True) -> tuple[Tensor, ...]:
    """A folder as the authors' extraction script leaves it; all its latents, mirrored latents and labels."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    parts = []
    for number, count in enumerate(COUNTS):
        shape = (count, CHANNELS, SIDE, SIDE)
        latents = (torch.randn(shape, generator=generator) * 3 + 1000).to(dtype)
        flipped = (torch.randn(shape, generator=generator) - 2).to(dtype)
        labels = torch.randint(0, CLASSES, (count,), generator=generator)
        labels[0] = CLASSES - 1
        save_file(
            {"latents": latents, "latents_flip": flipped, "labels": labels},
            folder / f"latents_rank{number % 2:02d}_shard{number // 2:03d}.safetensors",
            metadata={"total_size": str(count), "dtype": str(dtype), "device": "cpu"},
        )
        parts.append((latents, flipped, labels))
    order = [0, 2, 1]  # file names sort rank first
    whole = tuple(torch.cat([parts[number][part] for number in order]) for part in range(3))
    if stats:
        mean, std = torch.rand(1, CHANNELS, 1, 1), torch.rand(1, CHANNELS, 1, 1) + 0.5
        torch.save({"mean": mean, "std": std}, folder / "latents_stats.pt")
        return (*whole, mean, std)
    return whole


def settings(**changes: object) -> LatentSettings:
    values: dict = {"tokenizer": "abc", "config": {}, "source": "images", "num_images": 6, "num_classes": CLASSES}
    values |= {"size": 8, "store": "moments", "dtype": "fp32", "flip": True, "seed": 0, "shard_size": 4}
    return LatentSettings(**(values | changes))


def moments_folder(
    folder: Path, dtype: str = "fp32", *, channels: int = CHANNELS, classes: int = CLASSES
) -> tuple[Tensor, Tensor]:
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    plain, flipped = (torch.rand((6, 2 * channels, SIDE, SIDE), generator=generator) + number for number in (0, 10))
    for number, rows in enumerate((slice(0, 4), slice(4, 6))):
        writer = LatentShardWriter(folder / f"shard-{number:05d}.safetensors", settings(dtype=dtype))
        ids = torch.arange(6)[rows]
        whole = {"moments": plain[rows], "moments_flip": flipped[rows], "labels": ids % 3, "ids": ids}
        for part in (slice(1), slice(1, None)):
            writer.add({name: tensor[part] for name, tensor in whole.items()})
        writer.close()
    compute_statistics(folder)
    save_index(folder, settings(dtype=dtype), [str(label) for label in range(classes)])
    return plain, flipped


def rewrite_header(path: Path, old: str, new: str) -> None:
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    text = data[8:end].decode().rstrip().replace(old, new)
    assert text != data[8:end].decode().rstrip()
    text += " " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + data[end:])
