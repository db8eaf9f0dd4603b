"""`vadit demo`: foundation model -> VA-VAE -> latents -> LightningDiT -> samples -> evaluation -> report.

Small sizes, the ordinary parts: the two trainers under DeepSpeed, the image and latent loaders, the shard format, the
samplers. Each stage leaves its result in the folder and is not repeated, so the same command goes on after a stop.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from vadit.config import (
    AutoencoderSpec,
    DiTConfig,
    DiTSpec,
    EngineSpec,
    FlowSpec,
    ImageDataSpec,
    LatentDataSpec,
    OptimizerSpec,
    RunSpec,
    SampleSpec,
    TokenizerConfig,
    TokenizerLossSpec,
)
from vadit.demo import networks, report
from vadit.demo.data import SIZE, DemoData, prepare
from vadit.demo.options import DemoOptions
from vadit.eval.latents import evaluate_latents, open_vectors
from vadit.eval.metrics import frechet_distance, mean_and_covariance, precision_recall
from vadit.eval.tokenizer import evaluate_tokenizer, reconstruct
from vadit.images.backends import open_images
from vadit.images.pixels import channels_last, to_uint8
from vadit.latents.dataset import LatentDataset
from vadit.latents.encode import encode
from vadit.models.foundation import FoundationModel
from vadit.runtime import rng
from vadit.runtime.console import ProgressBar, console
from vadit.runtime.errors import UsageError
from vadit.sampling.draw import sampler_name
from vadit.sampling.write import write_samples
from vadit.train import dit, tokenizer
from vadit.train.checkpoint.export import load_autoencoder, load_generator

GUIDED_SCALE = 2.5
UNIFORMITY_VECTORS = 800


@dataclass(frozen=True)
class Sizes:
    """Lengths of the demo's stages: training in optimizer steps, samples in images."""

    foundation: int
    judge: int
    tokenizer: int
    generator: int
    samples: int


FULL = Sizes(foundation=200, judge=300, tokenizer=600, generator=1000, samples=500)
QUICK = Sizes(foundation=60, judge=100, tokenizer=120, generator=200, samples=100)


def sizes(options: DemoOptions) -> Sizes:
    """Lengths for what was asked."""
    return QUICK if options.quick else FULL


def tokenizer_config(
    out: Path, images: Path, foundation: Path, num_classes: int, *, steps: int, vf_weight: float, seed: int
) -> TokenizerConfig:
    """An f8d16 VA-VAE of 0.7M weights for 32x32 images; its VF loss is that of the paper's single-stage recipe."""
    batch = 16  # many small steps: 700 of 16 reach 32.9 dB where 320 of 32 reach 26.5
    return TokenizerConfig(
        autoencoder=AutoencoderSpec(
            image_size=SIZE, latent_channels=16, base_channels=16, channel_multipliers=(1, 1, 2, 4), num_res_blocks=1,
            attention_resolutions=(), norm_groups=16,
        ),
        foundation=networks.foundation_spec(str(foundation), num_classes),
        # No VGG file comes with any package, so no LPIPS.
        loss=TokenizerLossSpec(
            perceptual_weight=0.0, disc_channels=16, disc_layers=2, disc_start_step=steps * 3 // 4, disc_weight=0.1,
            vf_weight=vf_weight,
        ),
        optimizer=OptimizerSpec(lr=2e-3, betas=(0.5, 0.9), schedule="one_cycle"),
        engine=EngineSpec(ema_decays=(), max_grad_norm=0.0),
        run=RunSpec(
            out=str(out), total_images=steps * batch, batch_size=batch, seed=seed,
            log_every_images=10 * batch, save_every_images=200 * batch, keep_checkpoints=1,
        ),
        data=ImageDataSpec(path=str(images), loader="torch", num_workers=2),  # the same numbers everywhere
    )  # fmt: skip


def generator_config(out: Path, latents: Path, num_classes: int, *, steps: int, seed: int) -> DiTConfig:
    """A LightningDiT of 1.3M weights on 4x4 latents with every switch of the paper's."""
    batch = 64
    return DiTConfig(
        # label_init_std 1: with 0.02 the classes are not learnt in so few steps.
        model=DiTSpec(
            input_size=4, in_channels=16, hidden_size=128, depth=4, num_heads=4, num_classes=num_classes,
            label_init_std=1.0,
        ),
        flow=FlowSpec(),
        optimizer=OptimizerSpec(lr=2e-3, schedule="one_cycle"),
        engine=EngineSpec(ema_decays=(0.99,)),
        run=RunSpec(
            out=str(out), total_images=steps * batch, batch_size=batch, seed=seed,
            log_every_images=10 * batch, save_every_images=200 * batch, keep_checkpoints=1,
        ),
        data=LatentDataSpec(path=str(latents), flip=False),
        sample=SampleSpec(num_steps=50, seed=seed, labels="balanced"),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ the stages


class Demo:
    """The stages of one demo folder, each a method that does its part once."""

    def __init__(self, options: DemoOptions) -> None:
        self.options = options
        self.sizes = sizes(options)
        self.out = Path(options.out)
        self._claim()
        self.data: DemoData = prepare(self.out / "data", options.data)
        self.num_classes = len(self.data.classes)

    def _claim(self) -> None:
        """A folder belongs to one kind of demo."""
        mine = {"data": self.options.data, "quick": self.options.quick}
        path = self.out / "demo.json"
        if path.is_file() and (found := json.loads(path.read_text())) != mine:
            raise UsageError(f"{self.out} holds a demo made with {found}, this command says {mine}; use another --out")
        self.out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(mine))

    def _classifier(self, file: str, title: str, build: Callable[[], Any], *, steps: int, seed: int) -> Any:
        images, labels = networks.as_input(self.data.train_images), torch.from_numpy(self.data.train_labels)

        def train(network: Any) -> None:
            with ProgressBar(title, steps * networks.BATCH) as bar:
                networks.fit(network, images, labels, steps=steps, seed=seed, noise=0.1, progress=bar.update)

        torch.manual_seed(rng.fold(seed))
        return networks.train_once(self.out / "networks" / file, build, train)

    @property
    def foundation_weights(self) -> Path:
        """File of the small foundation model's weights."""
        return self.out / "networks" / "foundation.safetensors"

    def foundation(self) -> None:
        """Train the small vision foundation model on the labels."""

        def build() -> Any:
            return FoundationModel(
                networks.foundation_spec("random", self.num_classes), SIZE // 8
            ).model.requires_grad_(True)

        self._classifier("foundation.safetensors", "foundation model", build, steps=self.sizes.foundation, seed=1)

    def judge(self) -> networks.Judge:
        """Train the classifier that judges samples."""
        judge: networks.Judge = self._classifier(
            "judge.safetensors", "independent judge", lambda: networks.Judge(self.num_classes),
            steps=self.sizes.judge, seed=2,
        )  # fmt: skip
        return judge

    def tokenizer(self, name: str = "tokenizer", *, vf_weight: float = 0.1, seed: int = 0) -> Path:
        """Train VA-VAE against the foundation model."""
        config = tokenizer_config(
            self.out / name, self.data.train, self.foundation_weights, self.num_classes,
            steps=self.sizes.tokenizer, vf_weight=vf_weight, seed=seed,
        )  # fmt: skip
        return tokenizer.train(config, title=_title("VA-VAE", name))

    def latents(self, tokenizer_run: Path, name: str = "latents") -> Path:
        """Encode the training images."""
        spec = ImageDataSpec(path=str(self.data.train), num_workers=2)
        images = open_images(spec, SIZE)
        with ProgressBar(_title("encode to latents", name), len(images)) as bar:
            encode(
                load_autoencoder(tokenizer_run), images, self.out / name,
                batch_size=64, flip=False, dtype="fp32", num_workers=2, progress=bar.update,
            )  # fmt: skip
            bar.update(len(images))
        return self.out / name

    def generator(self, latents: Path, name: str = "generator", *, seed: int = 0) -> Path:
        """Train LightningDiT on the latents."""
        config = generator_config(self.out / name, latents, self.num_classes, steps=self.sizes.generator, seed=seed)
        return dit.train(config, title=_title("LightningDiT", name))

    def samples(
        self, generator: Path, tokenizer_run: Path, latents: Path, name: str, *, cfg_scale: float, seed: int = 0
    ) -> Path:
        """Draw and decode samples."""
        dataset = LatentDataset(latents, flip=False)
        spec = SampleSpec(num_steps=50, seed=seed, labels="balanced", cfg_scale=cfg_scale)
        with ProgressBar(_title("sample", name), self.sizes.samples) as bar:
            files = write_samples(
                self.out / name, load_generator(generator), load_autoencoder(tokenizer_run), spec,
                num_samples=self.sizes.samples, mean=dataset.mean, std=dataset.std,
                source={"generator": str(generator)}, progress=bar.update,
            )  # fmt: skip
        return files.npz

    # -------------------------------------------------------------------------------------------- numbers

    def judge_samples(self, judge: networks.Judge, npz: Path) -> dict[str, float]:
        """Agreement of the judge with the labels, and distances of its features to those of the training images."""
        with np.load(npz) as file:
            images, labels = file["arr_0"], torch.from_numpy(file["labels"])
        fake, predicted = judge.assess(images)
        real, _ = judge.assess(self.data.train_images)
        precision, recall = precision_recall(real, fake)
        return {
            "agreement": float((predicted == labels).float().mean()),
            "frechet": frechet_distance(*mean_and_covariance(real), *mean_and_covariance(fake)),
            "precision": precision,
            "recall": recall,
        }

    def judge_tokenizer(self, tokenizer_run: Path, latents: Path) -> dict[str, float]:
        """Reconstruction of images that nothing was trained on, and uniformity of the latent."""
        autoencoder = load_autoencoder(tokenizer_run)
        held_out = torch.from_numpy(self.data.held_out_images).permute(0, 3, 1, 2)
        scores = evaluate_tokenizer(autoencoder, held_out.split(64))
        num_vectors = min(UNIFORMITY_VECTORS, len(self.data.train_images))
        (uniformity,) = evaluate_latents(open_vectors(latents), num_vectors, [0])
        return {"psnr": scores.psnr, "ssim": scores.ssim, **uniformity}


def _title(what: str, name: str) -> str:
    """Folders of the comparison carry their variant behind a dash."""
    variant = name.partition("-")[2]
    return f"{what} ({variant})" if variant else what


def fastest_threads() -> int:
    """1 or all cores, whichever is faster right now on a step of the demo's size.

    Small tensors leave little to share out, and on a machine that does other work threads wait for each other.
    """
    before = torch.get_num_threads()
    network, x = torch.nn.Conv2d(16, 16, 3, padding=1), torch.randn(16, 16, SIZE, SIZE)
    seconds: dict[int, list[float]] = {1: [], before: []}
    for _ in range(15):
        for threads, found in seconds.items():
            torch.set_num_threads(threads)
            began = time.perf_counter()
            network(network(x)).sum().backward()
            found.append(time.perf_counter() - began)
    torch.set_num_threads(before)
    return min(seconds, key=lambda threads: float(np.median(seconds[threads])))


def run_demo(options: DemoOptions) -> None:
    """Everything that `vadit demo` does."""
    start = time.perf_counter()
    torch.set_num_threads(fastest_threads())
    console.print(f"[bold]vadit demo[/bold]: {options.data}, into {options.out}")
    demo = Demo(options)
    demo.foundation()
    judge = demo.judge()
    tokenizer_run = demo.tokenizer()
    latents = demo.latents(tokenizer_run)
    generator = demo.generator(latents)
    plain = demo.samples(generator, tokenizer_run, latents, "samples", cfg_scale=1.0)
    guided = demo.samples(generator, tokenizer_run, latents, "samples-guided", cfg_scale=GUIDED_SCALE)

    metrics: dict[str, Any] = {"data": options.data, "sizes": dataclasses.asdict(demo.sizes)}
    held_out_agreement = judge.assess(demo.data.held_out_images)[1] == torch.from_numpy(demo.data.held_out_labels)
    metrics["judge_accuracy_held_out"] = float(held_out_agreement.float().mean())
    metrics["tokenizer"] = demo.judge_tokenizer(tokenizer_run, latents)
    for npz, scale in ((plain, 1.0), (guided, GUIDED_SCALE)):
        name = f"{demo.sizes.samples}_{sampler_name(SampleSpec(num_steps=50, labels='balanced', cfg_scale=scale))}"
        metrics[f"samples_{name}"] = demo.judge_samples(judge, npz)
    metrics["seconds_this_start"] = round(time.perf_counter() - start, 1)
    (demo.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    report.write(
        demo.out, demo.data, metrics, tokenizer_run=tokenizer_run, generator=generator, plain=plain, guided=guided,
        reconstructions=reconstruction_pixels(demo, tokenizer_run, 24),
    )  # fmt: skip
    _print_results(demo.out, metrics)


def reconstruction_pixels(demo: Demo, tokenizer_run: Path, count: int) -> np.ndarray:
    """Reconstructions uint8 (count, H, W, 3) of the first held-out images."""
    pixels = torch.from_numpy(demo.data.held_out_images[:count]).permute(0, 3, 1, 2)
    with torch.no_grad():
        decoded = reconstruct(load_autoencoder(tokenizer_run), pixels, 0, posterior="mode", seed=0)
    return channels_last(to_uint8(decoded)).numpy()


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
    console.print(table)
    for file in ("samples.png", "reconstructions.png", "metrics.json", "report.html"):
        console.print(f"  {out / file}")
