"""The settings of the data."""

from dataclasses import dataclass
from typing import Literal

from vadit.config.ranges import Checked, Factor, PathName, Share, Workers

Alpha = Literal["drop", "white", "black"]
Exif = Literal["ignore", "apply"]


@dataclass(frozen=True, kw_only=True)
class PictureSpec(Checked):
    """How any picture becomes RGB. Latents, statistics and references are of one choice."""

    alpha: Alpha = "drop"
    """Transparency: drop it, as ADM's and the authors' code does, or lay pictures on white or black."""
    exif: Exif = "ignore"
    """Orientation in EXIF: ignore it, as ADM's and the authors' code does, or turn pictures by it."""


@dataclass(frozen=True)
class ImageDataSpec(PictureSpec, group="data"):
    """Images for the tokenizer."""

    path: PathName = ""
    """Folder of images (a subfolder per class, or flat), of .tar shards, a pattern of shards, or a .beton; debug:N."""
    labels_file: PathName | None = None
    """File with a line "NAME LABEL" per image of a flat folder; names are relative to it."""
    crop: Literal["center", "random"] = "center"
    """center: ADM's centre crop; random: a random square of the short side."""
    flip: bool = False  # Mirror images at random.
    loader: Literal["auto", "torch", "dali", "ffcv"] = "auto"
    """Who decodes: Pillow in threads, DALI, FFCV (.beton files); auto: by what is installed and by the path."""
    order: Literal["random", "quasi_random"] = "random"
    """Order of an epoch; quasi_random reads a .beton in large pieces (for data larger than memory)."""
    num_workers: Workers = 8  # Decoding threads per process.
    on_error: Literal["raise", "skip"] = "raise"
    """What to do with an image that does not decode: stop and name it, or leave it out and count it."""
    max_bad_share: Share = 0.01
    """With on_error skip: the share of bad images above which the run stops all the same; three are none too many."""


@dataclass(frozen=True)
class LatentDataSpec(Checked, group="data"):
    """Latents for the generator."""

    path: PathName = ""  # Folder of latent shards (`vadit encode`, or the authors'); debug:N makes N of noise.
    normalize: bool = True  # Subtract the channel mean and divide by the channel standard deviation.
    multiplier: Factor = 1.0  # Factor after normalisation (SD-VAE: normalize off, 0.18215).
    images: PathName = ""  # Images that the latents were encoded from, in the same order: for repa.features online.
    flip: bool = True  # Take the mirrored latent with probability 1/2.
