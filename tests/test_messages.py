"""What messages advise: flags that there are, written as they can be typed, for the command that failed."""

import ast
import json
import os
import pickle
import pkgutil
import re
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from rich.table import Table

import vadit
from vadit import cli
from vadit.commands import arguments, convert, demo, encode, evaluate, new, prepare, report, sample, train
from vadit.commands.arguments import flags_of, parse
from vadit.config import FoundationSpec, vary
from vadit.config.files import save_config
from vadit.eval.latents import read_vectors
from vadit.latents.statistics import load_statistics
from vadit.models import interop
from vadit.models.foundation import FoundationModel
from vadit.models.lpips import LPIPS
from vadit.recipes import get_recipe
from vadit.runtime import console
from vadit.runtime.errors import RunError, UsageError
from vadit.train import runs
from vadit.train.checkpoint import publish

PACKAGE = Path(vadit.__file__).parent
ROOT = PACKAGE.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("[a-z]*/README.md"))]
OPTIONS = (
    *(train.TrainTokenizer, train.TrainGenerator, sample.SampleOptions, encode.EncodeOptions, report.ReportOptions),
    *(evaluate.EvaluateSamplesOptions, evaluate.EvaluateTokenizerOptions, evaluate.EvaluateLatentsOptions),
    *(evaluate.MakeReferenceOptions, prepare.PrepareOptions, demo.DemoOptions, new.NewOptions),
    *(convert.ImportOptions, convert.ExportOptions),
)
COMMON = {"--help", "--version", "--debug", "--local_rank", "--local-rank"}
EXAMPLES = {"--setting", "--name"}  # They stand for any flag.
OF_OTHERS = {
    *("--no-build-isolation", "--config-settings", "--build-option", "--cpp_ext", "--cuda_ext", "--force-reinstall"),
    *("--dereference", "--hard-dereference", "--concatenate", "--module"),
}
"""pip's and apex's; tar's; deepspeed's."""
OF_SCRIPTS = {
    "--contender",
    "--rehearse",
    "--nodes",
    "--nproc_per_node",
    "--requeue",
    "--signal",
    "--time",
    "--recipe",
    "--batch",
    "--compile",
}
"""torchrun's, sbatch's; benchmarks/bench_step.py's."""
HOLE = "\0"  # Where an f-string puts something in.


def literals(source: str) -> Iterator[str]:
    """Every string of a module, those in pieces put together."""
    tree = ast.parse(source)
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else HOLE for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node.value


def named_flags(text: str) -> Iterator[str]:
    """The flags in a text; of one that goes on in an f-string's hole or in a pattern, its beginning and HOLE.

    CSS has variables that look like flags: `var(--ink)`, and `--ink:#123`.
    """
    for match in re.finditer(rf"(?<![\w-])(?<!var\()--[a-z][\w.{HOLE}\[-]*(?![\w.-]*:#)", text):
        head, goes_on, _ = re.match(rf"([^{HOLE}\[]*)([{HOLE}\[]?)(.*)", match[0]).groups()  # type: ignore[union-attr]
        yield head + HOLE if goes_on or head.endswith("-") else head.rstrip(".")


def unknown_flags(source: str, known: set[str]) -> list[str]:
    found = [flag for text in literals(source) for flag in named_flags(text)]
    begun = {flag for flag in found if flag.endswith(HOLE) and any(each.startswith(flag[:-1]) for each in known)}
    return [flag for flag in found if flag not in known and flag not in begun]


def known_flags() -> set[str]:
    return {flag for options in OPTIONS for flag in flags_of(options)} | COMMON


def test_flags_in_messages_are_those_of_a_command_and_others_would_be_found() -> None:
    known = known_flags() | EXAMPLES | OF_OTHERS
    assert {"--data.no-flip", "--no-normalize", "--dry-run", "--cfg-scale", "--stats-only"} <= known
    assert "--source" not in known  # it is told by its place
    wrong = {str(file.relative_to(PACKAGE)): unknown_flags(file.read_text(), known) for file in PACKAGE.rglob("*.py")}
    assert {file: flags for file, flags in wrong.items() if flags} == {}
    source = r"""
'''Set --data.path. Not a --flag.'''
fail(f"{x} is on; set --no-data.flip, or (vadit train: --data.{name}), or --nowhere.{name} "
     "or --data.no-flip.")
re.match(r"--local[_-]rank", "var(--ink) --ink:#123 a--b ---c --{x}")
"""
    assert sorted(unknown_flags(source, known_flags())) == ["--flag", "--no-data.flip", "--nowhere." + HOLE]


def documented_commands(document: Path) -> Iterator[list[str]]:
    """The arguments of every `vadit ...` in a document's blocks of code, those behind launchers, too."""
    for block in re.findall(r"^```\w*\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL):
        for line in re.split(r"\n| && ", block.replace("\\\n", " ")):
            found = re.search(r"(^vadit|module vadit|train\.sh|torchrun\.sh|slurm\.sbatch) ([^#]*)", line)
            if found is not None and not line.startswith("#"):
                words = shlex.split(found[2].strip().removesuffix("..."))
                words = ["lightningdit-b" if word == "RECIPE" else word for word in words]
                yield words if found[1].endswith("vadit") else ["train", *words]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_of_a_document_is_understood(document: Path, monkeypatch, capsys, tmp_path: Path) -> None:
    def only_parse(*args: Any, **settings: Any) -> NoReturn:
        parse(*args, **settings)
        raise SystemExit(99)

    for module in (arguments, sample, train):
        monkeypatch.setattr(module, "parse", only_parse)
    for run, recipe in (("tokenizer", "small-vavae"), ("generator", "small-dit")):  # of the project that they speak of
        save_config(get_recipe(recipe), tmp_path / "mine" / run / "config.json")
    monkeypatch.chdir(tmp_path)
    commands = list(documented_commands(document))
    assert commands or document.name not in ("data.md", "checkpoints.md", "scaling.md")
    for command in commands:
        assert cli.main(command) == 99, (command, capsys.readouterr().err)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_flag_and_file_that_a_document_names_is_there(document: Path) -> None:
    text = document.read_text()
    flags = {flag for flag in named_flags(text) if not flag.endswith(HOLE)}
    groups = {flag.rsplit(".", 1)[0] for flag in known_flags() if "." in flag}
    assert flags - known_flags() - groups - EXAMPLES - OF_OTHERS - OF_SCRIPTS == set()
    settings = {flag.replace("-", "_").lstrip("_") for flag in known_flags() if "." in flag}
    named = {name for name in re.findall(r"`(\w+\.\w+)`", text) if f"--{name.split('.')[0]}" in groups}
    assert {name for name in named - settings if not name.endswith((".json", ".jsonl", ".safetensors"))} == set()
    paths = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    assert [path for path in paths if not (document.parent / path).exists()] == []
    files = re.findall(r"`((?:vadit|benchmarks|tests|launch|docs|csrc|kernels)/[\w/.-]+)`", text)
    assert [path for path in files if not (ROOT / path).exists()] == []
    for name in re.findall(r"`(vadit(?:\.\w+)+)", text):
        pkgutil.resolve_name(name)


def test_runs_of_another_kind_and_files_of_the_authors_are_told(tmp_path: Path, monkeypatch) -> None:
    save_config(get_recipe("vavae-f16d32-dinov2"), tmp_path / "config.json")
    monkeypatch.setattr(publish, "newest", lambda folder, hashes: folder)
    with pytest.raises(UsageError, match=r"kind tokenizer.* --run\.out"):
        runs.check_folder(vary(get_recipe("lightningdit-b"), run={"out": str(tmp_path)}), 1)
    torch.save({"ema": {}}, tmp_path / "theirs.pt")
    with pytest.raises(UsageError, match=r"is a file of \.pt; needed: a run, .* `vadit import .*theirs\.pt --out"):
        runs.initialise(torch.nn.Linear(1, 1), str(tmp_path / "theirs.pt"))


HOSTILE = "r[exp1]x[/red] \x1b[45mA\x1b]0;B\x07\rC\u202e\x9b\udce9 é"
SHOWN = r"r[exp1]x[/red] \x1b[45mA\x1b]0;B\x07\rC\u202e\x9b\xe9 é"


@pytest.mark.parametrize("terminal", [True, False])
def test_strangers_words_are_shown_and_never_obeyed(terminal: bool, monkeypatch, capsys) -> None:
    """As results, notes, cells, titles and tracebacks; above a bar, in it and without one."""
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr(console._console, "_width", 400)  # which may be older than this test
    monkeypatch.setenv("FORCE_COLOR", "1" if terminal else "")
    error = ValueError(HOSTILE)

    def all_ways() -> None:
        console.say(HOSTILE, HOSTILE)
        console.note(HOSTILE)
        print(HOSTILE, file=sys.stderr)
        traceback.print_exception(error)

    with console.guarded_streams():
        all_ways()
        table = Table(title=HOSTILE)
        table.add_column(HOSTILE)
        table.add_row(HOSTILE)
        console.show(table)
        with console.ProgressBar(HOSTILE, 2) as bar:
            bar.update(1, note=HOSTILE)
            all_ways()
    out = "".join(capsys.readouterr())
    assert out.count(SHOWN) >= 2 * 5 + 3 + 2
    own = {"\n", " ", *(set("\x1b\r") if terminal else "")}
    assert {each for each in out if not each.isprintable()} <= own
    assert not re.search("\x1b(?!\\[[\\d;?]*[a-zA-Z])|\x1b\\[45m|\r(?!\x1b\\[2K)", out)


def test_progress_is_lines_where_no_bar_can_be_drawn(monkeypatch, capsys) -> None:
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with console.ProgressBar("train", 10_000, done=400) as bar:
        for second in range(1, 41):  # each takes a second, the first 20, as if it compiled
            now[0] = 19.0 + second
            bar.update(400 + 10 * second, note=f"loss {second}" if second in (2, 12) else None)
    assert capsys.readouterr().err.splitlines() == [
        "train: 410 of 10,000",
        "train: 420 of 10,000, 10.0/s, 0:15:58 left, loss 2",
        "train: 520 of 10,000, 10.0/s, 0:15:48 left, loss 12",
        "train: 620 of 10,000, 10.0/s, 0:15:38 left",
        "train: 730 of 10,000, 10.0/s, 0:15:27 left",
        "train: 800 of 10,000, 10.0/s, 0:15:20 left",
    ]
    with pytest.raises(ZeroDivisionError):
        for item in console.counted("evaluate", 6, ["ab", "cd", "ef"]):
            now[0] += 1
            assert 1 / (item != "ef")
    assert capsys.readouterr().err.splitlines() == ["evaluate: 4 of 6, 2.0/s, 0:00:01 left"]


def test_a_stranger_s_name_in_an_error(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert cli.main(["evaluate", "latents", "--latents", f"{HOSTILE}\nerror: more"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and SHOWN in told
    assert json.loads((tmp_path / "error.json").read_text())["message"] == told.strip()


class Code:
    def __reduce__(self) -> Any:
        return os.system, ("exit 1",)


def as_scripted(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Identity()), path)  # type: ignore[no-untyped-call]


PROGRAMS: dict[str, Callable[[Path], object]] = {
    "a system call": lambda path: torch.save({"mean": Code()}, path),
    "in the old format": lambda path: torch.save(Code(), path, _use_new_zipfile_serialization=False),
    "a bare pickle": lambda path: path.write_bytes(pickle.dumps(Code())),
    "of protocol 0": lambda path: path.write_bytes(pickle.dumps(Code(), protocol=0)),
    "a whole network": lambda path: torch.save(torch.nn.Linear(1, 1), path),
    "TorchScript": as_scripted,
}
READERS: dict[str, Callable[[Path], object]] = {
    "weights": lambda path: interop.load_foreign(path),
    "LPIPS": LPIPS,
    "foundation": lambda path: FoundationModel(FoundationSpec(name="vit_tiny_patch16_224", weights=str(path)), 2),
    "statistics": lambda path: load_statistics(path.parent, 4),
    "vectors": read_vectors,
}


@pytest.mark.parametrize("reader", READERS)
def test_a_file_that_wants_to_run_code_is_refused_for_that(reader: str, tmp_path: Path) -> None:
    for program, write in PROGRAMS.items():
        write(path := tmp_path / "latents_stats.pt")
        with pytest.raises(UsageError, match=r"latents_stats\.pt was refused: it wants to run code") as caught:
            READERS[reader](path)
        assert "weights_only" not in str(caught.value), program
        assert not (tmp_path / "out").exists()


def test_libraries_words_on_how_to_run_it_are_not_passed_on(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([Code()], dtype=object), allow_pickle=True)
    with pytest.raises(RunError, match=r"x\.npy .*\(refused: it wants to run code") as caught:
        read_vectors(tmp_path / "x.npy")
    assert "allow_pickle" not in str(caught.value)
