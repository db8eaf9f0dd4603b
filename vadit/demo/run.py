"""`vadit demo`: foundation model -> VA-VAE -> latents -> LightningDiT -> samples -> evaluation -> report.

Small sizes, the ordinary parts: the two trainers under DeepSpeed, the image and latent loaders, the shard format, the
samplers. Each stage leaves its result in the folder and is not repeated, so the same command goes on after a stop.
"""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.table import Table

from vadit.config import (
    DiTConfig,
    EvaluationSpec,
    ImageDataSpec,
    LatentDataSpec,
    RunSpec,
    SampleSpec,
    TokenizerConfig,
    vary,
)
from vadit.demo import networks, report
from vadit.demo.data import SIZE, DemoData, channels_first, prepare
from vadit.eval.latents import evaluate_latents, open_vectors
from vadit.eval.metrics import frechet_distance, mean_and_covariance, precision_recall
from vadit.eval.tokenizer import evaluate_tokenizer, reconstruct
from vadit.images.backends import open_images
from vadit.images.pixels import channels_last, to_uint8
from vadit.latents.dataset import LatentDataset
from vadit.latents.encode import encode
from vadit.models.autoencoder import Autoencoder
from vadit.models.foundation import FoundationModel
from vadit.recipes.small import small_dit, small_vavae, small_vit
from vadit.runtime import rng
from vadit.runtime.console import ProgressBar, note, say, show
from vadit.runtime.files import refuse_other_settings, save_json
from vadit.runtime.json_files import read_json
from vadit.runtime.npz_files import Npz
from vadit.sampling.draw import sampler_name
from vadit.sampling.write import write_samples
from vadit.train import dit, tokenizer
from vadit.train.checkpoint.export import load_autoencoder, load_generator

GUIDED_SCALE = 2.5
POINTS, GUIDED_POINTS = 10, 13  # of the samplers, without guidance and with it
UNIFORMITY_VECTORS = 800
SHOWN = 24  # reconstructions on the page


@dataclass(frozen=True)
class Sizes:
    """Lengths of the demo's stages: training in optimizer steps, samples in images."""

    foundation: int
    judge: int
    tokenizer: int
    generator: int
    samples: int


FULL = Sizes(foundation=150, judge=300, tokenizer=500, generator=1200, samples=500)
QUICK = Sizes(foundation=60, judge=100, tokenizer=120, generator=200, samples=100)


def tokenizer_config(
    out: Path, images: Path, foundation: Path, num_classes: int, *, steps: int, seed: int = 0
) -> TokenizerConfig:
    """`small-vavae` for 32x32 images."""
    base = small_vavae()
    return vary(
        base,
        autoencoder={"image_size": SIZE},
        foundation=small_vit(SIZE, 8, num_classes, str(foundation)),
        loss={"disc_start_step": steps * 3 // 4},
        run=_run(out, base.run, steps=steps, seed=seed),
        data=ImageDataSpec(path=str(images), loader="torch", num_workers=2),  # the same numbers everywhere
    )


def generator_config(
    out: Path, latents: Path, tokenizer: Path, num_classes: int, *, steps: int, seed: int = 0
) -> DiTConfig:
    """`small-dit` on 4x4 latents, with pictures on the way.

    Contrastive flow matching: more samples are read as meant, at a smaller Frechet distance.
    """
    base = small_dit()
    every = max(steps // 5, 2) * base.run.batch_size
    return vary(
        base,
        model={"input_size": SIZE // 8, "num_classes": num_classes},
        engine={"ema_decays": (0.99,)},
        run=_run(out, base.run, steps=steps, seed=seed),
        data=LatentDataSpec(path=str(latents), flip=False),
        flow={"contrastive_weight": 0.05},
        sample={"cfg_scale": 1.0, "num_steps": POINTS},
        evaluation=EvaluationSpec(every_images=every, tokenizer=str(tokenizer), grid_images=num_classes, steps=POINTS),
    )


def _run(out: Path, spec: RunSpec, *, steps: int, seed: int) -> dict[str, Any]:
    batch = spec.batch_size
    return {"out": str(out), "total_images": steps * batch, "seed": seed, "log_every_images": 10 * batch}


def run_demo(out: Path, kind: Literal["digits", "photos"], *, quick: bool, seed: int = 0) -> None:
    """Everything that `vadit demo` does, in the folder `out`. The judge is the same for all seeds."""
    start = time.perf_counter()
    torch.set_num_threads(min(torch.get_num_threads(), 2))  # small tensors leave little to share out
    note(f"vadit demo: {kind}, into {out}", "bold")
    _claim(out, {"data": kind, "quick": quick, "seed": seed})
    sizes = QUICK if quick else FULL
    data = prepare(out / "data", kind)
    num_classes = len(data.classes)

    # networks that look at pictures: one for the tokenizer to align to, one to judge what comes out
    weights = out / "networks" / "foundation.safetensors"
    spec = small_vit(SIZE, 8, num_classes, "random")
    networks.trained(
        weights, lambda: FoundationModel(spec, SIZE // 8).model.requires_grad_(True), data,
        title="foundation model", steps=sizes.foundation, seed=rng.fold(seed, "foundation"),
    )  # fmt: skip
    judge: networks.Judge = networks.trained(
        out / "networks" / "judge.safetensors", lambda: networks.Judge(num_classes), data,
        title="independent judge", steps=sizes.judge, seed=2,
    )  # fmt: skip

    # the two trainers
    tokenizer_run = tokenizer.train(
        tokenizer_config(out / "tokenizer", data.train, weights, num_classes, steps=sizes.tokenizer, seed=seed),
        title="VA-VAE",
    )
    autoencoder = load_autoencoder(tokenizer_run)
    latents = _encode(autoencoder, data.train, out / "latents")
    generator_run = dit.train(
        generator_config(
            out / "generator", out / "latents", tokenizer_run, num_classes, steps=sizes.generator, seed=seed
        ),
        title="LightningDiT",
    )
    generator = load_generator(generator_run)

    # samples, and numbers
    metrics: dict[str, Any] = {"data": kind, "seed": seed, "sizes": dataclasses.asdict(sizes)}
    right = judge.assess(data.held_out_images)[1] == torch.from_numpy(data.held_out_labels)
    metrics["judge_accuracy_held_out"] = float(right.float().mean())
    metrics["tokenizer"] = _assess_tokenizer(autoencoder, data, latents.folder)
    drawn = []
    for name, scale, points in (("samples", 1.0, POINTS), ("samples-guided", GUIDED_SCALE, GUIDED_POINTS)):
        drawing = SampleSpec(num_steps=points, labels="balanced", cfg_scale=scale, seed=seed)
        with ProgressBar("sample", sizes.samples) as bar:
            files = write_samples(
                out / name, generator, autoencoder, drawing, num_samples=sizes.samples, mean=latents.mean,
                std=latents.std, source={"generator": str(generator_run)}, progress=bar.update,
            )  # fmt: skip
        drawn.append(files.npz)
        metrics[f"samples_{sizes.samples}_{sampler_name(drawing)}"] = _assess_samples(judge, files.npz, data)
    metrics["seconds_this_start"] = round(time.perf_counter() - start, 1)
    save_json(out / "metrics.json", metrics)
    pixels = channels_first(data.held_out_images[:SHOWN])
    reconstructions = channels_last(to_uint8(reconstruct(autoencoder, pixels, 0, posterior="mode", seed=0))).numpy()
    report.write(out, data, metrics, plain=drawn[0], guided=drawn[1], reconstructions=reconstructions)
    _print_results(out, metrics)


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """A folder belongs to one kind of demo."""
    path = out / "demo.json"
    if path.is_file():
        remedy = "use another --out"
        refuse_other_settings(out, "a demo", read_json(path, dict[str, Any], remedy=remedy), settings, remedy)
    save_json(path, settings)


def _encode(autoencoder: Autoencoder, pictures: Path, out: Path) -> LatentDataset:
    images = open_images(ImageDataSpec(path=str(pictures), num_workers=2), SIZE)
    with ProgressBar("encode to latents", len(images)) as bar:
        encode(autoencoder, images, out, batch_size=64, flip=False, dtype="fp32", num_workers=2, progress=bar.update)
        bar.update(len(images))
    return LatentDataset(out, flip=False)


def _assess_tokenizer(autoencoder: Autoencoder, data: DemoData, latents: Path) -> dict[str, float]:
    """Reconstruction of images that nothing was trained on, and uniformity of the latent."""
    _, scores = evaluate_tokenizer(autoencoder, channels_first(data.held_out_images).split(64))
    draw, count = open_vectors(latents)
    (uniformity,) = evaluate_latents(draw, min(UNIFORMITY_VECTORS, count), [0])
    return scores | uniformity


def _assess_samples(judge: networks.Judge, npz: Path, data: DemoData) -> dict[str, float]:
    """Agreement of the judge with the labels, and distances of its features to those of the training images."""
    drawn = Npz(npz)
    images, labels = drawn.array("arr_0", (None, None, None, 3), "u"), torch.from_numpy(drawn.array("labels", (None,)))
    fake, predicted = judge.assess(images)
    real, _ = judge.assess(data.train_images)
    precision, recall = precision_recall(real, fake)
    return {
        "agreement": float((predicted == labels).float().mean()),
        "frechet": frechet_distance(*mean_and_covariance(real), *mean_and_covariance(fake)),
        "precision": precision,
        "recall": recall,
    }


def _print_results(out: Path, metrics: dict[str, Any]) -> None:
    table = Table(title="vadit demo", title_justify="left")
    table.add_column("what")
    table.add_column("value", justify="right")
    table.add_row("reconstruction of held-out images, PSNR", f"{metrics['tokenizer']['psnr']:.1f} dB")
    table.add_row("reconstruction of held-out images, SSIM", f"{metrics['tokenizer']['ssim']:.3f}")
    for name, scores in metrics.items():
        if name.startswith("samples_"):
            guidance = f"guidance {GUIDED_SCALE}" if "cfg" in name else "no guidance"
            table.add_row(f"samples that the judge reads as meant, {guidance}", f"{scores['agreement']:.1%}")
            table.add_row(f"Frechet distance in the judge's features, {guidance}", f"{scores['frechet']:.2f}")
    table.add_row("the judge on held-out real images", f"{metrics['judge_accuracy_held_out']:.1%}")
    table.add_row("time of this start", f"{metrics['seconds_this_start']:.0f} s")
    show(table)
    say(*(f"  {out / file}" for file in ("samples.png", "reconstructions.png", "metrics.json", "report.html")))
