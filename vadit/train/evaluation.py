"""An evaluation of the network while it trains: samples or reconstructions, a picture, a few numbers.

All processes take part: each puts the averaged weights together from everyone's shares, draws its part of the images,
and the first one scores and writes what all have made. Sample i is a function of (seed, i), so the picture shows the
same noise and labels every time, on any number of processes.

Training does not notice. The network that is evaluated is another one, all random states are put back, no loader is
touched. An evaluation that fails is reported and counted, and the run goes on: between two collectives each process
catches what goes wrong on it, then all agree whether to go on.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from vadit.config import DiTConfig, EvaluationSpec, SampleSpec, TokenizerConfig
from vadit.eval.metrics import count_name
from vadit.eval.samples import SampleScorer
from vadit.eval.tokenizer import psnr, reconstruct
from vadit.images.backends import open_decoder
from vadit.images.loader import ImageSet, load_in_order
from vadit.images.pixels import channels_last, image_grid, reconstruction_pairs, to_uint8, write_png
from vadit.latents.dataset import DebugLatents, LatentDataset
from vadit.latents.loader import label_ranges
from vadit.models.autoencoder import Autoencoder
from vadit.models.masked import build_generator
from vadit.models.pretrained import Origin
from vadit.runtime import distributed
from vadit.runtime.console import note
from vadit.runtime.errors import RunError, UsageError, first_line
from vadit.runtime.precision import Precision, computing, resolved
from vadit.runtime.run_log import RunLog
from vadit.runtime.spread import spread
from vadit.sampling.draw import decode, draw, null_is_untrained, sampler_name, spare_points
from vadit.train.checkpoint.checkpoints import Position
from vadit.train.checkpoint.export import load_autoencoder
from vadit.train.ema import ShardedEMA, start_share

Beat = Callable[[], None]
Latents = LatentDataset | DebugLatents


class Made(NamedTuple):
    """What one process has made, by image."""

    features: dict[int, np.ndarray]  # (F,) fp32: what the numbers are taken from
    pictures: dict[int, np.ndarray]  # (H, W, 3) uint8: images of the picture


class _Failed(Exception):
    """Why an evaluation is left out, in the same words on all processes."""


class Evaluation:
    """Evaluates the weights of one engine, averaged where it averages; the two networks have classes of their own."""

    def __init__(self, spec: EvaluationSpec, ema: ShardedEMA, folder: Path) -> None:
        self._ema, self._folder, self._device = ema, folder, ema.engine.device
        self.every_images = spec.every_images
        self.precision: Precision = "fp32"  # of the network
        self.inputs: dict[str, Any] = {}  # what the numbers rest on
        self.failures = 0  # evaluations that failed in this start of the run

    def network(self) -> nn.Module:
        """A network of the kind that is trained, for its weights."""
        raise NotImplementedError

    def make(self, network: nn.Module, beat: Beat) -> Made:
        """This process's part; no collectives."""
        raise NotImplementedError

    def finish(self, features: np.ndarray, pictures: np.ndarray) -> tuple[dict[str, float], Image.Image]:
        """The numbers by name, and the picture, of what all processes have made, in the order of the images."""
        raise NotImplementedError

    def run(self, position: Position, log: RunLog, beat: Beat) -> None:
        """Evaluate, and log what was found; `beat` is called now and then. Collective."""
        begin = time.perf_counter()
        line: dict[str, Any] = {"images": position.images_seen, "step": position.step, "precision": self.precision}
        picture = None
        for decay in [*self._ema.shards][:1]:
            share = start_share(position.step, decay, self._ema.engine.spec.ema_warmup)
            Origin(decay, share).warn(f"evaluation after {position.images_seen:,} images")
        try:
            with _undisturbed(self._device):
                values, picture = self._evaluate(beat)
            if picture is not None:
                values["grid"] = f"evaluations/{position.images_seen:010d}.png"
                write_png(self._folder / values["grid"], picture)
            line |= values | ({"inputs": self.inputs} if self.inputs else {})
        except (_Failed, RunError) as failure:
            self.failures += 1
            line["failed"] = str(failure)
            if distributed.is_main():
                text = f"the evaluation after {position.images_seen:,} images failed: {failure}; training goes on"
                note(text, "bold red")
        line["seconds"] = time.perf_counter() - begin
        log.write_evaluation(line, None if picture is None else np.asarray(picture))
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # the run's own memory is as whole as it was

    def _evaluate(self, beat: Beat) -> tuple[dict[str, Any], Image.Image | None]:
        """Numbers and picture on the main process. What may fail on one process alone lies between collectives."""
        network = self._together(lambda: self.network().to(self._device).eval().requires_grad_(False))
        shards = next(iter(self._ema.shards.values()), None)
        own, engine = network.state_dict(), self._ema.engine
        for name, value in engine.whole_weights(engine.masters() if shards is None else shards):
            if name in own:  # a projector serves training alone
                own.pop(name).copy_(value)
        assert not own, f"the network that is trained has no {min(own)}"
        beat()
        with computing("fp32", self._device):
            made: Made = self._together(lambda: self.make(network, beat))
        parts = distributed.all_gathered(made)
        beat()
        features = {index: row for part in parts for index, row in part.features.items()}
        pictures = {index: row for part in parts for index, row in part.pictures.items()}
        return self._together(
            lambda: self.finish(_stacked(features), _stacked(pictures)) if distributed.is_main() else ({}, None)
        )

    def _together(self, work: Callable[[], Any]) -> Any:
        """What `work` returns, or _Failed on every process where it failed on any. Collective."""
        problem, found = "", None
        try:
            found = work()
        except Exception as error:  # whatever it is, an evaluation is not worth the run
            problem = f"{type(error).__name__}: {first_line(error)}"
        if not distributed.any_rank(bool(problem), self._device):
            return found
        raise _Failed(problem or "another process could not do its part")


def _stacked(rows: dict[int, np.ndarray]) -> np.ndarray:
    return np.stack([rows[index] for index in sorted(rows)]) if rows else np.empty(0)


@contextlib.contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Random states of torch come back as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        yield


def quick_sampler(sample: SampleSpec, evaluation: EvaluationSpec) -> SampleSpec:
    """A recipe's sampler with the few steps of an evaluation in training."""
    method = "euler" if sample.method == "dopri5" else sample.method
    quick = dataclasses.replace(sample, method=method, seed=0)
    return dataclasses.replace(quick, num_steps=max(evaluation.steps + spare_points(quick), 2))


class Samples(Evaluation):
    """Samples, decoded; FID and KID where there is a reference.

    All is loaded at once: UsageError where the tokenizer does not fit the generator or a path is wrong, RunError where
    a file is damaged.
    """

    def __init__(self, config: DiTConfig, dataset: Latents, ema: ShardedEMA, folder: Path) -> None:
        spec = config.evaluation
        super().__init__(spec, ema, folder)
        self._config, self._dataset = config, dataset
        self._sampler = quick_sampler(config.sample, spec)
        self.precision = resolved(spec.precision, self._device, generator=True)
        if null_is_untrained(config.model, self._sampler):  # the trainer has said so
            self._sampler = dataclasses.replace(self._sampler, cfg_scale=1.0)
        self._scorer: SampleScorer | None = None
        with _undisturbed(self._device):
            assert spec.tokenizer is not None, "the config was checked"
            self._autoencoder = load_autoencoder(spec.tokenizer).to(self._device).eval().requires_grad_(False)
            if (channels := self._autoencoder.spec.latent_channels) != config.model.in_channels:
                raise UsageError(
                    f"evaluation.tokenizer {spec.tokenizer} decodes {channels} channels, the generator makes "
                    f"{config.model.in_channels}; name the tokenizer that encoded its training data"
                )
            if (reference := spec.reference) is not None:
                weights, cache = spec.inception_weights, folder / "evaluations"
                # The first process reads the reference; the others find its features in the run folder.
                self._scorer = distributed.main_first(
                    lambda: SampleScorer(reference, inception_weights=weights, device=self._device, cache=cache)
                )
                self.inputs = self._scorer.inputs

    def network(self) -> nn.Module:
        model = build_generator(self._config.model, self._config.mask)
        model.origin = Origin(classes=tuple(label_ranges(self._dataset.labels)))
        return model

    def make(self, network: nn.Module, beat: Beat) -> Made:
        config, spec = self._config, self._config.evaluation
        scored = spec.num_samples if self._scorer is not None else 0
        count, drawn = max(scored, spec.grid_images), []
        for part in draw(network, self._sampler, num_samples=count, flow=config.flow, precision=self.precision):
            drawn.append(part)
            beat()
        made = Made({}, {})
        for part in drawn:
            pixels = decode(self._autoencoder, self._dataset.denormalize(part.latents))
            places = [place for place, index in enumerate(part.indices) if index < scored]
            if self._scorer is not None and places:
                rows = self._scorer.features(pixels[places].expand(-1, 3, -1, -1)).cpu().numpy()
                made.features.update(zip([part.indices[place] for place in places], rows, strict=True))
            shown = channels_last(pixels.cpu()).numpy()
            made.pictures.update(
                (index, shown[place]) for place, index in enumerate(part.indices) if index < spec.grid_images
            )
            beat()
        return made

    def finish(self, features: np.ndarray, pictures: np.ndarray) -> tuple[dict[str, float], Image.Image]:
        values: dict[str, float] = {}
        wanted = self._config.evaluation.num_samples
        if self._scorer is not None:
            if len(features) != wanted:
                raise RunError(f"{len(features)} of {wanted} samples were made; a part gives no number")
            values = self._scorer.score(torch.from_numpy(features), sampler_name(self._sampler))
        return values, image_grid(pictures)


class Reconstructions(Evaluation):
    """Images evenly spread over the training data, what becomes of them, and their PSNR; the mean is decoded."""

    def __init__(self, config: TokenizerConfig, images: ImageSet, ema: ShardedEMA, folder: Path) -> None:
        super().__init__(config.evaluation, ema, folder)
        self._config, self._images = config, images
        self._count = min(config.evaluation.grid_images, len(images))
        self._decoder, _ = open_decoder("torch", images, num_workers=1)

    def network(self) -> nn.Module:
        return Autoencoder(self._config.autoencoder)

    def make(self, network: nn.Module, beat: Beat) -> Made:
        assert isinstance(network, Autoencoder), "made by network()"
        places = spread(len(self._images), self._count).tolist()
        own = {places[index]: index for index in range(distributed.rank(), self._count, distributed.world_size())}
        made = Made({}, {})
        with self._decoder() as decoder:
            # One at a time, so that a picture is the same on any number of processes.
            for batch in load_in_order(self._images, list(own), 1, decoder):
                pixels, index = batch.images.to(self._device), own[int(batch.ids[0])]
                again = to_uint8(reconstruct(network, pixels, 0, posterior="mode"))
                made.features[index] = psnr(pixels, again).float().cpu().numpy()
                made.pictures[index] = channels_last(torch.cat([pixels, again], dim=3).cpu())[0].numpy()
                beat()
        return made

    def finish(self, features: np.ndarray, pictures: np.ndarray) -> tuple[dict[str, float], Image.Image]:
        if len(features) == 0:
            raise RunError("none of the images decodes")
        originals, again = np.split(pictures, 2, axis=2)
        return {f"psnr{count_name(len(features))}": float(features.mean())}, reconstruction_pairs(originals, again)
