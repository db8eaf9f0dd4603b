"""vadit import and vadit export: checkpoints between vadit and others' code."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from vadit.config import DiTConfig
from vadit.config.files import load_run_config
from vadit.config.ranges import Checked, Decay, PathName, Side, Width
from vadit.runtime.console import say
from vadit.runtime.errors import UsageError
from vadit.runtime.files import check_output


@dataclass(frozen=True, kw_only=True)
class ImportOptions(Checked):
    """Turn a checkpoint of the authors, or a VAE of diffusers, into a folder with config.json and model.safetensors."""

    source: Positional[PathName]
    """Their file: a tokenizer ({"state_dict": ...}) or a generator ({"ema": ...}, {"model": ...} or bare); or the
    folder or file of an AutoencoderKL of diffusers."""
    out: PathName
    """Folder to write."""
    num_heads: Width | None = None
    """Attention heads of a generator whose tensors do not show them (neither RoPE nor QK-norm)."""
    attention_resolution: Side | None = None
    """Feature-map side of a tokenizer's attention, where its tensors do not show it."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions(Checked):
    """Write a run's network as one file with its config, or as a file that the authors' code reads."""

    run: Positional[PathName]
    """Run folder, or an exported one."""
    out: PathName
    """Folder to write (--format reference: the file)."""
    ema: Decay | None = None
    """Decay of the average to take; 0 for the plain weights; default: a generator's first average."""
    format: Literal["vadit", "reference"] = "vadit"
    """vadit: config.json and model.safetensors; reference: the authors' .pt."""


def import_command(options: ImportOptions) -> None:
    """Turn somebody else's checkpoint into a folder of ours."""
    from vadit.models.autoencoder import Autoencoder
    from vadit.models.interop import load_foreign
    from vadit.models.interop_diffusers import published_scale
    from vadit.runtime.owner import owned

    check_output("--out", options.out)
    model = load_foreign(options.source, num_heads=options.num_heads, attention_resolution=options.attention_resolution)
    with owned(options.out, "set another --out"):
        model.save_pretrained(options.out)
    is_tokenizer = isinstance(model, Autoencoder)
    say(f"{options.out}: {'a tokenizer' if is_tokenizer else 'a generator'}")
    if is_tokenizer and (advice := published_scale(options.source)):
        say(advice)


def export_command(options: ExportOptions) -> None:
    """Write a run's network, or turn an exported one into the authors' format."""
    from vadit.models.interop import export_reference, save_reference
    from vadit.models.pretrained import WEIGHTS_NAME
    from vadit.runtime.owner import owned
    from vadit.train.checkpoint.export import export_run, load_autoencoder, load_generator

    check_output("--out", options.out, folder=options.format == "vadit")
    exported = (Path(options.run) / WEIGHTS_NAME).is_file()
    if exported and options.format == "vadit":
        raise UsageError(f"{options.run} is exported already; name a run, or set --format reference")
    if exported:
        export_reference(options.run, options.out)
    elif options.format == "vadit":
        with owned(options.out, "set another --out"):
            export_run(options.run, options.out, options.ema)
    elif isinstance(load_run_config(options.run), DiTConfig):
        save_reference(load_generator(options.run, options.ema), options.out)
    else:
        save_reference(load_autoencoder(options.run, options.ema or None), options.out)
    say(options.out)
