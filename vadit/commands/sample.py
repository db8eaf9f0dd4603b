"""vadit sample: images from a generator."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from vadit.commands.arguments import parse
from vadit.commands.common import Arithmetic, Device, load_tokenizer, processes
from vadit.config import DiTConfig, FlowSpec, MaskSpec, SampleSpec, TokenizerConfig
from vadit.config.files import load_run_config
from vadit.config.ranges import Checked, Count, Decay, Factor, Label, PathName
from vadit.recipes import RECIPES, get_recipe
from vadit.runtime.console import ProgressBar, note_once, say_once, show
from vadit.runtime.errors import UsageError
from vadit.runtime.files import check_output

SOURCES = ("generator", "ema", "tokenizer", "guide", "guide_ema")  # options that the samples' settings.json names


@dataclass(frozen=True, kw_only=True)
class SampleOptions(Checked):
    """Draw images: PNGs, an .npz for evaluation and a picture of the first ones. The same command continues."""

    generator: PathName
    """Generator: a run folder, or one from `vadit export` or `vadit import`."""
    tokenizer: PathName
    """Tokenizer that decodes: a run folder, one from `vadit export` or `vadit import`, an AutoencoderKL of diffusers,
    or a file of the authors."""
    out: PathName
    """Folder for the images."""
    latents: PathName = ""
    """Folder of latents with latents_stats.pt; default: the one that the generator's run was trained on."""
    num_samples: Count = 64
    """Images to draw (FID-50k: 50,000)."""
    classes: tuple[Label, ...] = ()
    """Labels to take in turn, instead of those that --labels draws."""
    ema: Decay | None = None
    """Decay of the average to take from a run; 0 for the plain weights; default: the run's first average."""
    guide: PathName | None = None
    """A weaker generator for autoguidance, instead of the null label; needs a --cfg-scale other than 1."""
    guide_ema: Decay | None = None
    """Decay of the guide's average; default: its run's first."""
    normalize: bool = True
    """The generator's latents are normalised per channel (LatentDataSpec.normalize of its training)."""
    multiplier: Factor = 1.0
    """Factor that the latents were trained with (SD-VAE: 0.18215)."""
    device: Device = "auto"
    """Device of both networks."""
    precision: Arithmetic = "auto"
    """Arithmetic of the generator; auto: tf32 on a GPU, as the authors' script, and fp32 on a CPU. Decoding is fp32."""
    compile: Literal["auto", True, False] = "auto"
    """torch.compile the generator's blocks; auto: as the folder's samples were, else on a GPU for many samples that are
    not fp32."""
    dry_run: bool = False
    """Print the hours and the memory that this would take, modelled, and exit; --generator and --tokenizer may be
    recipes."""
    sampler: Annotated[SampleSpec, tyro.conf.arg(name="")] = field(default_factory=SampleSpec)
    flow: FlowSpec = field(default_factory=FlowSpec)


def run(arguments: list[str]) -> None:
    """Draw, decode and write."""
    options = parse(SampleOptions, arguments, command="sample")
    if settings := _settings_of_run(options.generator):
        options = parse(SampleOptions, arguments, command="sample", default=replace(options, **settings))
    if options.dry_run:
        _dry_run(options)
        return
    check_output("--out", options.out)
    import torch

    from vadit.latents.statistics import load_statistics
    from vadit.runtime.precision import resolved
    from vadit.sampling.draw import own_groups, trained_classes
    from vadit.sampling.write import write_samples
    from vadit.train.checkpoint.export import load_generator

    if options.guide and options.sampler.cfg_scale == 1:
        raise UsageError("--guide has no effect at --cfg-scale 1; set --cfg-scale (autoguidance: about 2)")
    with processes(options.device) as device:
        precision = resolved(options.precision, device, generator=True)
        generator = load_generator(options.generator, options.ema).to(device)
        guide = load_generator(options.guide, options.guide_ema).to(device) if options.guide else None
        if guide is not None:
            for name in ("in_channels", "input_size", "num_classes"):
                ours, theirs = getattr(generator.spec, name), getattr(guide.spec, name)
                if ours != theirs:
                    raise UsageError(
                        f"--guide {options.guide} has model.{name} {theirs}, the generator {ours}; name one that was "
                        "trained on the same latents"
                    )
        autoencoder = load_tokenizer(options.tokenizer, device)
        channels = generator.in_channels
        _check_pair(options, channels, autoencoder.spec.latent_channels)
        mean, std = torch.zeros(channels), torch.ones(channels)
        if options.normalize:
            if not options.latents:
                raise UsageError("vadit sample needs --latents, a folder with latents_stats.pt, or --no-normalize")
            statistics = load_statistics(options.latents, channels)
            mean, std = statistics.mean, statistics.std
        known = trained_classes(generator).tolist()
        if unknown := sorted(set(options.classes).difference(known)):
            note_once(f"class {unknown[0]} of --classes was not trained: the generator's data had no sample of it")
        elif len(known) < generator.num_classes and not options.classes:
            note_once(f"labels are drawn among the {len(known):,} trained classes of {generator.num_classes:,}")
        own = own_groups(options.num_samples)
        share = sum(min(group.stop, options.num_samples) - group.start for group in own)

        def progress(done: int) -> None:
            bar.update(done * options.num_samples // share)  # of all processes, by this one's share

        with ProgressBar("sample", options.num_samples) as bar:
            files = write_samples(
                options.out,
                generator,
                autoencoder,
                options.sampler,
                num_samples=options.num_samples,
                mean=mean,
                std=std,
                multiplier=options.multiplier,
                flow=options.flow,
                guide=guide,
                labels=options.classes or None,
                precision=precision,
                compiled=options.compile,
                source={name: getattr(options, name) for name in SOURCES} | {"origin": asdict(generator.origin)},
                progress=progress,
            )
    say_once(f"{files.images}: {options.num_samples:,} images; {files.npz}; {files.grid}; drawn in {precision}")


def _check_pair(options: SampleOptions, made: int, decoded: int) -> None:
    if made != decoded:
        raise UsageError(
            f"{options.generator} makes latents of {made} channels, {options.tokenizer} decodes {decoded}; name the "
            "tokenizer that encoded its training data"
        )


def _dry_run(options: SampleOptions) -> None:
    """Print what the samples would take on the GPU of each process, or on an H200 where there is none."""
    import torch
    from rich.table import Table

    from vadit.estimate.flops import PEAK_TFLOPS, decoder_flops, dit_flops, named_peak
    from vadit.estimate.sampling import SHARES, hours, sampling_bytes
    from vadit.runtime import distributed
    from vadit.sampling.draw import DECODE_BATCH, GROUP, rows_per_sample, sampler_name
    from vadit.train.checkpoint.export import load_autoencoder, load_generator

    specs = []
    for path in (options.generator, options.guide):
        if path in RECIPES and isinstance(recipe := get_recipe(path), DiTConfig):
            specs.append((recipe.model, recipe.mask))
        elif path:
            specs.append(((network := load_generator(path)).spec, getattr(network, "mask", MaskSpec())))
    if options.tokenizer in RECIPES and isinstance(recipe := get_recipe(options.tokenizer), TokenizerConfig):
        autoencoder = recipe.autoencoder
    else:
        autoencoder = load_autoencoder(options.tokenizer).spec
    _check_pair(options, specs[0][0].in_channels, autoencoder.latent_channels)
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
        for precision in SHARES:
            drawing = hours(share * flops, precision, peak)
            gib = sampling_bytes(specs, largest, autoencoder, DECODE_BATCH, precision) / 2**30
            name = sampler_name(sampler, autoguidance=len(specs) == 2)
            table.add_row(precision, name, *(f"{value:.3g}" for value in (drawing, decoding, drawing + decoding, gib)))
    if distributed.is_main():
        show(table)


def _settings_of_run(path: str) -> dict[str, Any]:
    """Defaults of `vadit sample` from the config of a run; none from an exported folder, which has no such settings."""
    if (Path(path) / "model.safetensors").is_file() or not (Path(path).is_dir() or path in RECIPES):
        return {}
    config = load_run_config(path) if Path(path).is_dir() else get_recipe(path)
    if not isinstance(config, DiTConfig):
        raise UsageError(f"--generator {path} is a tokenizer's run; name a generator's")
    data = config.data
    return {
        "sampler": config.sample,
        "flow": config.flow,
        "latents": data.path,
        "normalize": data.normalize,
        "multiplier": data.multiplier,
    }
