"""Images -> latent shards: every image is decoded and encoded once, plain and mirrored.

N processes share the shards out (shard k goes to process k % N). A shard is written whole or not at all, and one that
is there is not made again, so the same command continues an interrupted one, also with another number of processes.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from vadit.config import ImageDataSpec
from vadit.images.loader import Decoder, ImageBatch, ImageSet, ImageSource, load_in_order
from vadit.images.pillow import pillow_decoder
from vadit.images.pixels import to_signed
from vadit.latents import growth
from vadit.latents.shards import (
    STATISTICS_FILE,
    LatentSettings,
    LatentShardWriter,
    open_finished_folder,
    open_shard,
    read_index,
    save_index,
)
from vadit.latents.statistics import compute_statistics
from vadit.models.autoencoder import Autoencoder
from vadit.models.pretrained import weights_hash
from vadit.runtime import distributed, rng
from vadit.runtime.errors import RunError, UsageError
from vadit.runtime.files import reference, refuse_other_settings
from vadit.runtime.owner import owned
from vadit.runtime.precision import Precision, as_computed, computing, resolved
from vadit.runtime.reading import ReadFault
from vadit.runtime.walk import visible

if TYPE_CHECKING:
    from vadit.models.foundation import FoundationModel

logger = logging.getLogger(__name__)

SHARD_SIZE, SHARD_SIZE_WITH_FEATURES = 10_000, 2_500
"""Images per shard: features of DINOv2-L, 16 x 16 x 1024 plain and mirrored, are 1 MiB of each."""


@dataclass(frozen=True)
class EncodeSummary:
    """What one call did in this process."""

    num_images: int  # images that this call encoded; those of shards that were there already are not counted
    num_shards: int  # shards that this call wrote
    images_per_s: float  # num_images over the seconds spent encoding


@torch.no_grad()
def encode(
    autoencoder: Autoencoder,
    images: ImageSet,
    out: str | Path,
    *,
    batch_size: int,
    flip: bool = True,
    dtype: Literal["bf16", "fp32"] = "bf16",
    store: Literal["moments", "sample"] = "moments",
    seed: int = 0,
    shard_size: int | None = None,
    features: FoundationModel | None = None,
    num_workers: int = ImageDataSpec.num_workers,
    decoder: Decoder | None = None,
    stats_samples: int = 0,
    precision: Literal["auto"] | Precision = "fp32",
    progress: Callable[[int], object] | None = None,
) -> EncodeSummary:
    """Encode all `images` into the folder `out`: shards, then statistics, then the index.

    A shard is held in memory until it is written (10,000 moments of 64 x 16 x 16, plain and mirrored: 0.7 GB in bf16;
    2,500 with DINOv2-L's features: 2.8 GB). `shard_size`: images in one, by default so many.
    `features`: a foundation model whose features of the images are stored beside the latents, for REPA.
    `decoder` says who decodes the images (default: Pillow, in num_workers threads, whose pixels are exact).
    `stats_samples`: statistics from so many random latents; 0 for all of them (see compute_statistics). `precision` is
    the autoencoder's. `progress` is called with the images done so far over all processes (an estimate from this one's
    share). Up to rounding the result does not depend on batch_size or the number of processes. Images that were added
    since come into new shards (`growth`). UsageError: `out` holds latents of other settings or images. RunError: the
    disk is full.
    """
    out = Path(out)
    if shard_size is None:
        shard_size = SHARD_SIZE if features is None else SHARD_SIZE_WITH_FEATURES
    joined = distributed.world_size() > 1 and not dist.is_initialized()
    if joined:  # for long, as the others wait while rank 0 reads all latents for statistics
        distributed.join("gloo", timedelta(days=1))
    kept = {"store": store, "dtype": dtype, "flip": flip, "shard_size": shard_size, "precision": precision}
    settings = _settings(autoencoder, images, features, seed=seed if store == "sample" else 0, **kept)
    autoencoder = as_computed(autoencoder, settings.precision)
    started = time.monotonic()
    with owned(out, "set --out to another one"):
        classes, parts = growth.plan(out, images.source, settings.shard_size)
        settings = replace(settings, num_classes=len(classes))
        relabel = torch.tensor([classes.index(name) for name in images.source.classes])
        finished = _finished_shards(out, settings, parts, ["precision"] if precision == "auto" else [])
        distributed.barrier()  # every process has seen the folder before one of them changes it
        mine = parts[distributed.rank() :: distributed.world_size()]
        share, num_done = sum(len(part.ids) for part in mine), 0
        num_encoded = num_written = 0

        def report(num_more: int) -> None:
            if progress is not None:
                progress((num_done + num_more) * len(images) // share)

        was_training = autoencoder.training
        autoencoder.eval()
        try:
            with (decoder or pillow_decoder(images, num_workers, next(autoencoder.parameters()).device))() as active:
                for part in mine:
                    if part.path in finished and _is_intact(part.path):
                        if not part.listed:  # of before there were lists
                            growth.list_images(part, images.source, classes)
                    else:
                        batches, ids = load_in_order(images, part.indices, batch_size, active), part.ids_by_index()
                        rows = (_rows(autoencoder, features, batch, settings, ids, relabel) for batch in batches)
                        num_encoded += _write_shard(part, rows, settings, images.source, classes, report)
                        num_written += 1
                    num_done += len(part.ids)
                    report(0)
        finally:
            autoencoder.train(was_training)
            images.warn_of_bad_files()
        encoding_s = time.monotonic() - started
        distributed.barrier()
        if distributed.is_main():
            _complete(out, settings, classes, autoencoder.path, parts, samples=stats_samples, seed=seed)
        distributed.barrier()
    if joined:
        dist.destroy_process_group()
    return EncodeSummary(num_encoded, num_written, num_encoded / max(encoding_s, 1e-9))


def _write_shard(
    part: growth.Part,
    rows: Iterator[dict[str, Tensor]],
    settings: LatentSettings,
    source: ImageSource,
    classes: list[str],
    report: Callable[[int], None],
) -> int:
    """Write a shard and the list of its images; how many have latents."""
    writer = LatentShardWriter(part.path, settings)
    for each in rows:
        writer.add(each)
        report(writer.count)
    if writer.count == 0:
        some = f"none of the images {part.ids[0]} to {part.ids[-1]} of {settings.source}"
        raise RunError(f"{some} decodes; replace them")
    growth.list_images(part, source, classes)
    return writer.close()


def _settings(
    autoencoder: Autoencoder, images: ImageSet, features: FoundationModel | None, **choices: Any
) -> LatentSettings:
    """What networks, images and the caller's choices (the other fields) make of the latents."""
    choices["precision"] = resolved(choices["precision"], next(autoencoder.parameters()).device)
    about = None
    if features is not None:  # readers compare name and range with a run's
        from vadit.models.foundation import TIMM_NAMES

        spec = features.spec
        about = {
            "name": spec.name,
            "timm": TIMM_NAMES.get(spec.name, spec.name),
            "weights": weights_hash(features.model),
            "input_size": features.input_size,
            "input_range": spec.input_range,
        }
    return LatentSettings(
        config=asdict(autoencoder.spec),
        tokenizer=weights_hash(autoencoder),
        source=images.source.name,
        num_images=len(images),
        num_classes=len(images.source.classes),
        size=images.size,
        alpha=images.alpha,
        exif=images.exif,
        features=about,
        **choices,
    )


def _rows(
    autoencoder: Autoencoder,
    features: FoundationModel | None,
    batch: ImageBatch,
    settings: LatentSettings,
    ids_by_index: dict[int, int],
    relabel: Tensor,
) -> dict[str, Tensor]:
    """What is stored of a batch of images and of their mirror images, by name, with ids and labels of the folder."""
    ids = torch.tensor([ids_by_index[index] for index in batch.ids.tolist()])
    weight = next(autoencoder.parameters())
    pixels = to_signed(batch.images.to(weight.device, non_blocking=True))
    rows = {"labels": relabel[batch.labels], "ids": ids}
    for suffix, stream, seen in (("", "encode", pixels), ("_flip", "encode mirrored", pixels.flip(-1))):
        if suffix and not settings.flip:
            continue
        with computing(settings.precision, weight.device):
            posterior = autoencoder.encode(seen)
            mean, std = posterior.mean.float(), posterior.std.float()
        if settings.store == "moments":
            rows[f"moments{suffix}"] = torch.cat([mean, std], dim=1)
        else:
            noise = rng.normal(rng.fold(settings.seed, stream), ids, mean.shape[1:])
            rows[f"latents{suffix}"] = mean + std * noise.to(mean.device)
        if features is not None:
            rows[f"features{suffix}"] = features(seen)
    return rows


def _finished_shards(out: Path, settings: LatentSettings, parts: list[growth.Part], automatic: list[str]) -> set[Path]:
    """The shards whose headers are sound and whose images are known; refuses a folder that holds any besides `parts`.

    Where none is known, they are from before images were listed, and of as many as there are now.
    """
    expected, finished = {part.path: part.listed for part in parts}, set()
    for path in visible(out, ".safetensors") if out.is_dir() else ():
        try:
            found = open_shard(path).settings
        except RunError as error:
            if path not in expected or isinstance(error, ReadFault):
                raise
            logger.warning("%s: this command does", error)
            continue
        if found is None:
            raise UsageError(f"{path} is not from `vadit encode`; set --out to an empty folder")
        remedy = "set --out to an empty folder, or remove this one"
        if any(expected.values()):
            found = replace(found, num_images=settings.num_images, num_classes=settings.num_classes)
        refuse_other_settings(out, "latents", asdict(found), asdict(settings), remedy, automatic=automatic)
        if path not in expected:
            raise UsageError(f"{path} is none of this folder's {len(parts)} shards; remove it")
        if expected[path] or not any(expected.values()):
            finished.add(path)
    return finished


def _is_intact(path: Path) -> bool:
    """Whether a shard's content is still that of its checksum."""
    if open_shard(path).is_intact():
        return True
    logger.warning("%s has another checksum than its header says; it is encoded anew", path)
    return False


def _complete(
    out: Path,
    settings: LatentSettings,
    classes: list[str],
    tokenizer: str | None,
    parts: list[growth.Part],
    **sample: int,
) -> None:
    """Write statistics and index once all shards are there, where they are not those of these shards already."""
    if missing := [part.path for part in parts if not part.path.exists()]:
        raise RunError(f"{missing[0]} is missing; run the same command again to encode it")
    with contextlib.suppress(UsageError, RunError):
        open_finished_folder(out)
        index = read_index(out)
        if (out / STATISTICS_FILE).exists() and index is not None:
            if tokenizer and index.tokenizer != reference(tokenizer, out):  # moved, or an index of old
                save_index(out, settings, classes, tokenizer)
            return
    compute_statistics(out, **sample)
    save_index(out, settings, classes, tokenizer)
