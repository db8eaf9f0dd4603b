"""A run against its data and its machine: shapes that follow the latents, batches that are too large."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from latent_files import CHANNELS, CLASSES, SIDE, moments_folder, reference_folder

from vadit import cli
from vadit.config import Config, vary
from vadit.estimate.memory import estimate
from vadit.models.dit import LightningDiT
from vadit.recipes import get_recipe
from vadit.runtime import free, launcher
from vadit.runtime.errors import UsageError
from vadit.train import fit, runs
from vadit.train.checkpoint.export import load_generator

RECIPE = "lightningdit-xl-64ep-debug"
GIB = 2**30


def test_shapes_follow_the_data(tmp_path: Path, capsys) -> None:
    moments_folder(tmp_path / "ours")
    reference_folder(tmp_path / "theirs")
    run = tmp_path / "run"

    def train(data: str, *flags: str, out: Path = run) -> str:
        code = cli.main(["train", RECIPE, "--data.path", str(tmp_path / data), "--run.out", str(out), *flags])
        found = capsys.readouterr().err
        assert code == (2 if "error:" in found else 0)
        return found

    def shape(out: Path) -> tuple[int, ...]:
        model = json.loads((out / "config.json").read_text())["model"]
        return tuple(model[name] for name in ("in_channels", "input_size", "num_classes"))

    words = train("ours")
    assert "not the recipe's: model.in_channels 4 (32), model.input_size 3 (4), model.num_classes 5 (10)" in words
    assert shape(run) == (CHANNELS, SIDE, CLASSES)
    spec = load_generator(run).spec
    assert (spec.in_channels, spec.input_size, spec.num_classes) == shape(run)
    again = train("ours", "--run.total-images", "12")
    assert "as the run was begun, not the recipe's" in again and "12 of 12" in again
    # labels of the authors' files say no number of classes, so it stays the recipe's; 2 x 3 x 3 is none of theirs
    train("theirs", out=tmp_path / "other")
    assert shape(tmp_path / "other") == (CHANNELS, SIDE, 10)
    train("ours", "--model.num_classes=7", out=tmp_path / "more")
    assert shape(tmp_path / "more") == (CHANNELS, SIDE, 7)
    assert cli.main(["train", RECIPE, "--data.path", str(tmp_path / "ours"), "--dry-run"]) == 0
    assert f'"num_classes": {CLASSES}' in capsys.readouterr().out

    for flags, wrong in (
        (
            ("--model.num-classes", "3", "--model.in-channels=32"),
            "in_channels is 32 .* 4, model.num_classes is 3 .* 5;",
        ),
        (("--model.input_size", "4"), "model.input_size is 4 where the latents have 3; set --model.input-size 3"),
    ):
        error = train("ours", *flags, out=tmp_path / "new").splitlines()[-1]
        assert re.search(wrong, error) and "set --model." in error and not (tmp_path / "new").exists()
    shutil.rmtree(tmp_path / "ours")
    moments_folder(tmp_path / "ours", channels=2, classes=6)
    error = train("ours").splitlines()[-1]
    assert "model.in_channels is 4 where the latents have 2, model.num_classes is 5 where the latents have 6;" in error
    assert f"--run.init-from {run}" in error


def test_weights_of_other_classes_are_a_start(tmp_path: Path) -> None:
    """Known classes keep their rows where some are added, and none does where there are fewer: they are others."""
    spec = get_recipe("lightningdit-b-debug").model  # type: ignore[union-attr]
    old = LightningDiT(spec)
    torch.nn.init.normal_(old.y_embedder.embedding_table.weight)
    old.save_pretrained(tmp_path)
    for count, kept in ((spec.num_classes + 2, spec.num_classes), (3, 0), (spec.num_classes, spec.num_classes)):
        new = LightningDiT(dataclasses.replace(spec, num_classes=count))
        before = new.y_embedder.embedding_table.weight.detach().clone()
        runs.initialise(new, str(tmp_path))
        after, source = new.y_embedder.embedding_table.weight, old.y_embedder.embedding_table.weight
        assert torch.equal(after[:kept], source[:kept]) and torch.equal(after[kept:-1], before[kept:-1])
        assert torch.equal(after[-1], source[-1]) and torch.equal(
            new.x_embedder.proj.weight, old.x_embedder.proj.weight
        )


def sized(name: str, out: Path, batch: int, data: str = "debug:8", **engine: Any) -> Config:
    return vary(get_recipe(name), run={"out": str(out), "batch_size": batch}, data={"path": data}, engine={**engine})


def test_a_batch_that_is_too_large_is_refused_before_anything_is_built(tmp_path: Path, monkeypatch) -> None:
    known: dict[tuple, Any] = {}  # estimates take a second

    def estimated(config: Config, count: int) -> Any:
        key = (config.kind, config.engine.gradient_accumulation)
        return known[key] if key in known else known.setdefault(key, estimate(config, 1))

    monkeypatch.setattr(fit, "estimate", estimated)
    monkeypatch.setattr(fit, "free_bytes", lambda device: 6 * GIB)
    out, cpu = tmp_path / "run", torch.device("cpu")
    for name in ("lightningdit-b-debug", "vavae-f16d32-dinov2-debug"):
        with pytest.raises(UsageError, match=r"run\.batch_size 12 is more than the 11 samples .*--run\.batch-size 10 "):
            fit.check_size(sized(name, out, 12, "photos", gradient_accumulation=2), 11, cpu)
        fit.check_size(sized(name, out, 12), 8, cpu)  # debug data are of any number
    needs = r"run\.batch_size 64 needs about \d+\.\d GiB for the 64 images of a pass, and 6\.0 GiB of memory are free"
    cuts = []
    for name in ("vavae-f16d32-dinov2", "lightningdit-b"):
        with pytest.raises(UsageError, match=rf"{needs} .* set --engine\.gradient-accumulation \d") as caught:
            fit.check_size(sized(name, out, 64), 64, cpu)
        cuts += re.findall(r"accumulation (\d+) .* or a smaller --run\.batch-size", str(caught.value))
    fit.check_size(sized("lightningdit-b", out, 64, gradient_accumulation=int(cuts[1])), 64, cpu)
    config = sized("lightningdit-b", out, 64)
    with monkeypatch.context() as patch:  # two on a machine share its memory
        patch.setattr(launcher, "_place", launcher.Place(0, 2, 0, "localhost", 1, True, 2))
        pytest.raises(UsageError, fit.check_size, config, 64, cpu).match(r"32 images of a pass, and 3\.0 GiB")
    monkeypatch.setattr(fit, "free_bytes", lambda device: 1 * GIB)
    pytest.raises(UsageError, fit.check_size, config, 64, cpu).match("set a smaller network")
    for name in ("contrastive_weight", "dispersive_weight"):  # their losses compare the samples of a micro-batch
        one = vary(sized("lightningdit-b-debug", out, 2, gradient_accumulation=2), flow={name: 0.1})
        pytest.raises(UsageError, fit.check_size, one, 8, cpu).match(rf"flow\.{name} compares .* which holds 1; raise")
    assert not out.exists()
    monkeypatch.setattr(fit, "has_checkpoint", lambda folder: True)  # it did fit
    fit.check_size(config, 8, cpu)


def test_free_memory_knows_the_limits_of_containers(tmp_path: Path, monkeypatch) -> None:
    for name in ("MEMINFO", "OWN_GROUPS", "GROUPS"):
        monkeypatch.setattr(free, name, tmp_path / name)
    cpu = torch.device("cpu")
    assert free.free_bytes(cpu) > 2**60  # a machine that does not say
    (tmp_path / "MEMINFO").write_text("MemTotal: 9 kB\nMemAvailable:    1000 kB\n")
    assert free.free_bytes(cpu) == 1_024_000

    def group(folder: Path, limit: str, values: tuple[str, str, str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        most, taken, idle, cache = values
        (folder / most).write_text(f"{limit}\n")
        (folder / taken).write_text("700\n")
        (folder / "memory.stat").write_text(f"anon 1\n{idle} {cache}\nx 2\n")

    second, first = ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
    groups = tmp_path / "GROUPS"
    (tmp_path / "OWN_GROUPS").write_text("7:cpu:/a\n4:memory:/box/one\n0::/user/one\n")
    group(groups / "user" / "one", "max", (*second, "inactive_file", "100"))
    assert free.free_bytes(cpu) == 1_024_000
    group(groups / "user", "2000", (*second, "inactive_file", "100"))  # of all that are in it
    assert free.free_bytes(cpu) == 1400
    group(groups / "memory", "1500", (*first, "total_inactive_file", "0"))  # a container, which does not see /box
    assert free.free_bytes(cpu) == 800
    group(groups, "600", (*second, "inactive_file", "0"))
    assert free.free_bytes(cpu) == 0
