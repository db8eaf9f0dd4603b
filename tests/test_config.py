"""Settings: the nearest value that each kind of range refuses and the one beside it, clashes, configs from disk."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from vadit.config import DiTConfig, DiTSpec, MaskSpec, TokenizerConfig, settled, vary
from vadit.config.files import load_config, load_run_config, save_config
from vadit.runtime.errors import RunError, UsageError
from vadit.runtime.json_files import MAX_BYTES, Count, parse_json, read_json

BASES = {
    "dit": DiTConfig(),
    "tokenizer": TokenizerConfig(),
    "maskdit": DiTConfig(mask=MaskSpec(kind="maskdit")),
    "mdt": DiTConfig(mask=MaskSpec(kind="mdt", decoder_depth=2)),
}


def changed(base: str, settings: dict[str, Any]) -> Any:
    """The config with settings changed, given by their dotted names."""
    groups: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        group, _, last = name.partition(".")
        groups.setdefault(group, {})[last] = value
    return vary(BASES[base], **groups)


@pytest.mark.parametrize(
    ("name", "refused", "taken"),
    [
        ("run.total_images", 0, 1),
        ("run.hang_timeout_s", -1, 0),
        ("engine.ema_decays", (0.9, 1.0), (0.0, 0.9999)),
        ("engine.ema_decays", (-0.1,), ()),
        ("guard.spike_factor", 1.0, 1.1),
        ("guard.spike_factor", -2.0, 0.0),
        ("guard.rollback_lr_factor", 0.0, 0.1),
        ("model.class_dropout", 1.5, 1),
        ("optimizer.betas", (0.9, 1.0), (0.0, 0.999)),
        ("model.depth", 257, 256),
        ("model.depth", 2.0, 2),
        ("model.depth", True, 1),
    ],
)
def test_the_nearest_value_that_is_refused_and_the_one_beside_it(name: str, refused: Any, taken: Any) -> None:
    changed("dit", {name: taken})
    with pytest.raises(UsageError) as caught:
        changed("dit", {name: refused})
    assert str(caught.value).startswith((f"{name} is {refused};", f"{name} {refused}:"))


FLOAT8 = {"engine.float8": "rowwise"}
MDT_CLASHES: dict[str, Any] = {
    "mask.unmasked_after_images": {"mask.unmasked_after_images": 8},
    "engine.compile": {"engine.compile": True, "engine.zero_stage": 3},
    "engine.attention": {"model.rope": False, "engine.attention": "flash"},
    "set --mask.kind none, or --model.no-value-residual": {"model.value_residual": True},
    "mask.decoder_depth 28": {"mask.decoder_depth": 28},
}
MASKDIT_CLASHES: dict[str, Any] = {
    "mask.ratio is 0.0": {"mask.ratio": 0.0},
    "mask.ratio is 1.0": {"mask.ratio": 1.0},
    "of 256 tokens some must be masked and some visible": {"mask.ratio": 0.999},
    "mask.decoder_width 520 with mask.decoder_heads 16": {"mask.decoder_width": 520},
    "mask.decoder_width 36 with mask.decoder_heads 6": {"mask.decoder_width": 36, "mask.decoder_heads": 6},
    "found flow, gvp, velocity": {"flow.path": "gvp"},
    "found flow, linear, noise": {"flow.prediction": "noise"},
    "found ddpm, linear, velocity": {"flow.objective": "ddpm", "model.learn_sigma": True},
    "flow.dispersive_weight is on": {"flow.dispersive_weight": 0.5},
    "flow.contrastive_weight is on": {"flow.contrastive_weight": 0.05},
    "set --mask.kind none, or --repa.weight 0": {"repa.weight": 0.5},
    "engine.float8 is on": FLOAT8,
    "more than one number": {"model.in_channels": 1},
}
DIT_CLASHES: dict[str, Any] = {
    "engine.offload_weights needs engine.zero_stage 3, found 2": {
        "engine.offload_weights": True,
        "engine.zero_stage": 2,
    },
    "set --optimizer.kind adamw or --engine.no-offload-optimizer": {
        "optimizer.kind": "apex_fused",
        "engine.offload_optimizer": True,
    },
    "engine.zero_stage 1 cuts into shards": {"optimizer.kind": "muon", "engine.zero_stage": 1},
    "set --engine.precision autocast or bf16": FLOAT8 | {"engine.precision": "fp32"},
    "set --engine.zero-stage 2": FLOAT8 | {"engine.zero_stage": 3},
    "found ddpm; set it to 1": {"flow.time_shift": 2.0, "flow.objective": "ddpm", "model.learn_sigma": True},
    "flow.prediction noise; it needs flow and velocity": {"flow.contrastive_weight": 0.1, "flow.prediction": "noise"},
    "set --model.learn-sigma": {"flow.objective": "ddpm"},
    "repa.block is 29; the generator has blocks 1 to 28": {"repa.weight": 0.5, "repa.block": 29},
    "repa.block is 0": {"repa.weight": 0.5, "repa.block": 0},
    "set --evaluation.tokenizer, or --evaluation.every-images 0": {"evaluation.every_images": 8},
    "FID and KID need both": {"evaluation.reference": "x.npz"},
    "model.hidden_size 1153 is not divisible": {"model.hidden_size": 1153},
    "found 1152/64": {"model.num_heads": 64},
    "model.input_size 16 is not divisible by model.patch_size 3": {"model.patch_size": 3},
}
TOKENIZER_CLASHES: dict[str, Any] = {
    "leave out --engine.float8": FLOAT8,
    "leave out --engine.attention": {"engine.attention": "flash"},
    "set --loss.vf-weight 0, or --foundation.name dinov2": {"foundation.name": "none"},
    "autoencoder.in_channels is 1; images to train on have 3": {"autoencoder.in_channels": 1},
    "loss.disc_layers is 7, which leaves nothing of autoencoder.image_size 256": {"loss.disc_layers": 7},
    "no level has a side of 7": {"autoencoder.attention_resolutions": (16, 7)},
    "choose a multiple of 16": {"autoencoder.image_size": 250},
    "norm_groups 48 does not divide the level width 128": {"autoencoder.norm_groups": 48},
}
CLASHES = {"dit": DIT_CLASHES, "tokenizer": TOKENIZER_CLASHES, "maskdit": MASKDIT_CLASHES, "mdt": MDT_CLASHES}


@pytest.mark.parametrize(
    ("base", "words"), [(base, words) for base, clashes in CLASHES.items() for words in clashes], ids=str
)
def test_settings_that_clash_are_refused_with_what_to_set(base: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        changed(base, CLASHES[base][words])
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("base", "settings", "processes", "device", "taken"),
    [
        ("dit", {}, 1, "cpu", (0, False)),
        ("dit", {}, 1, "cuda", (0, True)),
        ("dit", {}, 4, "cuda", (1, True)),
        ("dit", {"engine.compile": False, "engine.zero_stage": 1}, 1, "cuda", (1, False)),
        ("dit", {"engine.precision": "bf16"}, 1, "cuda", (0, True)),
        ("dit", {"engine.precision": "bf16"}, 2, "cuda", (1, True)),
        ("dit", {"engine.precision": "bf16", "optimizer.kind": "apex_fused"}, 1, "cuda", (1, True)),
        ("dit", {"engine.offload_optimizer": True}, 1, "cpu", (1, False)),
        ("dit", {"engine.offload_weights": True}, 1, "cuda", (3, True)),
        ("dit", {"optimizer.kind": "muon"}, 4, "cpu", (0, False)),
        ("mdt", {"engine.zero_stage": 3}, 4, "cuda", (3, False)),
        ("tokenizer", {}, 1, "cuda", (0, True)),
    ],
    ids=str,
)
def test_what_auto_takes(base: str, settings: dict[str, Any], processes: int, device: str, taken: Any) -> None:
    engine = settled(changed(base, settings), processes=processes, device=device).engine
    assert (engine.zero_stage, engine.compile) == taken


def test_bf16_unsharded_is_for_one_process() -> None:
    config = changed("dit", {"engine.precision": "bf16", "engine.zero_stage": 0})
    with pytest.raises(UsageError, match=r"found 2 process\(es\) and adamw: set --engine.zero-stage 1, or"):
        settled(config, processes=2, device="cuda")


@pytest.mark.parametrize(
    ("base", "settings"),
    [
        ("dit", {"engine.precision": "bf16"}),
        ("dit", {"engine.offload_weights": True, "engine.zero_stage": 3}),
        ("dit", {"engine.offload_optimizer": True}),
        ("dit", {"optimizer.kind": "muon", "engine.zero_stage": 0}),
        ("dit", FLOAT8),
        ("dit", {"flow.contrastive_weight": 0.1, "flow.time_shift": 2.0}),
        ("dit", {"repa.weight": 0.5, "repa.block": 28}),
        ("dit", {"repa.weight": 0.0, "repa.block": 99}),
        ("dit", {"model.num_heads": 64, "model.rope": False}),
        ("tokenizer", {"engine.compile": True, "engine.zero_stage": 3}),
        ("tokenizer", {"loss.vf_weight": 0.0, "foundation.name": "none"}),
        ("maskdit", {"mask.unmasked_after_images": 0}),
        ("mdt", {"mask.decoder_depth": 27}),
        ("mdt", {"engine.attention": "flash"}),
        ("mdt", {"engine.compile": True, "engine.zero_stage": 2}),
    ],
    ids=str,
)
def test_what_is_beside_a_clash_is_taken(base: str, settings: dict[str, Any]) -> None:
    changed(base, settings)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"batch_size"', '"bach_size"', "unknown setting run.bach_size; did you mean run.batch_size?"),
        ('"run": {', '"runs": {', "unknown setting runs; did you mean run?"),
        ('"batch_size": 1024', '"batch_size": 0', "run.batch_size is 0; it must be at least 1"),
        ('"batch_size": 1024', '"batch_size": "5"', "run.batch_size: "),
        ('"batch_size": 1024', '"batch_size": true', "run.batch_size: "),
        ('"attention": "auto"', '"attention": "fastest"', "engine.attention: "),
        ('"kind": "dit"', '"kind": "gan"', "kind is 'gan'; needed: tokenizer or dit"),
    ],
)
def test_a_config_on_disk_is_checked_and_named(old: str, new: str, words: str, tmp_path: Path) -> None:
    save_config(DiTConfig(), tmp_path / "config.json")
    assert load_run_config(tmp_path) == DiTConfig()
    text = (tmp_path / "config.json").read_text()
    assert text.count(old) == 1 and json.loads(text)
    (tmp_path / "config.json").write_text(text.replace(old, new))
    with pytest.raises(UsageError) as caught:
        load_run_config(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: {words}")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "Expecting value"),
        (b"\x80\x02}q\x00.", "can't decode byte 0x80"),
        ('{"run": {}}'.encode("utf-16"), "can't decode byte"),
        (b'{"run": {}', "Expecting"),
        (b"[" * 100_000, "nested deeper than 64"),
        (b'{"run":' * 65 + b"1" + b"}" * 65, "nested deeper than 64"),
        (b'{"run": ' + b"9" * 5000 + b"}", "an integer of 5000 digits"),
        (b'{"run": 1e999}', "1e999 is no finite number"),
        (b'{"run": NaN}', "NaN is no finite number"),
        (b'{"run": {}, "run": {}}', "the key 'run' is there twice"),
        (b"[" + b" " * MAX_BYTES + b"]", "more than 32 MiB"),
        (b"[]", "Input should be a valid dictionary (found [])"),
        (None, "Is a directory"),
        (0, ""),
    ],
)
def test_json_that_is_none_is_one_sentence(content: bytes | int | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is None:
        path.mkdir()
    else:
        os.mkfifo(path)  # nobody writes to it
    for error, remedy in ((RunError, "; make it anew"), (UsageError, "")):
        with pytest.raises(error) as caught:
            read_json(path, dict[str, Any], error=error, remedy=remedy.removeprefix("; "))
        assert str(caught.value).startswith(str(path)) and words in str(caught.value)
        assert str(caught.value).endswith(remedy) and len(str(caught.value).splitlines()) == 1
    pytest.raises(UsageError, load_run_config, tmp_path).match(r"config\.json")
    pytest.raises(UsageError, load_config, DiTSpec, path).match(r"config\.json")


def test_json_with_a_mark_at_its_start_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b'\xef\xbb\xbf{"run": [1, NaN]}')
    assert read_json(path, dict[str, list[float]], allow_nan=True)["run"] == pytest.approx([1, math.nan], nan_ok=True)
    with pytest.raises(RunError, match=r"run: Input should be greater than or equal to 0 \(found -5\)"):
        parse_json('{"run": -5}', dict[str, Count], "a text")
