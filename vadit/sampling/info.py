"""sampling.json: what images need besides a generator's weights, in its run folder and in each export."""

import contextlib
import dataclasses
import difflib
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vadit.config import DiTConfig, FlowSpec, SampleSpec
from vadit.config.files import load_run_config
from vadit.latents.shards import read_index
from vadit.latents.statistics import load_statistics
from vadit.models.pretrained import WEIGHTS_NAME
from vadit.runtime.console import note_once
from vadit.runtime.errors import UsageError
from vadit.runtime.files import reference, referred, save_json
from vadit.runtime.json_files import read_json

FILE = "sampling.json"
SHOWN = 10  # names of classes in a message, at most


@dataclass(frozen=True)
class SamplingInfo:
    """What a generator's training leaves to know for its samples; None for what is not known."""

    mean: list[float] | None = None  # per channel, with std: a latent of the decoder is z * std / multiplier + mean
    std: list[float] | None = None
    multiplier: float = 1.0
    classes: list[str] | None = None  # names by label
    image_size: int | None = None  # side of the training images in pixels
    tokenizer: str | None = None  # path, in the file relative to its folder where it lies beside that
    tokenizer_hash: str | None = None  # weights_hash of the tokenizer that made the latents
    sampler: SampleSpec | None = None
    flow: FlowSpec | None = None

    def class_name(self, label: int) -> str:
        """The name of a label, or its number."""
        return self.classes[label] if self.classes and label < len(self.classes) else str(label)

    def labels(self, words: Iterable[str]) -> list[int]:
        """Labels of names or numbers of classes, one or several parted by commas each; a name goes before a number."""
        named = _Names(self.classes or [])
        found = []
        for parts in (word.split(",") for word in words):
            while parts:
                starts = [",".join(parts[:count]).strip() for count in range(min(len(parts), named.commas + 1), 0, -1)]
                word = next((each for each in starts if named.label(each) is not None), starts[-1])
                found += [named.known(word)] if word else []
                parts = parts[word.count(",") + 1 :]
        return found


class _Names:
    """Names of classes, and how people write them."""

    def __init__(self, names: list[str]) -> None:
        self.names, self.commas = names, max((name.count(",") for name in names), default=0)
        self._exact, self._loose = defaultdict[str, list[int]](list), defaultdict[str, list[int]](list)
        for label, name in enumerate(names):
            self._exact[name].append(label)
            self._loose[_key(name)].append(label)

    def label(self, word: str) -> int | None:
        """That of a name as it is, else of one written otherwise, else of a number; None where there is none."""
        found = self._exact.get(word) or self._loose.get(_key(word), [])
        if len(found) > 1:
            several = " or ".join(f"{self.names[label]!r} (label {label})" for label in found[:SHOWN])
            raise UsageError(f"--classes {word!r} may be {several}; write the name as it is, or its label")
        return found[0] if found else int(word) if _is_number(word) else None

    def known(self, word: str) -> int:
        """The label; UsageError with the nearest names where there is none."""
        if (label := self.label(word)) is not None:
            if _is_number(word) and label != int(word):
                note_once(f"--classes {word}: the class of this name, whose label is {label}")
            return label
        by_key = {_key(name): name for name in self.names}
        near = [by_key[key] for key in difflib.get_close_matches(_key(word), by_key, n=3)]
        few = self.names if len(self.names) <= SHOWN else []
        hint = f"did you mean {' or '.join(near)}? " if near else f"known: {', '.join(few)}; " if few else ""
        there = f"it has {len(self.names):,} names, or take a label" if self.names else "its classes have numbers alone"
        raise UsageError(f"--classes {word!r} is no class of this generator; {hint}{there}")


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdigit() and len(word) < 10


def _key(name: str) -> str:
    """A name as people compare it: whatever its case, its spaces, its form in Unicode and zeros before a number."""
    plain = " ".join(unicodedata.normalize("NFKC", name).casefold().replace("_", " ").split())
    return str(int(plain)) if _is_number(plain) else plain


def info_of(config: DiTConfig) -> SamplingInfo:
    """What a run's config says, and its latents as far as they are there."""
    data, channels = config.data, config.model.in_channels
    info = SamplingInfo([0.0] * channels, [1.0] * channels, sampler=config.sample, flow=config.flow)
    if data.path.startswith("debug:"):
        return info
    known: dict[str, Any] = {"multiplier": data.multiplier}
    if data.normalize:
        known |= {"mean": None, "std": None}
        with contextlib.suppress(UsageError):  # latents of old, elsewhere by now
            known |= {
                name: value.flatten().tolist() for name, value in vars(load_statistics(data.path, channels)).items()
            }
    if (index := read_index(Path(data.path))) is not None:
        tokenizer = index.tokenizer and referred(index.tokenizer, data.path)
        known |= {"classes": index.classes, "tokenizer": tokenizer}
        if index.settings is not None:
            known |= {"image_size": index.settings.size, "tokenizer_hash": index.settings.tokenizer}
    return dataclasses.replace(info, **known)


def save_info(info: SamplingInfo, folder: str | Path) -> None:
    """Write sampling.json into the folder of a generator."""
    tokenizer = info.tokenizer and reference(info.tokenizer, folder)
    save_json(Path(folder) / FILE, dataclasses.asdict(dataclasses.replace(info, tokenizer=tokenizer)))


def find_generator(folder: str | Path) -> Path:
    """The generator's folder of a project, or the folder itself."""
    inside = Path(folder) / "generator"
    return inside if inside.is_dir() else Path(folder)


def read_info(folder: str | Path) -> SamplingInfo:
    """What goes with a generator's run or export; of a run without the file, what its config and latents still say."""
    path = Path(folder) / FILE
    if path.is_file():
        remedy = "run the `vadit train` command of the run again, which writes it anew, or export the run anew"
        info = read_json(path, SamplingInfo, remedy=remedy)
        return dataclasses.replace(info, tokenizer=info.tokenizer and referred(info.tokenizer, folder))
    if (Path(folder) / WEIGHTS_NAME).is_file():
        return SamplingInfo()
    config = load_run_config(folder)
    if not isinstance(config, DiTConfig):
        raise UsageError(f"{folder} is a tokenizer's run; name a generator's")
    return info_of(config)
