"""vadit new: a project of one's own pictures."""

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional

from vadit.config import FoundationSpec, vary
from vadit.config.files import save_config
from vadit.config.ranges import Checked, PathName, Range
from vadit.runtime.console import say, show
from vadit.runtime.errors import UsageError
from vadit.runtime.files import check_output, save_json, saved_file

DECODING = 0.1  # share of a step that decoding may take before pictures are scaled once and for all
MOST_BYTES = 20 * 2**30  # of such pictures


@dataclass(frozen=True, kw_only=True)
class NewOptions(Checked):
    """Look at pictures and at this machine, and write a project: a tokenizer and a generator, ready to be trained."""

    out: Positional[PathName]
    """Folder of the project; a new one, or one where nothing has been trained yet."""
    images: PathName
    """Images: a folder (one subfolder per class, or flat), a folder or pattern of .tar shards, or a .beton."""
    labels_file: PathName | None = None
    """File with a line "NAME LABEL" per image of a flat folder."""
    size: Annotated[int, Range(16, 1024)] | None = None
    """Side of the images to train on in pixels, a multiple of 16; default: by pictures and time."""
    minutes: Annotated[float, Range(0, 10_000_000, above=True)] = 30.0
    """Time that training may take in all, on this machine."""
    foundation: str = "own"
    """Foundation model of the VF loss: dinov2, mae, sam, clip, any timm model, or own: a small one trained on the
    pictures."""
    foundation_weights: PathName = FoundationSpec.weights
    """Its weights: hub (timm downloads them), or a path."""
    vgg_weights: PathName | None = None
    """Path of torchvision's vgg16 file, for LPIPS: sharper reconstructions, slower steps."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Device that is measured and planned for."""


def run(options: NewOptions) -> None:
    """Look, measure, choose, write, print."""
    out = Path(options.out)
    check_output("OUT", out)
    if options.size and options.size % 16:
        raise UsageError(f"--size {options.size} is no multiple of 16; set it to {options.size // 16 * 16}")
    if options.foundation == "own" and options.foundation_weights != "hub":
        raise UsageError("--foundation-weights needs --foundation: name the model that they are of, such as dinov2")
    from vadit.images.backends import open_images
    from vadit.project.measure import find_machine, look, speed
    from vadit.project.plan import Planner
    from vadit.project.stages import GENERATOR, MARK, PICTURES, TOKENIZER, Project, placed
    from vadit.recipes.small import small_vavae

    _refuse(out, options.images)
    images, weights = (str(Path(each).resolve()) for each in (options.images, options.foundation_weights))
    labels, vgg = (each and str(Path(each).resolve()) for each in (options.labels_file, options.vgg_weights))
    weights = "hub" if options.foundation_weights == "hub" else weights
    foundation = None if options.foundation == "own" else FoundationSpec(options.foundation, weights)
    spec = dataclasses.replace(small_vavae().data, path=images, labels_file=labels)
    pictures, machine = look(open_images(spec, options.size or 8).source), find_machine(options.device)
    planner = Planner(pictures, machine, speed, options.minutes, options.size, foundation, vgg)
    drafts = planner.plan()
    draft = drafts[TOKENIZER]
    held_up = pictures.decode_s > DECODING * planner.seconds(draft.config, 1)
    prepared = held_up and 5 * draft.config.autoencoder.image_size**2 * pictures.num_images < MOST_BYTES
    draft.config = vary(draft.config, data={"path": images, "labels_file": None if prepared else labels})
    out.mkdir(parents=True, exist_ok=True)
    for left in out.glob(f"{PICTURES}*"):  # of settings before
        left.unlink()
    save_json(out / MARK, dataclasses.asdict(Project(images, labels, prepared)))
    for name, draft in drafts.items():
        save_config(placed(draft.config, out / name), out / name / "config.json")

    found, tables = [pictures.words, machine.words], list[str]()
    if prepared:
        found += [f"decoding takes {pictures.decode_s:.3f} s a picture: they are scaled once, into {PICTURES}"]
    for name, draft in drafts.items():
        tables += [f"## {name}: {planner.seconds(draft.config) / 60:.1f} min by a measured step"]
        tables += ["", "| setting | value | why |", "|---|---|---|"]
        tables += [f"| {setting} | `{value}` | {why} |" for setting, value, why in draft.reasons] + [""]
    with saved_file(out / "README.md") as partial:
        text = "\n".join([f"# {out.name}", "", *(f"- {line}" for line in found), "", *tables])
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    from rich.markdown import Markdown

    say(*found)
    show(Markdown("\n".join(tables)))
    first, second = (shlex.quote(str(out / name)) for name in (TOKENIZER, GENERATOR))
    say(f"{out / 'README.md'} keeps this; next: vadit train {first} && vadit train {second}")


def _refuse(out: Path, images: str) -> None:
    """UsageError where the project would lie among its pictures, or in the place of something else."""
    from vadit.project.stages import GENERATOR, MARK, TOKENIZER
    from vadit.train import runs

    place = Path(images).resolve()
    if place in (out.resolve(), *out.resolve().parents):
        raise UsageError(f"{out} lies inside --images {images}, which would take its pictures in; name another folder")
    for name in (TOKENIZER, GENERATOR):
        if runs.has_checkpoint(runs.final_folder(out / name)):
            raise UsageError(f"{out / name} has been trained; name another folder")
    if out.exists() and any(out.iterdir()) and not (out / MARK).is_file():
        raise UsageError(f"{out} holds something that is no project of `vadit new`; name a new folder")
