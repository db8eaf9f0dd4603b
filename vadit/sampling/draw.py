"""Samples from a generator: which noise and label each has, and how they are drawn.

Sample i is a function of (seed, i) and the settings alone: of no batch size, number of processes or place of a restart.
Its noise, label and SDE noise are keyed by (seed, i), and since the last bits of a matrix product depend on how many
rows it has (and dopri5's steps on all of them), all arithmetic runs on aligned groups of 64 indices, whole ones always.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vadit.config import DiTSpec, FlowSpec, SampleSpec
from vadit.images.pixels import to_uint8
from vadit.models.autoencoder import Autoencoder
from vadit.models.pretrained import Origin
from vadit.runtime import distributed, rng
from vadit.runtime.errors import UsageError
from vadit.runtime.precision import Precision, as_computed, computing
from vadit.sampling.solvers import evaluation, sample_ddpm, sample_ode, sample_sde

GROUP = 64  # samples that are computed together: index i belongs to group i // 64
COMPILED_FROM = 500_000  # samples x points from which compiling repays its start of a minute or two (modelled)
DECODE_BATCH = 16  # latents decoded together: a decoder's activations are large; the cut must depend on nothing


class Drawn(NamedTuple):
    """Some samples."""

    indices: list[int]
    latents: Tensor  # (n, C, h, w), as the generator knows them (normalised)
    labels: Tensor  # (n,) int64


def spare_points(spec: SampleSpec) -> int:
    """How many more `num_steps` counts than there are steps: 1 where they lie between the points of a grid, else 0."""
    closes = spec.method == "euler_maruyama" and spec.sde_last_step != "none"  # a step of its own after the grid's
    return 0 if spec.method == "ddpm" or closes else 1


def sampler_name(spec: SampleSpec, *, autoguidance: bool = False, listed: bool = False) -> str:
    """How samples were drawn, for the name of a metric: euler249_shift0.3_cfg10_from0.11_ch3_random.

    The number is that of steps: linspace(0, 1, 250) has 249, though the authors' tables say euler250. The last word is
    the law of the labels; `listed`: they were given.
    """
    parts = [spec.method if spec.method == "dopri5" else f"{spec.method}{spec.num_steps - spare_points(spec)}"]
    if spec.method == "euler_maruyama":
        parts += [spec.sde_diffusion] * (spec.sde_diffusion != SampleSpec.sde_diffusion)
        parts += [spec.sde_last_step] * (spec.sde_last_step != SampleSpec.sde_last_step)
    if spec.timestep_shift > 0:
        parts.append(f"shift{spec.timestep_shift:g}")
    if spec.cfg_scale != 1:
        parts.append(f"{'autoguided' if autoguidance else 'cfg'}{spec.cfg_scale:g}")
        low, high = spec.cfg_interval
        parts += [f"from{low:g}"] * (low > 0) + [f"to{high:g}"] * (high < 1)
        parts += [f"ch{spec.cfg_channels}"] * (spec.cfg_channels is not None)
        parts += [f"power{spec.cfg_power:g}"] if spec.cfg_power is not None else []
    return "_".join([*parts, "listed" if listed else spec.labels])


def sample_labels(
    indices: Sequence[int], seed: int, classes: Tensor, law: str, fixed: Sequence[int] | None = None
) -> Tensor:
    """Labels (n,) int64 of samples `indices`: `fixed` over and over, or of `classes` by `law` random or balanced.

    balanced takes them in turn, so they are equally frequent where their number divides the count.
    """
    ids = torch.tensor(list(indices), dtype=torch.int64)
    if fixed is not None:
        return torch.tensor(list(fixed))[ids % len(fixed)]
    if law == "balanced":
        return classes[ids % len(classes)]
    return classes[rng.integers(rng.fold(seed, "label"), ids, len(classes))]


def trained_classes(model: Any) -> Tensor:
    """Labels (n,) int64 that a generator can be asked for: all, or those that its training had samples of."""
    known = torch.zeros(model.num_classes, dtype=torch.bool)
    for first, last in getattr(model, "origin", Origin()).classes or ():
        known[max(first, 0) : max(min(last, model.num_classes) + 1, 0)] = True
    return known.nonzero().flatten() if known.any() else torch.arange(model.num_classes)


def draw(
    model: Any,
    spec: SampleSpec,
    *,
    num_samples: int,
    flow: FlowSpec | None = None,
    guide: nn.Module | None = None,
    labels: Sequence[int] | None = None,
    precision: Precision = "fp32",
) -> Iterator[Drawn]:
    """This process's share of samples 0..num_samples-1, a group at a time, on the model's device; latents in fp32.

    model: a LightningDiT, or callable (x, t, labels) with its num_classes and the latent's shape in its spec.
    guide: a weaker generator for autoguidance, instead of the null label. labels: a list that is used over and over.
    """
    check_request(model, spec, flow, labels, guide)
    model, guide = (as_computed(network, precision) for network in (model, guide))
    for group in own_groups(num_samples):
        count = num_samples - group.start
        indices, latents, drawn_labels = draw_group(model, spec, group, flow, guide, labels, precision)
        yield Drawn(indices[:count], latents[:count], drawn_labels[:count])


class _Counter:
    """A network that computes nothing and counts the rows that it would."""

    num_classes, rows = 1, 0

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        self.rows += len(x)
        return x

    def forward_with_variance(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return torch.cat([self(x, t, labels)] * 2, dim=1)


def rows_per_sample(spec: SampleSpec, flow: FlowSpec, channels: int, *, guide: bool) -> tuple[int, int]:
    """Rows that the generator and the guide compute for a sample; UsageError for dopri5, which takes its own steps."""
    if spec.method == "dopri5":
        raise UsageError("dopri5 takes as many steps as the network needs: nobody knows before; set --method euler")
    model, weak = _Counter(), _Counter()
    noise, label = torch.zeros(1, channels, 1, 1), torch.zeros(1, dtype=torch.int64)
    _solve(model, noise, label, spec, flow, weak if guide else None, range(1))
    return model.rows, weak.rows


def pays_to_compile(model: Any, spec: SampleSpec, num_samples: int, precision: Precision) -> bool:
    """Whether `auto` compiles: on a GPU, for many samples, and neither fp32, which gains little, nor dopri5.

    Compiled code rounds otherwise: what is drawn in fp32 stays the same for any number of samples.
    """
    exact = precision == "fp32" or spec.method == "dopri5"
    return device_of(model).type == "cuda" and not exact and num_samples * spec.num_steps >= COMPILED_FROM


def own_groups(num_samples: int) -> Iterator[range]:
    """The whole groups that reach over samples 0..num_samples-1 and are this process's: they go to all in turn."""
    for number in range(distributed.rank(), math.ceil(num_samples / GROUP), distributed.world_size()):
        yield range(number * GROUP, (number + 1) * GROUP)


def draw_group(
    model: Any,
    spec: SampleSpec,
    indices: range,
    flow: FlowSpec | None,
    guide: Any,
    fixed_labels: Sequence[int] | None,
    precision: Precision,
) -> Drawn:
    """The samples `indices`, computed together; the networks are `as_computed` in this precision."""
    device = device_of(model)
    shape = (model.spec.in_channels, model.spec.input_size, model.spec.input_size)
    labels = sample_labels(indices, spec.seed, trained_classes(model), spec.labels, fixed_labels).to(device)
    noise = rng.normal(rng.fold(spec.seed, "x0"), indices, shape).to(device)
    with computing(precision, device):
        return Drawn(list(indices), _solve(model, noise, labels, spec, flow, guide, indices), labels)


def _solve(
    model: Any, noise: Tensor, labels: Tensor, spec: SampleSpec, flow: FlowSpec | None, guide: Any, indices: range
) -> Tensor:
    if spec.method == "ddpm":
        return sample_ddpm(model, noise, labels, spec, guide=guide, indices=indices)
    if spec.method == "euler_maruyama":
        return sample_sde(model, noise, labels, spec, flow=flow, guide=guide, indices=indices)
    return sample_ode(model, noise, labels, spec, flow=flow, guide=guide)


def decode(autoencoder: Autoencoder, latents: Tensor) -> Tensor:
    """Images uint8 (n, 3 or 1, H, W) of latents (n, C, h, w) as the decoder takes them, some at a time, in fp32."""
    with evaluation(autoencoder), computing("fp32", latents.device):
        return torch.cat([to_uint8(autoencoder.decode(part)) for part in latents.split(DECODE_BATCH)])


def device_of(model: Any) -> torch.device:
    """Where a generator is; the CPU for one that has no parameters."""
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return torch.device("cpu") if parameter is None else parameter.device


def null_is_untrained(spec: DiTSpec, sample: SampleSpec) -> bool:
    """Whether guidance would ask for a null label that no training sample had."""
    return sample.cfg_scale != 1 and spec.class_dropout == 0


def check_request(
    model: Any, spec: SampleSpec, flow: FlowSpec | None, labels: Sequence[int] | None, guide: nn.Module | None
) -> None:
    """UsageError for a method, labels or guidance that cannot be."""
    objective = (flow or FlowSpec()).objective
    if (spec.method == "ddpm") != (objective == "ddpm"):
        remedy = "ddpm" if objective == "ddpm" else "euler, heun, dopri5 or euler_maruyama"
        raise UsageError(
            f"--method {spec.method} does not fit this generator (flow.objective {objective}); set --method {remedy} "
            "(vadit train: --sample.method)"
        )
    if guide is None and null_is_untrained(model.spec, spec):
        raise UsageError(
            f"--cfg-scale is {spec.cfg_scale:g}, but the generator was trained with model.class_dropout 0, so never "
            "with the null label of guidance; set --cfg-scale 1 or --guide, or train with --model.class-dropout 0.1"
        )
    if (spec.cfg_channels or 0) > (channels := model.spec.in_channels):
        raise UsageError(f"--cfg-channels is {spec.cfg_channels}; the latent has {channels} channels, set at most that")
    if labels is not None and not labels:
        raise UsageError("the list of labels is empty; name at least one class or leave it out")
    for label in labels or ():
        if not 0 <= label < model.num_classes:
            raise UsageError(
                f"label {label} is out of range: the generator has {model.num_classes} classes, "
                f"0 to {model.num_classes - 1}; choose labels (vadit sample --classes) among those"
            )
