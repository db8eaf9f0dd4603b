"""vadit sample: images from a generator."""

from __future__ import annotations

from dataclasses import asdict, astuple, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import Positional

from vadit.commands.arguments import given_flags, parse, reported_once
from vadit.commands.common import Arithmetic, Device, load_tokenizer, processes
from vadit.config import DiTConfig, FlowSpec, MaskSpec, SampleSpec, TokenizerConfig
from vadit.config.ranges import Checked, Count, Decay, Factor, PathName
from vadit.recipes import RECIPES, get_recipe
from vadit.runtime.console import ProgressBar, note_once, say_once, show
from vadit.runtime.errors import UsageError
from vadit.runtime.files import check_output

if TYPE_CHECKING:
    from torch import Tensor

    from vadit.sampling.info import SamplingInfo

SOURCES = ("ema", "tokenizer", "guide", "guide_ema")  # options that the samples' settings.json names
ALWAYS_SAID = ("method", "num_steps", "cfg_scale", "labels", "seed")  # also where they are nobody's choice


@dataclass(frozen=True, kw_only=True)
class SampleOptions(Checked):
    """Draw images: PNGs, an .npz for evaluation and a picture of the first ones. The same command continues."""

    folder: Annotated[Positional[PathName], tyro.conf.arg(metavar="FOLDER")]
    """Generator: a project that holds it, its run folder, or one from `vadit export` or `vadit import`."""
    tokenizer: PathName = ""
    """Tokenizer that decodes: a run folder, one from `vadit export` or `vadit import`, an AutoencoderKL of diffusers,
    or a file of the authors; default: the one that made the latents of the generator's training."""
    check_tokenizer: bool = True  # Refuse a tokenizer whose weights are not those that made the latents.
    out: PathName = ""
    """Folder for the images; default: one in FOLDER/samples that is named after sampler and settings."""
    latents: PathName = ""
    """Folder with a latents_stats.pt to take, instead of the statistics that the generator was trained with."""
    num_samples: Count = 64  # Images to draw (FID-50k: 50,000).
    classes: tuple[str, ...] = ()  # Classes to take in turn, by name or label, instead of those that --labels draws.
    ema: Decay | None = None
    """Decay of the average to take from a run; 0 for the plain weights; default: the run's first average."""
    guide: PathName | None = None
    """A weaker generator for autoguidance, instead of the null label; needs a --cfg-scale other than 1."""
    guide_ema: Decay | None = None  # Decay of the guide's average; default: its run's first.
    normalize: bool = True
    """Undo the normalisation by the statistics; off: the generator's latents were not normalised."""
    multiplier: Factor | None = None
    """Factor that the latents were trained with (SD-VAE: 0.18215); default: the run's, else 1."""
    device: Device = "auto"  # Device of both networks.
    precision: Arithmetic = "auto"
    """Arithmetic of the generator; auto: tf32 on a GPU, as the authors' script, and fp32 on a CPU. Decoding is fp32."""
    compile: Literal["auto", True, False] = "auto"
    """torch.compile the generator's blocks; auto: as the folder's samples were, else on a GPU for many samples that are
    not fp32."""
    dry_run: bool = False
    """Print the hours and the memory that this would take, modelled, in --precision or in each, and exit; FOLDER and
    --tokenizer may be recipes."""
    sampler: Annotated[SampleSpec, tyro.conf.arg(name="")] = field(default_factory=SampleSpec)
    flow: FlowSpec = field(default_factory=FlowSpec)


@reported_once()
def _read(arguments: list[str]) -> tuple[SampleOptions, str, SamplingInfo, list[int] | None]:
    """The settings, the generator's folder (--dry-run: or recipe), what goes with it, and labels asked for."""
    options = parse(SampleOptions, arguments, command="sample")
    from vadit.sampling.info import SamplingInfo, find_generator, read_info

    if options.dry_run:
        _refuse_mistyped(options.folder, options.tokenizer, options.guide or "")
    else:
        check_output("--out", options.out or str(Path(options.folder) / "samples"))
    recipe = _recipe(options.folder)
    source = options.folder if recipe else str(find_generator(options.folder))
    info = SamplingInfo(sampler=recipe.sample, flow=recipe.flow) if recipe else read_info(source)
    defaults = replace(options, sampler=info.sampler or SampleSpec(), flow=info.flow or FlowSpec())
    options = parse(SampleOptions, arguments, command="sample", default=defaults)
    beside = str(Path(source).parent / "tokenizer") if info.tokenizer_hash else None  # its weights will be compared
    places = (place for place in (info.tokenizer, beside) if place and Path(place).exists())
    tokenizer = options.tokenizer or next(places, "")
    if not tokenizer:
        found = f"{info.tokenizer}, which is not there" if info.tokenizer else "not known from it"
        raise UsageError(f"the tokenizer of {source} is {found}; set --tokenizer")
    if options.guide and options.sampler.cfg_scale == 1:
        raise UsageError("--guide has no effect at --cfg-scale 1; set --cfg-scale (autoguidance: about 2)")
    options = replace(options, tokenizer=tokenizer)
    return options, source, info, info.labels(options.classes) if options.classes else None


def run(arguments: list[str]) -> None:
    """Draw, decode and write."""
    options, source, info, labels = _read(arguments)
    if options.dry_run:
        _dry_run(options, source)
        return
    from vadit.models.pretrained import weights_hash
    from vadit.runtime.precision import resolved
    from vadit.sampling.draw import own_groups, trained_classes
    from vadit.sampling.write import write_samples
    from vadit.train.checkpoint.export import load_generator

    with processes(options.device) as device:
        precision = resolved(options.precision, device, generator=True)
        generator = load_generator(source, options.ema).to(device)
        guide = load_generator(options.guide, options.guide_ema).to(device) if options.guide else None
        for name in ("in_channels", "input_size", "num_classes"):
            ours, theirs = (getattr(network.spec, name) for network in (generator, guide or generator))
            if ours != theirs:
                raise UsageError(
                    f"--guide {options.guide} has model.{name} {theirs}, the generator {ours}; name one that was "
                    "trained on the same latents"
                )
        autoencoder = load_tokenizer(options.tokenizer, device)
        _check_pair(source, generator.in_channels, options.tokenizer, autoencoder.spec.latent_channels)
        if options.check_tokenizer and info.tokenizer_hash not in (None, found := weights_hash(autoencoder)):
            raise UsageError(
                f"{options.tokenizer} has other weights ({found}) than the tokenizer that made the generator's latents "
                f"({info.tokenizer_hash}); set --tokenizer to that one, or --no-check-tokenizer to decode with these"
            )
        mean, std = _statistics(options, source, info, generator.in_channels)
        known = trained_classes(generator).tolist()
        if unknown := sorted(set(labels or ()).intersection(range(generator.num_classes)).difference(known)):
            named = info.class_name(unknown[0])
            note_once(f"class {named} of --classes was not trained: the generator's data had no sample of it")
        elif len(known) < generator.num_classes and labels is None:
            note_once(f"labels are drawn among the {len(known):,} trained classes of {generator.num_classes:,}")
        _say_sampler(options, arguments, [f"{info.class_name(label)} ({label})" for label in labels or ()])
        own = own_groups(options.num_samples)
        share = sum(min(group.stop, options.num_samples) - group.start for group in own)

        def progress(done: int) -> None:
            bar.update(done * options.num_samples // share)  # of all processes, by this one's share

        sources = {"generator": source} | {name: getattr(options, name) for name in SOURCES}
        with ProgressBar("sample", options.num_samples) as bar:
            files = write_samples(
                options.out or Path(options.folder) / "samples",
                generator,
                autoencoder,
                options.sampler,
                num_samples=options.num_samples,
                mean=mean,
                std=std,
                multiplier=options.multiplier or info.multiplier,
                flow=options.flow,
                guide=guide,
                labels=labels,
                precision=options.precision,
                compiled=options.compile,
                source=sources | {"origin": asdict(generator.origin)},
                progress=progress,
                named=not options.out,
            )
    say_once(f"{files.images}: {options.num_samples:,} images; {files.npz}; {files.grid}; drawn in {precision}")


def _statistics(options: SampleOptions, source: str, info: SamplingInfo, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation per channel, (C,) or (1, C, 1, 1): those of --latents, or what the training used."""
    import torch

    from vadit.latents.statistics import load_statistics

    if not options.normalize:
        return torch.zeros(channels), torch.ones(channels)
    if options.latents:
        return astuple(load_statistics(options.latents, channels))
    if not (info.mean and info.std and len(info.mean) == len(info.std) == channels):
        needed = "a folder with latents_stats.pt, or --no-normalize"
        raise UsageError(f"the statistics of {source}'s latents are not known from it; set --latents, {needed}")
    return torch.tensor(info.mean), torch.tensor(info.std)


def _say_sampler(options: SampleOptions, arguments: list[str], classes: list[str]) -> None:
    """A line with what the sampler is and where each setting comes from."""
    typed = given_flags(arguments)
    found: dict[str, list[str]] = {"flag": [], "recipe's": [], "default": []}
    for name, value in vars(options.sampler).items():
        source = "default" if value == getattr(SampleSpec(), name) else "recipe's"
        source = "flag" if f"--{name.replace('_', '-')}" in typed else source
        unguided = options.sampler.cfg_scale == 1 and name in ("cfg_interval", "cfg_channels", "cfg_power")
        idle = unguided or (classes and name == "labels")
        if source == "flag" or (not idle and (source != "default" or name in ALWAYS_SAID)):
            found[source].append(f"{name} {' '.join(map(str, value)) if isinstance(value, tuple) else value}")
    found["flag"] += [f"classes {', '.join(classes)}"] * bool(classes)
    note_once("sampler: " + "; ".join(f"{', '.join(each)} ({source})" for source, each in found.items() if each), "dim")


def _check_pair(generator: str, made: int, tokenizer: str, decoded: int) -> None:
    if made != decoded:
        raise UsageError(
            f"{generator} makes latents of {made} channels, {tokenizer} decodes {decoded}; name the tokenizer that "
            "encoded its training data (--tokenizer)"
        )


def _dry_run(options: SampleOptions, generator: str) -> None:
    """Print what the samples would take on the GPU of each process, or on an H200 where there is none."""
    import torch
    from rich.table import Table

    from vadit.estimate.flops import PEAK_TFLOPS, SHARES, decoder_flops, dit_flops, hours, named_peak
    from vadit.estimate.memory import sampling_bytes
    from vadit.runtime import distributed
    from vadit.sampling.draw import DECODE_BATCH, GROUP, rows_per_sample, sampler_name
    from vadit.train.checkpoint.export import load_autoencoder, load_generator

    specs = []
    for path in (generator, options.guide or ""):
        if recipe := _recipe(path):
            specs.append((recipe.model, recipe.mask))
        elif path:
            specs.append(((network := load_generator(path)).spec, getattr(network, "mask", MaskSpec())))
    if options.tokenizer in RECIPES and isinstance(own := get_recipe(options.tokenizer), TokenizerConfig):
        autoencoder = own.autoencoder
    else:
        autoencoder = load_autoencoder(options.tokenizer).spec
    _check_pair(generator, specs[0][0].in_channels, options.tokenizer, autoencoder.latent_channels)
    share = options.num_samples / distributed.world_size()
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    if (peak := named_peak(card)) is None:
        card, peak = "H200", PEAK_TFLOPS["H200"] * 1e12
    title = f"{options.num_samples:,} samples on {distributed.world_size()} {card}, modelled: nothing is measured\n"
    title += "Taken for granted: " + ", ".join(f"{share:.0%} of the peak in {name}" for name, share in SHARES.items())
    table = Table(title=title, title_justify="left")
    for column in ("precision", "sampler", "drawing h", "decoding h", "total h", "GiB"):
        table.add_column(column, justify="right")
    decoding = hours(share * decoder_flops(autoencoder), "fp32", peak)
    for scale in dict.fromkeys((options.sampler.cfg_scale, 1.0)):
        sampler = replace(options.sampler, cfg_scale=scale)
        rows = rows_per_sample(sampler, options.flow, specs[0][0].in_channels, guide=len(specs) == 2)
        flops = sum(count * dit_flops(*each) for each, count in zip(specs, rows, strict=False))
        largest = 2 * GROUP if scale != 1 and len(specs) == 1 else GROUP
        for precision in SHARES if options.precision == "auto" else (options.precision,):
            drawing = hours(share * flops, precision, peak)
            gib = sampling_bytes(specs, largest, autoencoder, DECODE_BATCH, precision) / 2**30
            name = sampler_name(sampler, autoguidance=len(specs) == 2)
            table.add_row(precision, name, *(f"{value:.3g}" for value in (drawing, decoding, drawing + decoding, gib)))
    if distributed.is_main():
        show(table)


def _refuse_mistyped(*names: str) -> None:
    for name in names:
        if len(Path(name).parts) == 1 and not Path(name).exists():
            get_recipe(name)


def _recipe(name: str) -> DiTConfig | None:
    """The generator's recipe of this name, where no folder has it."""
    recipe = get_recipe(name) if name in RECIPES and not Path(name).is_dir() else None
    return recipe if isinstance(recipe, DiTConfig) else None
