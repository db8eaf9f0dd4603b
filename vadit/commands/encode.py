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
    """Images: a folder (one subfolder per class, or flat), a folder or pattern of .tar shards, or a .beton."""
    labels_file: str | None = None
    """File with a line "NAME LABEL" per image of a flat folder."""
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
    loader: Literal["torch", "dali", "auto"] = "torch"
    """Who decodes: Pillow (torch; the exact pixels of the crop rule), or DALI (about 40 dB from them)."""
    num_workers: int = ImageDataSpec.num_workers
    """Decoding threads per process."""
    on_error: Literal["raise", "skip"] = ImageDataSpec.on_error
    """What to do with an image that does not decode: stop and name it, or leave it out and count it."""
    max_bad_share: float = ImageDataSpec.max_bad_share
    """With --on-error skip: the share of bad images above which encoding stops all the same."""
    device: Device = "auto"
    """Device of the tokenizer."""
    stats_only: str | None = None
    """Only compute the statistics of this folder (or .beton) of latents."""
    stats_samples: int = 0
    """Statistics from so many random latents (the authors: 10,000), a function of --seed; 0: from all latents."""


def run(arguments: list[str]) -> None:
    """Encode, or compute statistics alone."""
    options = parse(EncodeOptions, arguments, command="encode")
    if options.stats_only is not None:
        from vadit.data.latent_statistics import compute_statistics, statistics_path

        statistics = compute_statistics(
            options.stats_only,
            samples=options.stats_samples,
            seed=options.seed,
            on_error=options.on_error,
            max_bad_share=options.max_bad_share,
        )
        print(f"{statistics_path(options.stats_only)}: {statistics.mean.numel()} channels")
        return
    for name in ("tokenizer", "images", "out"):
        if not getattr(options, name):
            raise UsageError(f"vadit encode needs --{name}; `vadit encode --help` explains")
    from vadit import choices
    from vadit.data.images import describe_classes
    from vadit.data.loaders import open_decoder, open_images
    from vadit.encode import encode
    from vadit.metrics import ProgressBar

    with processes(options.device) as device:
        autoencoder = load_tokenizer(options.tokenizer, device)
        size = image_size(autoencoder, options.image_size)
        spec = ImageDataSpec(
            path=options.images,
            labels_file=options.labels_file,
            on_error=options.on_error,
            max_bad_share=options.max_bad_share,
        )
        images = open_images(spec, size)
        decoder, chosen = open_decoder(options.loader, images, options.num_workers, device)
        choices.tell(chosen)
        tell(f"{len(images):,} images by {chosen.name}; {describe_classes(images.classes)}")
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
                decoder=decoder,
                stats_samples=options.stats_samples,
                progress=bar.update,
            )
    tell(f"{options.out}: {summary.num_images:,} images encoded here, {summary.images_per_s:,.1f} images/s")
