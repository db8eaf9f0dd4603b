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
        """Labels of classes by name, as it is or as `_key` sees it, else by number; commas part several in a word."""
        by_key, found = defaultdict[str, list[int]](list), list[int]()
        for label, name in enumerate(self.classes or ()):
            by_key[_key(name)].append(label)
        most = 1 + max((key.count(",") for key in by_key), default=0)  # names have commas, too
        for parts in (word.split(",") for word in words):
            while parts:
                starts = [",".join(parts[:count]).strip() for count in range(min(len(parts), most), 0, -1)]
                word = next((each for each in starts if _key(each) in by_key), starts[-1])
                found += [self._label(word, by_key)] if word else []
                parts = parts[word.count(",") + 1 :]
        return found

    def _label(self, word: str, by_key: dict[str, list[int]]) -> int:
        names, number = self.classes or [], int(word) if _is_number(word) else None
        same = by_key.get(_key(word), [])
        same = [label for label in same if names[label] == word] or same
        if len(same) > 1:
            several = " or ".join(f"{names[label]!r} (label {label})" for label in same[:SHOWN])
            raise UsageError(f"--classes {word!r} may be {several}; write the name as it is, or its label")
        if same and number not in (None, same[0]):
            note_once(f"--classes {word}: the class of this name, whose label is {same[0]}")
        if same or number is not None:
            return same[0] if same else int(word)
        near = [names[by_key[key][0]] for key in difflib.get_close_matches(_key(word), by_key, n=3)]
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        if not near and 0 < len(names) <= SHOWN:
            hint = f"known: {', '.join(names)}; "
        there = f"it has {len(names):,} names, or take a label" if names else "its classes have numbers alone"
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
    known: dict[str, Any] = {"mean": [0.0] * channels, "std": [1.0] * channels}
    if not data.path.startswith("debug:"):
        known["multiplier"] = data.multiplier
        if data.normalize:
            known |= {"mean": None, "std": None}
            with contextlib.suppress(UsageError):  # an old run, its latents elsewhere
                statistics = load_statistics(data.path, channels)
                known |= {"mean": statistics.mean.flatten().tolist(), "std": statistics.std.flatten().tolist()}
        if (index := read_index(Path(data.path))) is not None:
            whole = index.classes is not None and len(index.classes) == index.num_classes
            known |= {"classes": index.classes if whole else None}
            known |= {"tokenizer": index.tokenizer and referred(index.tokenizer, data.path)}
            if index.settings is not None:
                known |= {"image_size": index.settings.size, "tokenizer_hash": index.settings.tokenizer}
    return SamplingInfo(**known, sampler=config.sample, flow=config.flow)


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
    if not any(Path(folder).glob("checkpoints/step-*")):
        raise UsageError(f"{folder} has no checkpoint yet; train it first (`vadit train`)")
    return info_of(config)
