"""vadit evaluate: numbers for samples, a tokenizer or latents, and a reference to compare samples with."""

import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from vadit.commands.common import Arithmetic, Device, image_data, image_size, load_tokenizer, processes
from vadit.config import FoundationSpec, ImageDataSpec, PictureSpec
from vadit.config.ranges import Batch, Checked, Count, PathName, Seed, Seeds, Side, Workers
from vadit.runtime.console import note_once, say
from vadit.runtime.errors import UsageError
from vadit.runtime.files import check_output, save_json


@dataclass(frozen=True, kw_only=True)
class EvaluateSamplesOptions(Checked):
    """FID, sFID, inception score, precision, recall (ADM's protocol), KID and FD-DINOv2 of samples."""

    samples: Positional[PathName]
    """Folder of PNGs, or an .npz with arr_0; with --seeds possibly a name with {seed} in it."""
    reference: PathName  # .npz with statistics or images (ADM's VIRTUAL_imagenet256_labeled.npz), or a folder of PNGs.
    inception_weights: PathName | None = None  # Path of torch-fidelity's weights-inception-2015-12-05-6726825d.pth.
    dinov2_weights: PathName | None = None
    """For FD-DINOv2: a path of vit_large_patch14_dinov2.lvd142m's weights, or hub; left out: not computed."""
    sampler: str | None = None
    """How the samples were drawn, for the names of the numbers: euler249_cfg10; default: what `vadit sample` noted."""
    num_samples: Count | None = None  # Take only the first so many; default all.
    seeds: Seeds | None = None
    """Evaluate so many sets: means, and their spread. SAMPLES has {seed} in it for 0, 1, ..., or holds so many times
    --num-samples images, which are taken in turn."""
    batch_size: Batch = 64  # Images per forward pass.
    device: Device = "auto"  # Device of the networks.
    out: PathName | None = None  # JSON file for the numbers.


@dataclass(frozen=True, kw_only=True)
class EvaluateTokenizerOptions(PictureSpec):
    """PSNR, SSIM, and with weights LPIPS and rFID, of a tokenizer's reconstructions."""

    tokenizer: PathName
    """Tokenizer: a run folder, one from `vadit export` or `vadit import`, an AutoencoderKL of diffusers, or a file of
    the authors."""
    images: PathName  # Folder of images (the paper: the 50,000 of ImageNet's validation set).
    image_size: Side | None = None
    """Side that images are cropped to, in pixels; default: the tokenizer's training size."""
    posterior: Literal["sample", "mode"] = "sample"
    """Latent that is decoded: one posterior sample (as the authors evaluate), or the mean."""
    inception_weights: PathName | None = None  # Path of torch-fidelity's Inception weights, for rFID.
    vgg_weights: PathName | None = None  # Path of torchvision's vgg16-397923af.pth, for LPIPS.
    batch_size: Batch = 32  # Images decoded together; no number depends on it.
    num_workers: Workers = ImageDataSpec.num_workers  # Decoding threads per process.
    seed: Seed = 0  # Seed of the posterior samples.
    seeds: Seeds = 1  # Evaluate with so many seeds, from --seed on: means, and their spread.
    device: Device = "auto"  # Device of all networks.
    precision: Arithmetic = "auto"
    """Arithmetic of the tokenizer; auto: fp32, as is that of the networks that judge, always."""
    out: PathName | None = None  # JSON file for the numbers.


@dataclass(frozen=True, kw_only=True)
class EvaluateLatentsOptions(Checked):
    """How evenly latents are spread: the paper's Table 6 (density CV, Gini coefficient, entropy)."""

    latents: PathName
    """Folder of latents, or a file with a (N, C) tensor of latent vectors (.npy, .npz, .pt, .safetensors)."""
    num_vectors: Count | None = None
    """Latent vectors per draw, each of another image; default: Table 6's 10,000, or as many as there are."""
    seeds: Seeds = 10  # Draws of vectors, from --seed on, that the numbers are means of; their spread is reported, too.
    seed: Seed = 0  # Seed of the first draw.
    picture: PathName | None = None  # PNG for the t-SNE points of the first draw, coloured by density.
    out: PathName | None = None  # JSON file for the numbers.


@dataclass(frozen=True, kw_only=True)
class MakeReferenceOptions(PictureSpec):
    """A reference like ADM's for any set of images: statistics of all, and some of them for precision and recall."""

    images: Positional[PathName]  # Folder of images, shards or a .beton; ADM's centre crop is applied.
    out: PathName  # The .npz to write.
    image_size: Side = 256  # Side that images are cropped to, in pixels.
    inception_weights: PathName | None = None  # Path of torch-fidelity's weights-inception-2015-12-05-6726825d.pth.
    keep: Count = 10_000  # Images that the file holds (ADM: 10,000).
    batch_size: Batch = 64  # Images per forward pass.
    num_workers: Workers = ImageDataSpec.num_workers  # Decoding threads.
    device: Device = "auto"  # Device of the Inception network.


def samples(options: EvaluateSamplesOptions) -> None:
    """Evaluate sets of samples."""
    from vadit.eval import inception
    from vadit.eval.samples import SampleEvaluator, reference_size, sample_sets
    from vadit.models.foundation import ImageSummary
    from vadit.runtime import distributed
    from vadit.sampling.write import noted_precision, noted_sampler

    _check_outputs(options)
    sets = sample_sets(options.samples, options.num_samples, options.seeds)
    device = distributed.device(options.device)
    dinov2 = None
    if options.dinov2_weights is not None:
        dinov2 = ImageSummary(FoundationSpec(name="dinov2", weights=options.dinov2_weights)).to(device)
    reference, weights = Path(options.reference), options.inception_weights
    evaluator = SampleEvaluator(reference, weights, dinov2, device, options.batch_size)
    found = evaluator.evaluate_sets(
        sets, options.num_samples, lambda path: options.sampler or noted_sampler(path) or "unnamed"
    )
    inputs = {
        "samples": [{"path": path, "first": first, "precision": noted_precision(path)} for path, first in sets],
        "num_samples": options.num_samples,
        "precision": "fp32",  # of what judges
        "reference": options.reference,
        "num_references": reference_size(reference),
        **inception.provenance(weights),
        "dinov2_weights": options.dinov2_weights,
        "protocol": "ADM: Inception of 2015, TF1 bilinear resize to 299, splits of 5,000, k 3, 10,000 references",
    }
    _report("samples", found, inputs, options.out)


def tokenizer(options: EvaluateTokenizerOptions) -> None:
    """Evaluate a tokenizer's reconstructions."""
    from vadit.eval import inception
    from vadit.eval.samples import warn_of_few
    from vadit.eval.tokenizer import evaluate_image_set, evaluate_tokenizer
    from vadit.images.backends import open_images
    from vadit.models.lpips import LPIPS
    from vadit.runtime.precision import resolved

    _check_outputs(options)
    if options.seeds > 1 and options.posterior == "mode":
        raise UsageError(f"--seeds {options.seeds} with --posterior mode gives one number so often; set --seeds 1")
    seeds = range(options.seed, options.seed + options.seeds)
    with processes(options.device) as device:
        autoencoder = load_tokenizer(options.tokenizer, device)
        images = open_images(image_data(options), image_size(autoencoder, options.image_size))
        weights, precision = options.inception_weights, resolved(options.precision, device)
        evaluate = partial(
            evaluate_tokenizer,
            autoencoder,
            posterior=options.posterior,
            precision=precision,
            device=device,
            lpips=None if options.vgg_weights is None else LPIPS(options.vgg_weights).to(device),
            features=None if weights is None else inception.Inception(weights, device).pool,
        )
        if weights is not None:
            warn_of_few(options.images, len(images))
        found = evaluate_image_set(
            evaluate, images, seeds=seeds, batch_size=options.batch_size, num_workers=options.num_workers, device=device
        )
    inputs = {
        "tokenizer": options.tokenizer,
        "images": options.images,
        "num_images": len(images),
        "alpha": images.alpha,
        "exif": images.exif,
        "precision": precision,
        "seeds": list(seeds),
        **inception.provenance(options.inception_weights),
        "vgg_weights": options.vgg_weights,
        "protocol": f"ADM's centre crop; posterior {options.posterior}; PSNR per image on uint8, range 255; "
        "SSIM window 11, sigma 1.5; LPIPS VGG; rFID against the very images",
    }
    _report("tokenizer", found, inputs, options.out)


def latents(options: EvaluateLatentsOptions) -> None:
    """Evaluate how evenly latents are spread."""
    from vadit.eval.latents import NUM_VECTORS, evaluate_latents, open_vectors

    _check_outputs(options)
    seeds = range(options.seed, options.seed + options.seeds)
    draw, count = open_vectors(options.latents)
    num_vectors = options.num_vectors or min(NUM_VECTORS, count)
    if num_vectors < NUM_VECTORS:
        note_once(f"the numbers are of {num_vectors:,} vectors, the paper's of {NUM_VECTORS:,}: they do not compare")
    found = evaluate_latents(draw, num_vectors, seeds, options.picture)
    inputs = {
        "latents": options.latents,
        "num_vectors": num_vectors,
        "seeds": list(seeds),
        "protocol": "one position of each latent, normalised by channel; "
        "t-SNE perplexity 30, 1000 iterations; Gaussian density by Scott's rule at the points",
    }
    _report("latents", found, inputs, options.out)


def make_reference(options: MakeReferenceOptions) -> None:
    """Write a reference for samples."""
    from vadit.eval.samples import write_reference
    from vadit.images.backends import open_images
    from vadit.runtime import distributed

    _check_outputs(options)
    images = open_images(image_data(options), options.image_size)
    settings = {name: getattr(options, name) for name in ("inception_weights", "batch_size", "num_workers", "keep")}
    write_reference(options.out, images, device=distributed.device(options.device), **settings)
    say(f"{options.out}: statistics of {len(images):,} images, and {min(options.keep, len(images)):,} of them")


def _check_outputs(options: object) -> None:
    """Refuse places that cannot be written, before the work begins."""
    for name in ("out", "picture"):
        if (path := getattr(options, name, None)) is not None:
            check_output(f"--{name}", path, folder=False)


def _report(kind: str, found: list[dict[str, float]], inputs: dict[str, Any], out: str | None) -> None:
    """Print the means of the numbers, one dict per seed, from the first process, and write them to `out`.

    The file holds kind, metrics, spread (standard deviation between seeds, where there are several) and inputs.
    """
    from vadit.runtime import distributed

    if not distributed.is_main():
        return
    metrics = {name: statistics.fmean(each[name] for each in found) for name in found[0]}
    spread = {name: statistics.stdev(each[name] for each in found) for name in metrics} if len(found) > 1 else {}
    width = max(map(len, metrics))
    for name, value in metrics.items():
        say(f"{name:<{width}}  {value:.6g}" + (f" +- {spread[name]:.2g}" if spread else ""))
    if spread:
        say(f"mean of {len(found)} +- standard deviation between them")
    if out is not None:
        content = {"kind": kind, "metrics": metrics, **({"spread": spread} if spread else {}), "inputs": inputs}
        save_json(Path(out), content, "set --out to a place with room")
