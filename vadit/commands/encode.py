"""vadit encode: images to latents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vadit.arguments import parse
from vadit.commands.common import Device, image_size, load_tokenizer, processes, tell
from vadit.config import ImageDataSpec
from vadit.errors import UsageError


@dataclass(frozen=True)
class EncodeOptions:
    """Encode a folder of images to latent shards with their statistics; the same command continues."""

    tokenizer: str = ""
    """Tokenizer: a run folder, or one from `vadit export` or `vadit import`."""
    images: str = ""
    """Folder of images: one subfolder per class, or flat."""
    out: str = ""
    """Folder for the latents."""
    image_size: int | None = None
    """Side that images are cropped to, in pixels; default: the tokenizer's training size."""
    batch_size: int = 64
    """Images per forward pass and process."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Number format of the stored latents."""
    store: Literal["moments", "sample"] = "moments"
    """moments: mean and deviation, sampled anew each epoch; sample: one posterior sample, as the authors' files."""
    flip: bool = True
    """Store the mirrored images, too."""
    seed: int = 0
    """Seed of the posterior samples (--store sample)."""
    shard_size: int = 10_000
    """Images per file."""
    num_workers: int = ImageDataSpec.num_workers
    """Decoding threads per process."""
    on_error: Literal["raise", "skip"] = ImageDataSpec.on_error
    """What to do with an image that does not decode: stop and name it, or leave it out and count it."""
    device: Device = "auto"
    """Device of the tokenizer."""
    stats_only: str | None = None
    """Only compute the statistics of this folder of latents."""


def run(arguments: list[str]) -> None:
    """Encode, or compute statistics alone."""
    options = parse(EncodeOptions, arguments, command="encode")
    if options.stats_only is not None:
        from vadit.data.latents import compute_statistics

        statistics = compute_statistics(options.stats_only)
        print(f"{options.stats_only}/latents_stats.pt: {statistics.mean.numel()} channels")
        return
    for name in ("tokenizer", "images", "out"):
        if not getattr(options, name):
            raise UsageError(f"vadit encode needs --{name}; `vadit encode --help` explains")
    from vadit.data.images_torch import ImageFolder
    from vadit.encode import encode
    from vadit.metrics import ProgressBar

    with processes(options.device) as device:
        autoencoder = load_tokenizer(options.tokenizer, device)
        size = image_size(autoencoder, options.image_size)
        images = ImageFolder(options.images, size, crop="center", flip=False, on_error=options.on_error)
        with ProgressBar("encode", len(images)) as bar:
            summary = encode(
                autoencoder,
                images,
                options.out,
                batch_size=options.batch_size,
                flip=options.flip,
                dtype=options.dtype,
                store=options.store,
                seed=options.seed,
                shard_size=options.shard_size,
                num_workers=options.num_workers,
                progress=bar.update,
            )
    tell(f"{options.out}: {summary.num_images:,} images encoded here, {summary.images_per_s:,.1f} images/s")
