"""vadit evaluate: numbers for samples, a tokenizer or latents."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vadit.arguments import parse
from vadit.commands.common import Device, image_size, load_tokenizer
from vadit.config import ImageDataSpec, SampleSpec
from vadit.config_files import from_dict
from vadit.errors import RunError, UsageError, write_fault


@dataclass(frozen=True, kw_only=True)
class EvaluateSamplesOptions:
    """FID, sFID, inception score, precision and recall of samples, by ADM's protocol."""

    samples: str
    """Folder of PNGs, or an .npz with arr_0."""
    reference: str
    """.npz with statistics or images (ADM's VIRTUAL_imagenet256_labeled.npz), or a folder of PNGs."""
    inception_weights: str | None = None
    """Path of torch-fidelity's weights-inception-2015-12-05-6726825d.pth."""
    sampler: str = "unnamed"
    """How the samples were drawn, for the names of the numbers: euler250_cfg10; default: what `vadit sample` noted."""
    num_samples: int | None = None
    """Take only the first so many; default all."""
    batch_size: int = 64
    """Images per forward pass."""
    device: Device = "auto"
    """Device of the Inception network."""
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
    batch_size: int = 32
    """Images per forward pass."""
    num_workers: int = ImageDataSpec.num_workers
    """Decoding threads."""
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
    """Folder of latents."""
    num_vectors: int = 10_000
    """Latent vectors per draw, each of another image."""
    draws: int = 10
    """Draws that the numbers are means of."""
    seed: int = 0
    """Seed of the draws."""
    out: str | None = None
    """JSON file for the numbers."""


def run(arguments: list[str]) -> None:
    """Evaluate what the first argument names."""
    kinds = {"samples": _evaluate_samples, "tokenizer": _evaluate_tokenizer, "latents": _evaluate_latents}
    what = next(iter(arguments), "")
    if what in ("-h", "--help"):
        print("usage: vadit evaluate samples|tokenizer|latents [--setting value ...]\n")
        for kind, options in (
            ("samples", EvaluateSamplesOptions),
            ("tokenizer", EvaluateTokenizerOptions),
            ("latents", EvaluateLatentsOptions),
        ):
            print(f"  {kind:<10} {options.__doc__}")
        return
    if what not in kinds:
        raise UsageError(f"vadit evaluate needs samples, tokenizer or latents first, found {what!r}")
    kinds[what](arguments[1:])


def _evaluate_samples(arguments: list[str]) -> None:
    options = parse(EvaluateSamplesOptions, arguments, command="evaluate samples")
    from vadit import distributed
    from vadit.eval.samples import evaluate_samples

    metrics = evaluate_samples(
        options.samples,
        options.reference,
        inception_weights=options.inception_weights,
        device=distributed.device(options.device),
        batch_size=options.batch_size,
        num_samples=options.num_samples,
    )
    _print_numbers(metrics.named(_sampler_of(options)), options.out)


def _sampler_of(options: EvaluateSamplesOptions) -> str:
    """The sampler's name: as given, or from the settings.json that `vadit sample` left by the images."""
    if options.sampler != EvaluateSamplesOptions.sampler:
        return options.sampler
    path = Path(options.samples)
    for folder in (path, path.parent):
        if (folder / "settings.json").is_file():
            from vadit.sample import sampler_name

            file = folder / "settings.json"
            return sampler_name(from_dict(SampleSpec, json.loads(file.read_text())["sampler"], origin=str(file)))
    return options.sampler


def _evaluate_tokenizer(arguments: list[str]) -> None:
    options = parse(EvaluateTokenizerOptions, arguments, command="evaluate tokenizer")
    from vadit import distributed
    from vadit.config import ImageDataSpec
    from vadit.data.images import load_in_order
    from vadit.data.images_torch import pillow_decoder
    from vadit.data.loaders import open_images
    from vadit.eval.inception import Inception
    from vadit.eval.reconstruction import evaluate_tokenizer

    device = distributed.device(options.device)
    autoencoder = load_tokenizer(options.tokenizer, device)
    images = open_images(ImageDataSpec(path=options.images), image_size(autoencoder, options.image_size))
    perceptual = None
    if options.vgg_weights is not None:
        from vadit.models.lpips import LPIPS

        perceptual = LPIPS(options.vgg_weights).to(device)
    # Pillow, whatever else is installed: the numbers are compared with those of others.
    with pillow_decoder(images, options.num_workers, device)() as decoder:
        batches = load_in_order(images, range(len(images)), options.batch_size, decoder)
        metrics = evaluate_tokenizer(
            autoencoder,
            (batch.images.contiguous() for batch in batches),
            device=device,
            lpips=perceptual,
            features=None if options.inception_weights is None else Inception(options.inception_weights, device).pool,
            posterior=options.posterior,
            seed=options.seed,
        )
    numbers = dataclasses.asdict(metrics)
    _print_numbers({name: value for name, value in numbers.items() if value is not None}, options.out)


def _evaluate_latents(arguments: list[str]) -> None:
    options = parse(EvaluateLatentsOptions, arguments, command="evaluate latents")
    import torch

    from vadit.data.latents import LatentDataset
    from vadit.eval.uniformity import latent_uniformity

    # The channel statistics of the whole folder are divided out by the data set itself.
    data = LatentDataset(options.latents, flip=False)
    latents = data.batch(torch.arange(len(data)), epoch=0, seed=options.seed)[0]
    metrics = latent_uniformity(latents, num_vectors=options.num_vectors, draws=options.draws, seed=options.seed)
    _print_numbers(dataclasses.asdict(metrics), options.out)


def _print_numbers(numbers: dict[str, float], out: str | None) -> None:
    for name, value in numbers.items():
        print(f"{name:<32} {value:.6g}")
    if out is not None:
        partial = Path(f"{out}.partial")
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(numbers, indent=2) + "\n")
            partial.replace(out)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise RunError(f"cannot write {out} ({write_fault(error)}); set --out to a place with room") from None
