"""vadit encode: images to latents."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from vadit.commands.common import Arithmetic, Device, image_data, image_size, load_tokenizer, processes
from vadit.config import FoundationSpec, ImageDataSpec, PictureSpec
from vadit.config.ranges import Batch, Count, PathName, Range, Seed, Share, Side, Workers
from vadit.runtime.console import ProgressBar, say, say_once
from vadit.runtime.errors import UsageError
from vadit.runtime.files import check_output

if TYPE_CHECKING:
    import torch

    from vadit.models.foundation import FoundationModel

PIXELS_PER_FEATURE = 16
"""Side of an image over that of its grid of features: that of the tokens of f16 latents, and of f8 in patches of 2."""


@dataclass(frozen=True)
class EncodeOptions(PictureSpec):
    """Encode a folder of images to latent shards with their statistics; the same command continues."""

    tokenizer: PathName = ""
    """Tokenizer: a run folder, one from `vadit export` or `vadit import`, an AutoencoderKL of diffusers, or a file of
    the authors."""
    images: PathName = ""
    """Images: a folder (one subfolder per class, or flat), a folder or pattern of .tar shards, or a .beton."""
    labels_file: PathName | None = None  # File with a line "NAME LABEL" per image of a flat folder.
    out: PathName = ""  # Folder for the latents.
    image_size: Side | None = None
    """Side that images are cropped to, in pixels; default: the tokenizer's training size."""
    batch_size: Batch = 64  # Images per forward pass and process.
    dtype: Literal["bf16", "fp32"] = "bf16"  # Number format of the stored latents.
    store: Literal["moments", "sample"] = "moments"
    """moments: mean and deviation, sampled anew each epoch; sample: one posterior sample, as the authors' files."""
    flip: bool = True  # Store the mirrored images, too.
    seed: Seed = 0  # Seed of the posterior samples (--store sample).
    shard_size: Count | None = None  # Images per file; default: 10,000, with features 2,500.
    features: str = "none"
    """Store this foundation model's features, too, for REPA: dinov2, mae, sam, clip, any timm model, or none."""
    features_weights: PathName = FoundationSpec.weights  # Its weights: hub, a path, or random (tests only).
    features_input_range: Literal["normalized", "minus_one_one"] = FoundationSpec.input_range
    """Its input: normalised by its own mean and deviation, or in [-1, 1]."""
    features_grid: Side | None = None
    """Side of the grid of features, which is that of the generator's tokens; default: image size / 16."""
    loader: Literal["torch", "dali", "auto"] = "torch"
    """Who decodes: Pillow (torch; the exact pixels of the crop rule), or DALI (about 50 dB from them)."""
    num_workers: Workers = ImageDataSpec.num_workers  # Decoding threads per process.
    on_error: Literal["raise", "skip"] = ImageDataSpec.on_error
    """What to do with an image that does not decode: stop and name it, or leave it out and count it."""
    max_bad_share: Share = ImageDataSpec.max_bad_share
    """With --on-error skip: the share of bad images above which encoding stops all the same."""
    device: Device = "auto"  # Device of the tokenizer.
    precision: Arithmetic = "auto"  # Arithmetic of the tokenizer; auto: fp32.
    stats_only: PathName | None = None  # Only compute the statistics of this folder of latents.
    stats_samples: Annotated[int, Range(0, 10**9)] = 0
    """Statistics from so many random latents (the authors: 10,000), a function of --seed; 0: from all latents."""


def run(options: EncodeOptions) -> None:
    """Encode, or compute statistics alone."""
    if options.stats_only is not None:
        from vadit.latents.shards import STATISTICS_FILE, open_folder
        from vadit.latents.statistics import compute_statistics
        from vadit.runtime.owner import owned

        open_folder(Path(options.stats_only))  # a wrong path must not be made
        with owned(options.stats_only, "name another one"):
            statistics = compute_statistics(options.stats_only, samples=options.stats_samples, seed=options.seed)
        say(f"{Path(options.stats_only) / STATISTICS_FILE}: {statistics.mean.numel()} channels")
        return
    for name in ("tokenizer", "images", "out"):
        if not getattr(options, name):
            raise UsageError(f"vadit encode needs --{name}; `vadit encode --help` explains")
    check_output("--out", options.out)
    from vadit.images.backends import open_decoder, open_images
    from vadit.images.loader import describe_classes
    from vadit.latents.encode import encode
    from vadit.runtime import choices
    from vadit.runtime.precision import resolved

    with processes(options.device) as device:
        precision = resolved(options.precision, device)
        autoencoder = load_tokenizer(options.tokenizer, device)
        size = image_size(autoencoder, options.image_size)
        features = _load_features(options, size, device)
        images = open_images(image_data(options), size)
        decoder, chosen = open_decoder(options.loader, images, options.num_workers, device)
        choices.report(chosen)
        classes = describe_classes(images.source.classes, images.source.labels)
        say_once(f"{len(images):,} images by {chosen.name}; {classes}")
        names = ("batch_size", "flip", "dtype", "store", "seed", "shard_size", "precision", "stats_samples")
        settings = {name: getattr(options, name) for name in names} | {"features": features, "decoder": decoder}
        with ProgressBar("encode", len(images)) as bar:
            summary = encode(autoencoder, images, options.out, **settings, progress=bar.update)
    rate = f"{summary.images_per_s:,.1f} images/s in {precision}"
    say_once(f"{options.out}: {summary.num_images:,} images encoded here, {rate}")


def _load_features(options: EncodeOptions, size: int, device: torch.device) -> FoundationModel | None:
    """The foundation model of --features, for images of this side."""
    if options.features == "none":
        return None
    from vadit.models.foundation import FoundationModel

    grid = options.features_grid if options.features_grid is not None else size // PIXELS_PER_FEATURE
    if grid < 1:
        raise UsageError(f"--features-grid is {grid}; it must be at least 1 (images of {size} pixels)")
    spec = FoundationSpec(
        name=options.features, weights=options.features_weights, input_range=options.features_input_range
    )
    return FoundationModel(spec, grid).to(device)
