"""vadit evaluate: numbers for samples, a tokenizer or latents, and a reference to compare samples with."""

from __future__ import annotations

import dataclasses
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from vadit.commands.arguments import parse
from vadit.commands.common import Device, image_size, load_tokenizer, processes
from vadit.config import FoundationSpec, ImageDataSpec
from vadit.runtime.errors import RunError, UsageError
from vadit.runtime.files import saved_file


@dataclass(frozen=True, kw_only=True)
class EvaluateSamplesOptions:
    """FID, sFID, inception score, precision, recall (ADM's protocol), KID and FD-DINOv2 of samples."""

    samples: Positional[str]
    """Folder of PNGs, or an .npz with arr_0; with --seeds possibly a name with {seed} in it."""
    reference: str
    """.npz with statistics or images (ADM's VIRTUAL_imagenet256_labeled.npz), or a folder of PNGs."""
    inception_weights: str | None = None
    """Path of torch-fidelity's weights-inception-2015-12-05-6726825d.pth."""
    dinov2_weights: str | None = None
    """For FD-DINOv2: a path of vit_large_patch14_dinov2.lvd142m's weights, or hub; left out: not computed."""
    sampler: str = "unnamed"
    """How the samples were drawn, for the names of the numbers: euler249_cfg10; default: what `vadit sample` noted."""
    num_samples: int | None = None
    """Take only the first so many; default all."""
    seeds: int | None = None
    """Evaluate so many sets: means, and their spread. SAMPLES has {seed} in it for 0, 1, ..., or holds so many times
    --num-samples images, which are taken in turn."""
    batch_size: int = 64
    """Images per forward pass."""
    device: Device = "auto"
    """Device of the networks."""
    out: str | None = None
    """JSON file for the numbers."""


@dataclass(frozen=True, kw_only=True)
class EvaluateTokenizerOptions:
    """PSNR, SSIM, and with weights LPIPS and rFID, of a tokenizer's reconstructions."""

    tokenizer: str
    """Tokenizer: a run folder, one from `vadit export` or `vadit import`, an AutoencoderKL of diffusers, or a file of
    the authors."""
    images: str
    """Folder of images (the paper: the 50,000 of ImageNet's validation set)."""
    image_size: int | None = None
    """Side that images are cropped to, in pixels; default: the tokenizer's training size."""
    posterior: Literal["sample", "mode"] = "sample"
    """Latent that is decoded: one posterior sample (as the authors evaluate), or the mean."""
    inception_weights: str | None = None
    """Path of torch-fidelity's Inception weights, for rFID."""
    vgg_weights: str | None = None
    """Path of torchvision's vgg16-397923af.pth, for LPIPS."""
    batch_size: int = 32
    """Images decoded together; no number depends on it."""
    num_workers: int = ImageDataSpec.num_workers
    """Decoding threads per process."""
    seed: int = 0
    """Seed of the posterior samples."""
    seeds: int = 1
    """Evaluate with so many seeds, from --seed on: means, and their spread."""
    device: Device = "auto"
    """Device of all networks."""
    out: str | None = None
    """JSON file for the numbers."""


@dataclass(frozen=True, kw_only=True)
class EvaluateLatentsOptions:
    """How evenly latents are spread: the paper's Table 6 (density CV, Gini coefficient, entropy)."""

    latents: str
    """Folder of latents, or a file with a (N, C) tensor of latent vectors (.npy, .npz, .pt, .safetensors)."""
    num_vectors: int = 10_000
    """Latent vectors per draw, each of another image."""
    seeds: int = 10
    """Draws of vectors, from --seed on, that the numbers are means of; their spread is reported, too."""
    seed: int = 0
    """Seed of the first draw."""
    picture: str | None = None
    """PNG for the t-SNE points of the first draw, coloured by density."""
    out: str | None = None
    """JSON file for the numbers."""


@dataclass(frozen=True, kw_only=True)
class MakeReferenceOptions:
    """A reference like ADM's for any set of images: statistics of all, and some of them for precision and recall."""

    images: Positional[str]
    """Folder of images, shards or a .beton; ADM's centre crop is applied."""
    out: str
    """The .npz to write."""
    image_size: int = 256
    """Side that images are cropped to, in pixels."""
    inception_weights: str | None = None
    """Path of torch-fidelity's weights-inception-2015-12-05-6726825d.pth."""
    keep: int = 10_000
    """Images that the file holds (ADM: 10,000)."""
    batch_size: int = 64
    """Images per forward pass."""
    num_workers: int = ImageDataSpec.num_workers
    """Decoding threads."""
    device: Device = "auto"
    """Device of the Inception network."""


def samples(arguments: list[str]) -> None:
    """Evaluate sets of samples."""
    options = parse(EvaluateSamplesOptions, arguments, command="evaluate samples")
    from vadit.eval.samples import SampleEvaluator
    from vadit.runtime import distributed

    sets = _sample_sets(options)
    device = distributed.device(options.device)
    dinov2 = None
    if options.dinov2_weights is not None:
        from vadit.models.foundation import ImageSummary

        dinov2 = ImageSummary(FoundationSpec(name="dinov2", weights=options.dinov2_weights)).to(device)
    evaluator = SampleEvaluator(
        options.reference,
        inception_weights=options.inception_weights,
        dinov2=dinov2,
        device=device,
        batch_size=options.batch_size,
    )
    found: list[dict[str, float]] = []
    for path, first in sets:
        metrics = evaluator.evaluate(path, num_samples=options.num_samples, first=first)
        found.append(metrics.named(_sampler_of(options.sampler, path)))
        if found[-1].keys() != found[0].keys():
            raise UsageError(
                f"{path} gives {', '.join(found[-1])}, {sets[0][0]} {', '.join(found[0])}; "
                "seeds can only be averaged over sets of one size and one sampler"
            )
    inputs = {
        "samples": [{"path": path, "first": first} for path, first in sets],
        "num_samples": metrics.num_samples,
        "reference": options.reference,
        **_inception_inputs(options.inception_weights),
        "dinov2_weights": options.dinov2_weights,
        "protocol": "ADM: Inception of 2015, TF1 bilinear resize to 299, splits of 5,000, k 3, 10,000 references",
    }
    _report("samples", found, inputs, options.out)


def _sample_sets(options: EvaluateSamplesOptions) -> list[tuple[str, int]]:
    """Path and first image of each set that is evaluated."""
    if options.seeds is None:
        return [(options.samples, 0)]
    numbers = _seeds(0, options.seeds)
    if "{seed}" in options.samples:
        return [(options.samples.replace("{seed}", str(seed)), 0) for seed in numbers]
    if options.num_samples is None:
        raise UsageError(
            f"--seeds {options.seeds} needs a name with {{seed}} in it, found {options.samples}, or --num-samples, "
            "the size of the sets that SAMPLES is cut into"
        )
    return [(options.samples, seed * options.num_samples) for seed in numbers]


def _seeds(first: int, count: int) -> range:
    if count < 1:
        raise UsageError(f"--seeds is {count}; it must be at least 1")
    return range(first, first + count)


def _inception_inputs(weights: str | None) -> dict[str, Any]:
    """Which Inception network the numbers rest on."""
    if weights is None:
        return {}
    from vadit.eval.inception import PUBLISHED_SHA256, checksum

    found = checksum(weights)
    return {
        "inception_weights": weights,
        "inception_sha256": found,
        "inception_published": found.startswith(PUBLISHED_SHA256),
    }


def _sampler_of(sampler: str, samples: str) -> str:
    """The sampler's name: as given, or from the settings.json that `vadit sample` left by the images."""
    from vadit.sampling.write import noted_sampler

    return sampler if sampler != EvaluateSamplesOptions.sampler else noted_sampler(samples) or sampler


def tokenizer(arguments: list[str]) -> None:
    """Evaluate a tokenizer's reconstructions."""
    options = parse(EvaluateTokenizerOptions, arguments, command="evaluate tokenizer")
    from vadit.eval.inception import Inception
    from vadit.eval.tokenizer import evaluate_tokenizer, share_of_images
    from vadit.images.backends import open_images
    from vadit.images.loader import load_in_order
    from vadit.images.pillow import pillow_decoder

    seeds = _seeds(options.seed, options.seeds)
    if len(seeds) > 1 and options.posterior == "mode":
        raise UsageError(f"--seeds {options.seeds} with --posterior mode gives one number so often; set --seeds 1")
    found = []
    with processes(options.device) as device:
        autoencoder = load_tokenizer(options.tokenizer, device)
        images = open_images(ImageDataSpec(path=options.images), image_size(autoencoder, options.image_size))
        perceptual = None
        if options.vgg_weights is not None:
            from vadit.models.lpips import LPIPS

            perceptual = LPIPS(options.vgg_weights).to(device)
        features = None if options.inception_weights is None else Inception(options.inception_weights, device).pool
        ids = share_of_images(len(images))
        # Pillow, whatever else is installed: the numbers are compared with those of others.
        for seed in seeds:
            with pillow_decoder(images, options.num_workers, device)() as decoder:
                batches = load_in_order(images, ids, max(options.batch_size, 1), decoder)
                metrics = evaluate_tokenizer(
                    autoencoder,
                    (batch.images.contiguous() for batch in batches),
                    ids=ids,
                    device=device,
                    lpips=perceptual,
                    features=features,
                    posterior=options.posterior,
                    seed=seed,
                )
            if metrics.num_images != len(images):
                raise RunError(f"{metrics.num_images} of the {len(images)} images were read; a part gets no numbers")
            found.append({name: value for name, value in metrics.named().items() if value is not None})
    inputs = {
        "tokenizer": options.tokenizer,
        "images": options.images,
        "num_images": metrics.num_images,
        "seeds": list(seeds),
        **_inception_inputs(options.inception_weights),
        "vgg_weights": options.vgg_weights,
        "protocol": f"ADM's centre crop; posterior {options.posterior}; PSNR per image on uint8, range 255; "
        "SSIM window 11, sigma 1.5; LPIPS VGG; rFID against the very images",
    }
    _report("tokenizer", found, inputs, options.out)


def latents(arguments: list[str]) -> None:
    """Evaluate how evenly latents are spread."""
    options = parse(EvaluateLatentsOptions, arguments, command="evaluate latents")
    from functools import partial

    from vadit.eval.latents import draw_picture, draw_vectors, embed, folder_vectors, read_vectors, uniformity

    draw: Any
    if Path(options.latents).is_file():
        draw = partial(draw_vectors, read_vectors(options.latents))
    else:
        from vadit.latents.dataset import LatentDataset

        # The channel statistics of the whole folder are divided out by the data set itself.
        draw = partial(folder_vectors, LatentDataset(options.latents, flip=False))
    found, seeds = [], _seeds(options.seed, options.seeds)
    for seed in seeds:
        points = embed(draw(options.num_vectors, seed), seed)
        found.append(dataclasses.asdict(uniformity(points)))
        if seed == options.seed and options.picture is not None:
            draw_picture(points, options.picture)
    inputs = {
        "latents": options.latents,
        "num_vectors": options.num_vectors,
        "seeds": list(seeds),
        "protocol": "one position of each latent, normalised by channel; "
        "t-SNE perplexity 30, 1000 iterations; Gaussian density by Scott's rule at the points",
    }
    _report("latents", found, inputs, options.out)


def make_reference(arguments: list[str]) -> None:
    """Write a reference for samples."""
    options = parse(MakeReferenceOptions, arguments, command="evaluate make-reference")
    from vadit.eval.samples import write_reference
    from vadit.images.backends import open_images
    from vadit.images.loader import load_in_order
    from vadit.images.pillow import pillow_decoder
    from vadit.runtime import distributed

    device = distributed.device(options.device)
    images = open_images(ImageDataSpec(path=options.images), options.image_size)
    with pillow_decoder(images, options.num_workers, device)() as decoder:
        batches = load_in_order(images, range(len(images)), options.batch_size, decoder)
        write_reference(
            options.out,
            (batch.images.contiguous() for batch in batches),
            num_images=len(images),
            inception_weights=options.inception_weights,
            device=device,
            keep=options.keep,
        )
    print(f"{options.out}: statistics of {len(images):,} images, and {min(options.keep, len(images)):,} of them")


def _report(kind: str, found: list[dict[str, float]], inputs: dict[str, Any], out: str | None) -> None:
    """Print a table of means over seeds from the first process, and write metrics.json where one is wanted."""
    from vadit.runtime import distributed

    if not distributed.is_main():
        return
    metrics = {name: statistics.fmean(each[name] for each in found) for name in found[0]}
    spread = {name: statistics.stdev(each[name] for each in found) for name in metrics} if len(found) > 1 else None
    width = max(map(len, metrics))
    for name, value in metrics.items():
        print(f"{name:<{width}}  {value:.6g}" + ("" if spread is None else f" +- {spread[name]:.2g}"))
    if spread is not None:
        print(f"mean of {len(found)} +- standard deviation between them")
    if inputs.get("inception_published") is False:
        print("the Inception weights are not the published ones: these numbers are comparable with each other alone")
    if out is None:
        return
    content = {"kind": kind, "metrics": metrics, **({} if spread is None else {"spread": spread}), "inputs": inputs}
    with saved_file(Path(out), "set --out to a place with room") as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n")
