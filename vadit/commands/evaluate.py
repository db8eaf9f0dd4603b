"""vadit evaluate: numbers for samples, a tokenizer or latents, and a reference to compare samples with."""

from __future__ import annotations

import dataclasses
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from vadit.arguments import parse
from vadit.commands.common import Device, image_size, load_tokenizer, processes
from vadit.config import FoundationSpec, ImageDataSpec, SampleSpec
from vadit.config_files import from_dict
from vadit.errors import RunError, UsageError, write_fault
from vadit.files import whole_file


@dataclass(frozen=True, kw_only=True)
class EvaluateSamplesOptions:
    """FID, sFID, inception score, precision, recall (ADM's protocol), KID and FD-DINOv2 of samples."""

    samples: Positional[str]
    """Folder of PNGs, or an .npz with arr_0; with --seeds a name with {seed} in it."""
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
    """Evaluate SAMPLES with {seed} = 0, 1, ... so many times: means, and their spread."""
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
    """Tokenizer: a run folder, or one from `vadit export` or `vadit import`."""
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
    num_workers: int = ImageDataSpec.num_workers
    """Decoding threads per process."""
    seed: int = 0
    """Seed of the posterior samples."""
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
    draws: int = 10
    """Draws that the numbers are means of."""
    seed: int = 0
    """Seed of the draws."""
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


def run(arguments: list[str]) -> None:
    """Evaluate what the first argument names."""
    kinds = {
        "samples": (_evaluate_samples, EvaluateSamplesOptions),
        "tokenizer": (_evaluate_tokenizer, EvaluateTokenizerOptions),
        "latents": (_evaluate_latents, EvaluateLatentsOptions),
        "make-reference": (_make_reference, MakeReferenceOptions),
    }
    what = next(iter(arguments), "")
    if what in ("-h", "--help"):
        print(f"usage: vadit evaluate {'|'.join(kinds)} [--setting value ...]\n")
        for kind, (_, options) in kinds.items():
            print(f"  {kind:<14} {options.__doc__}")
        return
    if what not in kinds:
        raise UsageError(f"vadit evaluate needs {', '.join(kinds)} first, found {what!r}")
    kinds[what][0](arguments[1:])


def _evaluate_samples(arguments: list[str]) -> None:
    options = parse(EvaluateSamplesOptions, arguments, command="evaluate samples")
    from vadit import distributed
    from vadit.eval.samples import evaluate_samples

    sets = _sample_sets(options)
    device = distributed.device(options.device)
    dinov2 = None
    if options.dinov2_weights is not None:
        from vadit.models.foundation import ImageSummary

        dinov2 = ImageSummary(FoundationSpec(name="dinov2", weights=options.dinov2_weights)).to(device)
    found: list[dict[str, float]] = []
    for samples in sets:
        metrics = evaluate_samples(
            samples,
            options.reference,
            inception_weights=options.inception_weights,
            dinov2=dinov2,
            device=device,
            batch_size=options.batch_size,
            num_samples=options.num_samples,
        )
        found.append(metrics.named(_sampler_of(options.sampler, samples)))
        if found[-1].keys() != found[0].keys():
            raise UsageError(
                f"{samples} gives {', '.join(found[-1])}, {sets[0]} {', '.join(found[0])}; "
                "seeds can only be averaged over sets of one size and one sampler"
            )
    means = {name: statistics.fmean(each[name] for each in found) for name in found[0]}
    spread = {name: statistics.stdev(each[name] for each in found) for name in found[0]} if len(found) > 1 else None
    inputs = {
        "samples": sets,
        "reference": options.reference,
        "inception_weights": options.inception_weights,
        "inception_sha256": None if options.inception_weights is None else _sha256(options.inception_weights),
        "dinov2_weights": options.dinov2_weights,
        "protocol": "ADM: Inception of 2015, TF1 bilinear resize to 299, splits of 5,000, k 3, 10,000 references",
    }
    _tell("samples", means, inputs, options.out, spread)


def _sample_sets(options: EvaluateSamplesOptions) -> list[str]:
    if options.seeds is None:
        return [options.samples]
    if options.seeds < 2 or "{seed}" not in options.samples:
        raise UsageError(
            f"--seeds {options.seeds} needs at least 2 and a name with {{seed}} in it, found {options.samples}"
        )
    return [options.samples.replace("{seed}", str(seed)) for seed in range(options.seeds)]


def _sampler_of(sampler: str, samples: str) -> str:
    """The sampler's name: as given, or from the settings.json that `vadit sample` left by the images."""
    if sampler != EvaluateSamplesOptions.sampler:
        return sampler
    for folder in (Path(samples), Path(samples).parent):
        if (folder / "settings.json").is_file():
            from vadit.sample import sampler_name

            file = folder / "settings.json"
            return sampler_name(from_dict(SampleSpec, json.loads(file.read_text())["sampler"], origin=str(file)))
    return sampler


def _evaluate_tokenizer(arguments: list[str]) -> None:
    options = parse(EvaluateTokenizerOptions, arguments, command="evaluate tokenizer")
    from vadit.data.images import load_in_order
    from vadit.data.images_torch import pillow_decoder
    from vadit.data.loaders import open_images
    from vadit.eval.inception import Inception
    from vadit.eval.reconstruction import GROUP, evaluate_tokenizer, share_of_images

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
        with pillow_decoder(images, options.num_workers, device)() as decoder:
            metrics = evaluate_tokenizer(
                autoencoder,
                (batch.images.contiguous() for batch in load_in_order(images, ids, GROUP, decoder)),
                ids=ids,
                device=device,
                lpips=perceptual,
                features=features,
                posterior=options.posterior,
                seed=options.seed,
            )
    inputs = {
        "tokenizer": options.tokenizer,
        "images": options.images,
        "num_images": metrics.num_images,
        "protocol": f"ADM's centre crop; posterior {options.posterior}; PSNR per image on uint8, range 255; "
        "SSIM window 11, sigma 1.5; LPIPS VGG; rFID against the very images",
    }
    numbers = {name: value for name, value in metrics.named().items() if value is not None}
    _tell("tokenizer", numbers, inputs, options.out)


def _evaluate_latents(arguments: list[str]) -> None:
    options = parse(EvaluateLatentsOptions, arguments, command="evaluate latents")
    import torch

    from vadit.eval.uniformity import draw_picture, draw_vectors, embed, mean_uniformity, read_vectors, uniformity

    if Path(options.latents).is_file() and Path(options.latents).suffix != ".beton":
        latents = read_vectors(options.latents)
    else:
        from vadit.data.latents import LatentDataset

        # The channel statistics of the whole folder are divided out by the data set itself.
        data = LatentDataset(options.latents, flip=False)
        latents = data.batch(torch.arange(len(data)), epoch=0, seed=options.seed)[0]
    if options.draws < 1:
        raise UsageError(f"--draws is {options.draws}; it must be at least 1")
    found = []
    for seed in range(options.seed, options.seed + options.draws):
        points = embed(draw_vectors(latents, options.num_vectors, seed), seed)
        found.append(uniformity(points))
        if seed == options.seed and options.picture is not None:
            draw_picture(points, options.picture)
    inputs = {
        "latents": options.latents,
        "num_vectors": options.num_vectors,
        "draws": options.draws,
        "protocol": "t-SNE perplexity 30, 1000 iterations; Gaussian density by Scott's rule at the points",
    }
    _tell("latents", dataclasses.asdict(mean_uniformity(found)), inputs, options.out)


def _make_reference(arguments: list[str]) -> None:
    options = parse(MakeReferenceOptions, arguments, command="evaluate make-reference")
    from vadit import distributed
    from vadit.data.images import load_in_order
    from vadit.data.images_torch import pillow_decoder
    from vadit.data.loaders import open_images
    from vadit.eval.samples import write_reference

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


def _sha256(path: str) -> str:
    import hashlib

    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _tell(
    kind: str,
    metrics: dict[str, float],
    inputs: dict[str, Any],
    out: str | None,
    spread: dict[str, float] | None = None,
) -> None:
    """Print a table from the first process, and write metrics.json where one is wanted."""
    from vadit import distributed

    if not distributed.is_main():
        return
    width = max(map(len, metrics))
    for name, value in metrics.items():
        print(f"{name:<{width}}  {value:.6g}" + ("" if spread is None else f" +- {spread[name]:.2g}"))
    if out is None:
        return
    content = {"kind": kind, "metrics": metrics, **({} if spread is None else {"spread": spread}), "inputs": inputs}
    try:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        with whole_file(Path(out)) as partial:
            partial.write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise RunError(f"cannot write {out} ({write_fault(error)}); set --out to a place with room") from None
