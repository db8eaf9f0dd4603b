"""vadit import and vadit export: checkpoints between vadit and the authors' code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tyro.conf import Positional

from vadit.arguments import parse


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Turn a checkpoint of the authors into a folder with config.json and model.safetensors."""

    source: Positional[str]
    """Their file: a tokenizer ({"state_dict": ...}) or a generator ({"ema": ...}, {"model": ...} or bare)."""
    out: str
    """Folder to write."""
    num_heads: int | None = None
    """Attention heads of a generator whose tensors do not tell (neither RoPE nor QK-norm)."""
    attention_resolution: int | None = None
    """Feature-map side of a tokenizer's attention, where its tensors do not tell."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Write a run's network as one file with its config, or as a file that the authors' code reads."""

    run: Positional[str]
    """Run folder, or an exported one."""
    out: str
    """Folder to write (--format reference: the file)."""
    ema: float | None = None
    """Decay of the average to take; 0 for the plain weights; default: a generator's first average."""
    format: Literal["vadit", "reference"] = "vadit"
    """vadit: config.json and model.safetensors; reference: the authors' .pt."""


def import_command(arguments: list[str]) -> None:
    """vadit import SOURCE"""
    options = parse(ImportOptions, arguments, command="import")
    raise NotImplementedError(options)


def export_command(arguments: list[str]) -> None:
    """vadit export RUN"""
    options = parse(ExportOptions, arguments, command="export")
    raise NotImplementedError(options)
