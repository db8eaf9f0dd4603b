"""What `vadit new` chooses, each setting with its reason: from the pictures, the machine and the time that is given.

Time goes by FLOPs: steps of a small network of each kind are measured, and others are taken to reach the same FLOP/s,
which larger ones at least do.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vadit.config import Config, FoundationSpec, vary
from vadit.estimate.flops import training_flops
from vadit.estimate.memory import estimate
from vadit.project.measure import Machine, Pictures
from vadit.project.stages import GENERATOR, TOKENIZER
from vadit.recipes import get_recipe
from vadit.recipes.small import small_vit

SIZES = {256: 2, 128: 1, 64: 0, 32: 0}  # side in pixels -> place in WIDTHS of the least that is worth it
WIDTHS = {TOKENIZER: ((16, 1), (32, 1), (64, 2), (128, 2)), GENERATOR: ((128, 4), (256, 8), (384, 12), (768, 12))}
"""Width of the first level and residual blocks per level; width and depth."""
SHARES = {TOKENIZER: 0.40, GENERATOR: 0.45}  # of the time; the rest: foundation model, starts, pictures on the way
LEAST_STEPS = {TOKENIZER: 2000, GENERATOR: 3000}  # where there is time for fewer, pictures are made smaller
GOOD_STEPS = {TOKENIZER: 4000, GENERATOR: 6000}  # where there is time for more, networks are made wider
FOUNDATION_SHARE, VIT_FLOPS = 0.05, 6 * 800_000 * 64  # of the time; per token of a step of 64 images of `small_vit`
ENCODING = 0.25  # FLOPs of encoding an image and its mirror image over those of a training step, about
MEMORY_SHARE = 0.5  # of what is free, that a step may take by the estimate
FEW = 10  # steps that a run has at least


@dataclass
class Draft:
    """A config in the making, and why it is as it is: (setting, value, reason)."""

    config: Any
    reasons: list[tuple[str, str, str]] = field(default_factory=list)

    def take(self, why: str, **groups: dict[str, Any]) -> None:
        """Change settings, for a reason."""
        self.config = vary(self.config, **groups)
        for group, values in groups.items():
            self.reasons += [(f"{group}.{name}", str(value), why) for name, value in values.items()]


@dataclass
class Planner:
    """The rules, over what was found and asked for; `speed` gives the FLOP/s of a config's steps here."""

    pictures: Pictures
    machine: Machine
    speed: Callable[[Config], float]
    minutes: float
    size: int | None = None
    foundation: FoundationSpec | None = None
    vgg_weights: str | None = None
    image_s: dict[tuple[str, int, int], float] = field(default_factory=dict)
    """Seconds of an image in training, by run, size and width, as they become known."""

    def plan(self) -> dict[str, Draft]:
        """Both runs: size by what the smallest networks can do in the time, then widths, then batches and lengths."""
        probe, gpu = min(64, self.size or 64), self.machine.gpu
        self.rates = {name: self.speed(self._draft(name, probe, 2 * gpu).config) for name in WIDTHS}
        size, drafts = self.size or next(filter(self._enough, SIZES), min(SIZES)), {}
        for name, widths in WIDTHS.items():
            steps = [self._steps(name, size, width) for width in range(len(widths))]
            width = max((at for at, count in enumerate(steps) if count >= GOOD_STEPS[name]), default=0)
            drafts[name] = self._draft(name, size, width)
            self._finish(name, drafts[name], max(steps[width], FEW))
        return drafts

    def seconds(self, config: Config, images: int | None = None) -> float:
        """What a run takes, or so many images, by the measured speed."""
        rate = self.rates[TOKENIZER if config.kind == "tokenizer" else GENERATOR]
        return training_flops(config) * (images or config.run.total_images) / rate

    def _enough(self, size: int) -> bool:
        """Whether the pictures have so many pixels, and there is time for so many."""
        large = size > max(self.pictures.side, min(SIZES))
        return not large and all(self._steps(name, size, SIZES[size]) >= least for name, least in LEAST_STEPS.items())

    def _steps(self, name: str, size: int, width: int) -> int:
        """Steps that there is time for, less that of encoding all pictures."""
        encoding = ENCODING * self._image_s(TOKENIZER, size, 0) * self.pictures.count
        time = max(60 * self.minutes - encoding, 30 * self.minutes) * SHARES[name]
        return int(time / self._image_s(name, size, width) / self._draft(name, size, width).config.run.batch_size)

    def _image_s(self, name: str, size: int, width: int) -> float:
        if (name, size, width) not in self.image_s:
            self.image_s[name, size, width] = self.seconds(self._draft(name, size, width).config, 1)
        return self.image_s[name, size, width]

    def _draft(self, name: str, size: int, width: int) -> Draft:
        """A run with one of the WIDTHS."""
        levels, channels = ((1, 1, 2, 2, 4), 32) if size >= 256 else ((1, 1, 2, 4), 16)
        first, second = WIDTHS[name][width]
        wide = ", ".join(str(each) for each, _ in WIDTHS[name])
        wide = f"the widest of {wide} with time for {GOOD_STEPS[name]:,} steps, else the first"
        batch = {TOKENIZER: (16, 64), GENERATOR: (64, 256)}[name][self.machine.gpu]
        most = 1 << (max(self.pictures.count * 3 // 4, 1).bit_length() - 1)  # some may turn out to be bad
        draft = Draft(get_recipe("small-vavae" if name == TOKENIZER else "small-dit"))
        make = self._tokenizer if name == TOKENIZER else self._generator
        make(draft, size, (levels, channels), (first, second), wide)
        draft.take("steps count more than their size; at most the pictures", run={"batch_size": min(batch, most)})
        return draft

    def _tokenizer(self, draft: Draft, size: int, latent: tuple[Any, int], width: tuple[int, int], wide: str) -> None:
        (levels, channels), (first, blocks), factor = latent, width, 2 ** (len(latent[0]) - 1)
        asked = f"the largest of {', '.join(map(str, SIZES))} that the pictures have and there is time for"
        draft.take("as asked for" if self.size else asked, autoencoder={"image_size": size})
        sizes = {"channel_multipliers": levels, "latent_channels": channels}
        draft.take(f"f{factor}: latents of {size // factor} x {size // factor}", autoencoder=sizes)
        draft.take(wide, autoencoder={"base_channels": first, "num_res_blocks": blocks}, loss={"disc_channels": first})
        draft.take("2e-3 at width 16, lower as it is wider", optimizer={"lr": float(f"{2e-3 * 16 / first:.1g}")})
        own = "a small ViT that first learns these pictures" + ", by class" * (self.pictures.num_classes > 1)
        spec = self.foundation or small_vit(size, factor)
        draft.take("as asked for" if self.foundation else own, foundation={"name": spec.name, "weights": spec.weights})
        draft.config = vary(draft.config, foundation=spec)
        without = "no --vgg-weights were given (vgg16-397923af.pth), so no LPIPS: less sharp"
        draft.take(
            "as asked for" if self.vgg_weights else without, loss={"perceptual_weight": float(bool(self.vgg_weights))}
        )
        draft.config = vary(draft.config, loss={"vgg_weights": self.vgg_weights})
        if self.machine.gpu:
            draft.take("what a GPU is fast in", engine={"tf32": "convolutions"})

    def _generator(self, draft: Draft, size: int, latent: tuple[Any, int], width: tuple[int, int], wide: str) -> None:
        classes, side = self.pictures.num_classes, size // 2 ** (len(latent[0]) - 1)
        draft.take("the latents'", model={"input_size": side, "in_channels": latent[1], "num_classes": classes})
        shape = {"hidden_size": width[0], "depth": width[1], "num_heads": max(width[0] // 64, 4)}
        draft.take(wide, model=shape)
        draft.take("2e-3 at width 128, lower as it is wider", optimizer={"lr": float(f"{2e-3 * 128 / width[0]:.1g}")})
        why = "guidance, on all channels: clearer and less varied than 1" if classes > 1 else "guidance needs classes"
        draft.take(why, sample={"cfg_scale": 2.0 if classes > 1 else 1.0})
        if self.machine.gpu:
            draft.take("what a GPU is fast in", engine={"precision": "autocast"})

    def _finish(self, name: str, draft: Draft, steps: int) -> None:
        """Batch by the memory, then lengths; `steps` are those of the batch so far."""
        asked = batch = draft.config.run.batch_size
        while batch > 1 and estimate(draft.config, 1).stages[0].total > MEMORY_SHARE * self.machine.free:
            batch //= 2
            draft.config = vary(draft.config, run={"batch_size": batch})
        if batch < asked:
            draft.take(f"a step takes {MEMORY_SHARE:.0%} of the free memory at most", run={"batch_size": batch})
        steps = steps * asked // batch

        def every(parts: int) -> int:
            return max(steps // parts, 1) * batch

        length = f"{steps:,} steps: {SHARES[name]:.0%} of {self.minutes:g} minutes by a measured step"
        draft.take(length, run={"total_images": steps * batch})
        draft.take("60 log points", run={"log_every_images": every(60)})
        draft.take("5 checkpoints, of which the last stays", run={"save_every_images": every(5)})
        if name == GENERATOR:
            draft.config = vary(draft.config, evaluation={"tokenizer": TOKENIZER, "steps": 25})
        draft.take("pictures on the way, 4 times", evaluation={"every_images": every(4)})
        if name == GENERATOR:
            decay = min(max(1 - 10 / steps, 0.5), 0.9999)
            draft.take("over the last tenth of the run, with warm-up", engine={"ema_decays": (round(decay, 5),)})
            return
        draft.take("the last quarter of the run", loss={"disc_start_step": steps * 3 // 4 + 1})
        draft.take("as many as there are cores, at most 8", data={"num_workers": min(self.machine.cores, 8)})
        if self.foundation is None:
            step_s = VIT_FLOPS * draft.config.autoencoder.latent_size**2 / self.rates[GENERATOR]
            own = int(min(max(FOUNDATION_SHARE * 60 * self.minutes / step_s, FEW), 500))
            draft.take(f"{FOUNDATION_SHARE:.0%} of the time, at most 500 steps", foundation={"own_steps": own})
