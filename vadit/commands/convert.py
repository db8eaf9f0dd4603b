"""vadit import and vadit export: checkpoints between vadit and others' code."""

from dataclasses import dataclass
from typing import Literal

from tyro.conf import Positional

from vadit.config.ranges import Checked, Decay, PathName, Width
from vadit.runtime.console import say
from vadit.runtime.errors import UsageError
from vadit.runtime.files import check_output


@dataclass(frozen=True, kw_only=True)
class ImportOptions(Checked):
    """Turn a checkpoint of the authors, or a VAE of diffusers, into a folder with config.json and model.safetensors."""

    source: Positional[PathName]
    """Their file: a tokenizer ({"state_dict": ...}) or a generator ({"ema": ...}, {"model": ...} or bare); or the
    folder or file of an AutoencoderKL of diffusers."""
    out: PathName  # Folder to write.
    num_heads: Width | None = None
    """Attention heads of a generator whose tensors do not show them (neither RoPE nor QK-norm)."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions(Checked):
    """Write a run's network as one file with its config, or as a file that the authors' code reads."""

    run: Positional[PathName]  # Run folder, or an exported one.
    out: PathName  # Folder to write (--format reference: the file).
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
    model = load_foreign(options.source, num_heads=options.num_heads)
    with owned(options.out, "set another --out"):
        model.save_pretrained(options.out)
    is_tokenizer = isinstance(model, Autoencoder)
    say(f"{options.out}: {'a tokenizer' if is_tokenizer else 'a generator'}")
    if is_tokenizer and (advice := published_scale(options.source)):
        say(advice)


def export_command(options: ExportOptions) -> None:
    """Write a run's network, or turn an exported one into the authors' format."""
    from vadit.models.dit import LightningDiT
    from vadit.models.interop import save_reference
    from vadit.runtime.owner import owned
    from vadit.sampling.info import read_info, save_info
    from vadit.train.checkpoint.export import is_exported, load_network

    check_output("--out", options.out, folder=options.format == "vadit")
    if options.format == "vadit" and is_exported(options.run):
        raise UsageError(f"{options.run} is exported already; name a run, or set --format reference")
    model = load_network(options.run, options.ema)
    if options.format == "reference":
        save_reference(model, options.out)
    else:
        with owned(options.out, "set another --out"):
            model.save_pretrained(options.out)
            if isinstance(model, LightningDiT):
                save_info(read_info(options.run), options.out)
    say(options.out)
