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


@dataclass
class Draft:
    """A config in the making, and why it is as it is: (setting, value, reason)."""

    config: Any
    reasons: list[tuple[str, str, str]] = field(default_factory=list)

    def take(self, why: str, group: str, **values: Any) -> None:
        """Change settings of a group, for a reason."""
        self.config = vary(self.config, **{group: values})
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

    def plan(self) -> dict[str, Draft]:
        """Both runs: size by what the smallest networks can do in the time, then widths, then batches and lengths."""
        self.time_s, probe = 60 * self.minutes, min(64, self.size or 64)
        self.rates = {name: self.speed(self._draft(name, probe, 2 * self.machine.gpu).config) for name in WIDTHS}
        size = self.size or next(filter(self._enough, SIZES), min(SIZES))
        encoding = ENCODING * self.seconds(self._draft(TOKENIZER, size, 0).config, self.pictures.num_images)
        self.time_s = max(self.time_s - encoding, self.time_s / 2)
        drafts = {}
        for name, widths in WIDTHS.items():
            found = [self._draft(name, size, width) for width in range(len(widths))]
            fit = [draft for draft in found[1:] if self._steps(name, draft) >= GOOD_STEPS[name]]
            drafts[name] = (found[:1] + fit)[-1]
            self._finish(name, drafts[name])
        return drafts

    def seconds(self, config: Config, images: int | None = None) -> float:
        """What a run takes, or so many images, by the measured speed."""
        rate = self.rates[TOKENIZER if config.kind == "tokenizer" else GENERATOR]
        return training_flops(config) * (images or config.run.total_images) / rate

    def _enough(self, size: int) -> bool:
        """Whether the pictures have so many pixels, and there is time for so many."""
        drafts = {name: self._draft(name, size, SIZES[size]) for name in WIDTHS}
        small = size <= max(self.pictures.side, min(SIZES))
        return small and all(self._steps(name, draft) >= LEAST_STEPS[name] for name, draft in drafts.items())

    def _steps(self, name: str, draft: Draft) -> int:
        return int(self.time_s * SHARES[name] / self.seconds(draft.config, draft.config.run.batch_size))

    def _draft(self, name: str, size: int, place: int) -> Draft:
        """A run with one of the WIDTHS."""
        (width, depth), gpu, widths = WIDTHS[name][place], self.machine.gpu, [each for each, _ in WIDTHS[name]]
        why = f"the widest of {widths} with time for {GOOD_STEPS[name]:,} steps, else the first"
        levels, channels = ((1, 1, 2, 2, 4), 32) if size >= 256 else ((1, 1, 2, 4), 16)
        factor, classes = 2 ** (len(levels) - 1), self.pictures.num_classes
        if name == TOKENIZER:
            draft, batch, usual = Draft(get_recipe("small-vavae")), 64 if gpu else 16, widths[0]
            asked = f"the largest of {list(SIZES)} that the pictures have and there is time for"
            draft.take("as asked for" if self.size else asked, "autoencoder", image_size=size)
            latent = f"f{factor}: latents of {size // factor} x {size // factor}"
            draft.take(latent, "autoencoder", channel_multipliers=levels, latent_channels=channels)
            draft.take(why, "autoencoder", base_channels=width, num_res_blocks=depth)
            draft.take("as the tokenizer's", "loss", disc_channels=width)
            self._judges(draft, small_vit(size, factor))
        else:
            draft, batch, usual = Draft(get_recipe("small-dit")), 256 if gpu else 64, widths[0]
            latents = {"input_size": size // factor, "in_channels": channels, "num_classes": classes}
            draft.take("the latents'", "model", **latents)
            draft.take(why, "model", hidden_size=width, depth=depth, num_heads=max(width // 64, 4))
            guided = "on all channels: clearer and less varied than 1" if classes > 1 else "guidance needs classes"
            draft.take(guided, "sample", cfg_scale=2.0 if classes > 1 else 1.0)
        if gpu:
            fast = {"tf32": "convolutions"} if name == TOKENIZER else {"precision": "autocast"}
            draft.take("what a GPU is fast in", "engine", **fast)
        rate = float(f"{2e-3 * usual / width:.1g}")
        draft.take(f"2e-3 at width {usual}, lower as it is wider", "optimizer", lr=rate)
        most = 1 << (max(self.pictures.num_images * 3 // 4, 1).bit_length() - 1)  # some may turn out to be bad
        draft.take("many steps count more than large ones; at most the pictures", "run", batch_size=min(batch, most))
        return draft

    def _judges(self, draft: Draft, small: FoundationSpec) -> None:
        """The networks that a tokenizer's losses look through."""
        spec, lpips = self.foundation or small, self.vgg_weights is not None
        draft.config = vary(draft.config, foundation=spec, loss={"vgg_weights": self.vgg_weights})
        own = "a small ViT that first learns these pictures" + ", by class" * (self.pictures.num_classes > 1)
        draft.take("as asked for" if self.foundation else own, "foundation", name=spec.name, weights=spec.weights)
        without = "no --vgg-weights were given (vgg16-397923af.pth), so no LPIPS: less sharp"
        draft.take("as asked for" if lpips else without, "loss", perceptual_weight=float(lpips))

    def _finish(self, name: str, draft: Draft) -> None:
        """Batch by the memory, then lengths."""
        batch = draft.config.run.batch_size
        while batch > 1 and estimate(draft.config, 1).stages[0].total > MEMORY_SHARE * self.machine.free:
            batch //= 2
            draft.take(f"a step takes {MEMORY_SHARE:.0%} of the free memory at most", "run", batch_size=batch)
        steps = max(self._steps(name, draft), 10)

        def every(parts: int) -> int:
            return max(steps // parts, 1) * batch

        length = f"{steps:,} steps: {SHARES[name]:.0%} of {self.minutes:g} minutes by a measured step"
        draft.take(length, "run", total_images=steps * batch)
        draft.take("60 log points", "run", log_every_images=every(60))
        draft.take("5 checkpoints, of which the last stays", "run", save_every_images=every(5))
        if name == GENERATOR:
            draft.config = vary(draft.config, evaluation={"tokenizer": TOKENIZER, "steps": 25})
            decay = round(min(max(1 - 10 / steps, 0.5), 0.9999), 5)
            draft.take("over the last tenth of the run, with warm-up", "engine", ema_decays=(decay,))
        else:
            draft.take("the last quarter of the run", "loss", disc_start_step=steps * 3 // 4 + 1)
            draft.take("as many as there are cores, at most 8", "data", num_workers=min(self.machine.cores, 8))
            step_s = VIT_FLOPS * draft.config.autoencoder.latent_size**2 / self.rates[GENERATOR]
            own = int(min(max(FOUNDATION_SHARE * self.time_s / step_s, 10), 500))
            draft.take(f"{FOUNDATION_SHARE:.0%} of the time, at most 500", "foundation", own_steps=own)
        draft.take("pictures on the way, 4 times", "evaluation", every_images=every(4))
