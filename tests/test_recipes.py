"""Recipes: the paper's tables row by row, and debug twins that keep every switch and train."""

import ast
import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from vadit import cli
from vadit.config import Config, DiTConfig, TokenizerConfig
from vadit.config.files import from_dict, load_run_config
from vadit.recipes import DIT_SIZES, PAPER_RECIPES, RECIPES, SHORT_NAMES, get_recipe

SIZES = {
    "model": {"input_size", "hidden_size", "depth", "num_heads", "num_classes"},
    "autoencoder": {"image_size", "base_channels", "norm_groups", "num_res_blocks", "attention_resolutions"},
    "foundation": {"name", "weights", "model_args"},
    "loss": {"perceptual_weight", "disc_channels", "disc_start_step"},
    "flow": {"uniform_after_images"},
    "repa": {"block", "projector_width", "foundation"},
    "mask": {"decoder_depth", "decoder_width", "decoder_heads"},
    "optimizer": {"warmup_images"},
    "data": {"path", "num_workers"},
    "sample": {"num_steps"},
    "engine": {"precision", "ema_warmup"},
}
"""What a debug twin may change, by group; run, paper and the stages' lengths are looked at apart."""


def flat(config: Config) -> dict[str, Any]:
    """Every setting by its dotted name, but for the run's folder and what is written about the paper."""

    def walk(value: Any, name: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            return {name: value}
        return {key: leaf for part, inner in value.items() for key, leaf in walk(inner, f"{name}.{part}").items()}

    leaves = walk(dataclasses.asdict(config), "")
    return {key[1:]: leaf for key, leaf in leaves.items() if not key.startswith(".paper.") and key != ".run.out"}


def difference(before: str, after: str) -> dict[str, Any]:
    """Settings in which recipe `after` differs from recipe `before`, with their new values."""
    old, new = flat(get_recipe(before)), flat(get_recipe(after))
    assert old.keys() == new.keys()
    return {name: new[name] for name in new if new[name] != old[name]}


def test_recipe_is_a_whole_config_that_survives_the_disk() -> None:
    for name in RECIPES:
        config = get_recipe(name)
        if name in PAPER_RECIPES:  # twins go through the disk where they train
            values = json.loads(json.dumps(dataclasses.asdict(config)))
            assert from_dict(type(config), values, origin=name) == config
        assert config.paper.source and config.paper.metric, name
        assert config.run.out == f"runs/{name}"
        assert not isinstance(config, DiTConfig) or config.paper.tokenizer, name


HEADLINE, DIT, VAVAE = "lightningdit-xl-64ep", "table1-00-dit", "vavae-f16d32-dinov2-50ep"
EPOCH = 1_281_167
PUBLISHED = {
    VAVAE: """
autoencoder image_size=256 in_channels=3 latent_channels=32 base_channels=128 channel_multipliers=(1,1,2,2,4)
autoencoder num_res_blocks=2 attention_resolutions=(16,) norm_groups=32
foundation name='dinov2' weights='hub' input_range='minus_one_one'
loss perceptual_weight=1.0 kl_weight=1e-6 disc_weight=0.5 disc_start_step=5001 disc_channels=64 disc_layers=3
loss vf_weight=0.1 vf_adaptive=True cos_margin=0.5 distmat_margin=0.25 cos_weight=1.0 distmat_weight=1.0
optimizer kind='adamw' lr=1e-4 betas=(0.5,0.9) eps=1e-8 weight_decay=0.0 schedule='constant' warmup_images=0
engine precision='fp32' max_grad_norm=0.0 ema_decays=()
run batch_size=256 total_images=64058350
data crop='random' flip=False on_error='raise'
""",
    HEADLINE: """
model patch_size=1 input_size=16 in_channels=32 depth=28 hidden_size=1152 num_heads=16 mlp_ratio=4.0 num_classes=1000
model class_dropout=0.1 label_init_std=0.02 swiglu=True rope=True rmsnorm=True qk_norm=False learn_sigma=False
model shift_free=False value_residual=False
flow objective='flow' path='linear' prediction='velocity' time_law='logit_normal' direction_loss=True time_shift=1.0
flow uniform_after_images=None loss_weighting='none' contrastive_weight=0.0 dispersive_weight=0.0
optimizer kind='adamw' lr=2e-4 betas=(0.9,0.95) eps=1e-8 weight_decay=0.0 schedule='constant' warmup_images=0
engine precision='autocast' max_grad_norm=0.0 ema_decays=(0.9999,) ema_warmup=False gradient_accumulation=1
run batch_size=1024 total_images=81920000 seed=0
data normalize=True multiplier=1.0 flip=True
sample method='euler' num_steps=250 timestep_shift=0.3 cfg_scale=10.0 cfg_interval=(0.11,1.0) cfg_channels=3
sample cfg_power=None atol=1e-6 rtol=1e-3 labels='random'
repa weight=0.0
mask kind='none'
""",
    DIT: """
model patch_size=2 input_size=32 in_channels=4 depth=28 hidden_size=1152 num_heads=16 learn_sigma=True
model swiglu=False rope=False rmsnorm=False qk_norm=False shift_free=False
flow objective='ddpm' time_law='uniform' direction_loss=False
optimizer lr=1e-4 betas=(0.9,0.999) weight_decay=0.0
run batch_size=256 total_images=102400000
data normalize=False multiplier=0.18215 flip=True
sample method='ddpm' num_steps=250 cfg_scale=1.0 cfg_channels=None
""",
}
"""The recipes that all others are told by: what the papers and the authors' configs say."""


def settings(lines: str) -> dict[str, Any]:
    """Settings by their dotted names: a group a line, name=value."""
    groups = [line.split() for line in lines.strip().splitlines()]
    pairs = [(group[0], *setting.split("=")) for group in groups for setting in group[1:]]
    return {f"{group}.{name}": ast.literal_eval(value) for group, name, value in pairs}


@pytest.mark.parametrize("name", PUBLISHED)
def test_settings_that_all_others_differ_from_are_the_published_ones(name: str) -> None:
    found, published = flat(get_recipe(name)), settings(PUBLISHED[name])
    assert {key: found[key] for key in published} == published


def test_released_tokenizer_trains_in_three_stages() -> None:
    config = get_recipe("vavae-f16d32-dinov2")
    assert [dataclasses.astuple(stage) for stage in config.stages] == [
        (100 * EPOCH, 0.5, 0.0, 0.0, 5001),
        (15 * EPOCH, 0.1, 0.0, 0.0, 1),
        (15 * EPOCH, 0.1, 0.5, 0.25, 1),
    ]
    change = difference(VAVAE, "vavae-f16d32-dinov2")
    del change["stages"]
    first = {"loss.vf_weight": 0.5, "loss.cos_margin": 0.0, "loss.distmat_margin": 0.0}
    assert change == first | {"run.total_images": 130 * EPOCH}


def test_sizes_are_the_papers() -> None:
    table = {name: (size["depth"], size["hidden_size"], size["num_heads"]) for name, size in DIT_SIZES.items()}
    assert table == {
        "B": (12, 768, 12),
        "L": (24, 1024, 16),
        "XL": (28, 1152, 16),
        "1p0B": (24, 1536, 24),
        "1p6B": (28, 1792, 28),
    }


TABLE_1 = {
    "table1-01-rectified-flow": ("17.20", "flow objective='flow'\nmodel learn_sigma=False\nsample method='dopri5'"),
    "table1-02-batch-1024": ("16.59", "run batch_size=1024\noptimizer lr=2e-4"),
    "table1-03-beta2": ("16.61", "optimizer betas=(0.9,0.95)"),
    "table1-04-logit-normal": ("13.99", "flow time_law='logit_normal'"),
    "table1-05-direction": ("12.52", "flow direction_loss=True"),
    "table1-06-swiglu": ("10.10", "model swiglu=True"),
    "table1-07-rmsnorm": ("9.25", "model rmsnorm=True"),
    "table1-08-rope": ("7.13", "model rope=True"),
    "table1-09-vavae": ("4.29", "model patch_size=1 in_channels=32 input_size=16\ndata normalize=True multiplier=1.0"),
}
"""FID and what the row changes in the row before it."""

TABLE_2 = """
f16d16         0.49 26.10 0.132 0.72   16.24  9.49  8.28
f16d16-mae     0.51 26.01 0.137 0.71   16.86 10.93  9.19
f16d16-dinov2  0.55 25.29 0.147 0.69   15.79 10.02  8.71
f16d32         0.26 28.59 0.089 0.80   22.62 12.86 10.92
f16d32-mae     0.28 28.33 0.091 0.80   19.89 11.51  9.92
f16d32-dinov2  0.28 27.96 0.096 0.79   15.82  9.82  8.22
f16d64         0.17 31.03 0.055 0.88   36.83 20.73 17.24
f16d64-mae     0.15 31.03 0.054 0.87   23.58 14.40 11.69
f16d64-dinov2  0.14 30.71 0.055 0.87   24.00 14.95 11.98
"""
TABLE_4_AND_5 = """
f16d32-sam                 0.26 28.31 0.091 0.80  19.80
f16d32-clip                0.33 28.39 0.091 0.80  18.93
f16d32-dinov2-no-mcos      0.27 28.52 0.090 0.80  21.87
f16d32-dinov2-no-mdistmat  0.27 28.24 0.090 0.80  17.74
f16d32-dinov2-no-margin    0.27 28.07 0.093 0.79  17.77
"""
"""Tokenizer: rFID, PSNR, LPIPS, SSIM, FID-10K of B (and of L and XL); without those of Table 2."""

ALIGNMENT: dict[str, dict[str, Any]] = {
    "": {"foundation.name": "none", "loss.vf_weight": 0.0},
    "mae": {"foundation.name": "mae"},
    "sam": {"foundation.name": "sam"},
    "clip": {"foundation.name": "clip"},
    "dinov2": {},
    "dinov2-no-mcos": {"loss.cos_weight": 0.0, "loss.vf_weight": 0.05},
    "dinov2-no-mdistmat": {"loss.distmat_weight": 0.0, "loss.vf_weight": 0.05},
    "dinov2-no-margin": {"loss.cos_margin": 0.0, "loss.distmat_margin": 0.0},
}
"""What a tokenizer of the tables changes in the one with DINOv2; w_hyper is halved for half of the loss (6.3)."""


def test_table_1_is_ten_recipes_each_one_change_from_the_last() -> None:
    names = [name for name in PAPER_RECIPES if name.startswith("table1-")]
    assert names == [DIT, *TABLE_1]
    assert get_recipe(DIT).paper.metric == "fid50k_ddpm250_random 19.50"
    for before, name in itertools.pairwise(names):
        fid, change = TABLE_1[name]
        assert difference(before, name) == settings(change), name
        config = get_recipe(name)
        assert config.paper.metric == f"fid50k_dopri5_random {fid}"
        assert config.run.total_images == 102_400_000  # 400,000 x 256 and 100,000 x 1024


def test_table_1_ends_at_the_headline_and_its_switches() -> None:
    headline = difference("table1-09-vavae", "lightningdit-xl-64ep")
    assert {name.split(".")[0] for name in headline} == {"run", "sample"}
    assert headline["run.total_images"] == 80_000 * 1024
    assert difference(HEADLINE, "lightningdit-xl-beyond") == settings(BEYOND)
    assert difference(HEADLINE, "lightningdit-xl-800ep") == {
        "run.total_images": 1_000_000 * 1024,
        "flow.uniform_after_images": 600_000 * 1024,
        "sample.cfg_scale": 6.7,
        "sample.cfg_interval": (0.125, 1.0),
    }


@pytest.mark.parametrize("line", [*TABLE_2.split("\n")[1:-1], *TABLE_4_AND_5.split("\n")[1:-1]])
def test_row_of_tables_2_4_and_5_has_a_tokenizer_and_its_generators(line: str) -> None:
    name, *numbers = line.split()
    scores, fids = numbers[:4], numbers[4:]
    spec, _, loss = name.partition("-")
    recipe = f"{'vavae' if loss else 'vae'}-{name}-50ep"

    change = ALIGNMENT[loss] | (
        {} if spec == "f16d32" else {"autoencoder.latent_channels": int(spec.removeprefix("f16d"))}
    )
    assert difference(VAVAE, recipe) == change
    config = get_recipe(recipe)
    assert (config.run.total_images, config.run.batch_size, config.stages) == (50 * 1_281_167, 256, ())
    assert re.findall(r"(?<!\w)\d+\.\d+", config.paper.metric) == scores

    for size, fid in zip(("b", "l", "xl"), fids, strict=False):
        generator = get_recipe(f"lightningdit-{size}-{name}")
        assert generator.paper.metric == f"fid10k_dopri5_random {fid}"
        assert generator.paper.tokenizer == recipe
        assert f"LightningDiT-{size.upper()}" in generator.paper.source
        images = 204_800_000 if size == "b" else 102_400_000  # 160 and 80 epochs
        change = {"model.in_channels": config.autoencoder.latent_channels, "run.total_images": images}
        change |= {f"model.{key}": value for key, value in DIT_SIZES[size.upper()].items()}
        same = flat(get_recipe("table1-09-vavae"))
        change = {key: value for key, value in change.items() if same[key] != value}
        assert difference("table1-09-vavae", f"lightningdit-{size}-{name}") == change


PEERS = {
    "dit-xl2": (DIT, "run total_images=1792000000\nsample cfg_scale=1.5 cfg_channels=3"),
    "sit-xl2": ("dit-xl2", "model learn_sigma=False\nflow objective='flow'\nsample method='euler_maruyama'"),
    "fasterdit-xl2": ("sit-xl2", "flow time_law='logit_normal' direction_loss=True\nrun total_images=512000000"),
    "repa-xl2": (
        "sit-xl2",
        """
repa weight=0.5
repa.foundation name='vit_base_patch14_dinov2.lvd142m'
engine max_grad_norm=1.0
data flip=False
run total_images=1024000000
sample cfg_scale=1.8 cfg_interval=(0.3,1.0) cfg_channels=None
""",
    ),
    "maskdit-xl2": (
        "sit-xl2",
        """
mask kind='maskdit'
run batch_size=1024 total_images=2048000000
sample method='heun' num_steps=41 cfg_channels=None
""",
    ),
    "maskdit-xl2-unmasked": (
        "maskdit-xl2",
        """
mask unmasked_after_images=0
optimizer lr=5e-5
run init_from='runs/maskdit-xl2' batch_size=512 total_images=25600000
""",
    ),
    "mdt-xl2": (
        "dit-xl2",
        """
mask kind='mdt' ratio=0.3 decoder_depth=2
optimizer lr=3e-4
run total_images=1664000000
sample cfg_scale=3.8 cfg_power=4.0
""",
    ),
}
"""The latent diffusion systems of Table 3: what each changes in another recipe."""


@pytest.mark.parametrize("name", PEERS)
def test_peers_of_table_3_differ_as_they_should(name: str) -> None:
    base, change = PEERS[name]
    assert difference(base, name) == settings(change)
    config = get_recipe(name)
    assert (config.model.patch_size, config.data.normalize, config.data.multiplier) == (2, False, 0.18215)
    assert "Table 3" in config.paper.source and "SD-VAE" in config.paper.tokenizer
    epochs = re.search(r"(\d+) epochs", config.paper.source)
    assert epochs is None or abs(config.run.total_images / 1_281_167 / int(epochs[1]) - 1) < 0.002


BEYOND = """
model qk_norm=True value_residual=True
flow contrastive_weight=0.05 time_shift=1.4142135623730951
repa weight=0.5
repa.foundation name='vit_base_patch14_dinov2.lvd142m'
optimizer schedule='linear' warmup_images=1024000
engine max_grad_norm=1.0 ema_decays=(0.9999,0.9998,0.9995) ema_warmup=True
"""


def test_metrics_are_named_after_the_recipes_own_sampler() -> None:
    from vadit.sampling.draw import sampler_name

    unnamed = set()
    for name in PAPER_RECIPES:
        config = get_recipe(name)
        if not isinstance(config, DiTConfig):
            continue
        own = {sampler_name(config.sample), sampler_name(dataclasses.replace(config.sample, cfg_scale=1.0))}
        found = set(re.findall(r"fid\d+k_(\S+)", config.paper.metric))
        assert found <= own, name
        if not found:
            unnamed.add(name)
    # EDM's sampler, FasterDiT's unknown one, and no number at all
    assert unnamed == {"maskdit-xl2", "maskdit-xl2-unmasked", "fasterdit-xl2", "lightningdit-xl-beyond"}


def test_short_names_and_words_find_recipes(capsys) -> None:
    for short, name in SHORT_NAMES.items():
        assert flat(get_recipe(short)) == flat(get_recipe(name))
        assert flat(get_recipe(f"{short}-debug")) == flat(get_recipe(f"{name}-debug"))
    assert cli.main(["recipes", "Table", "5,", "mcos"]) == 0
    text = capsys.readouterr().out
    names = re.findall(r"^│ ([a-z0-9-]+) ", text, re.MULTILINE)
    assert names == ["name", "vavae-f16d32-dinov2-no-mcos-50ep", "lightningdit-b-f16d32-dinov2-no-mcos"]
    assert cli.main(["recipes", "nonesuch"]) == 2
    assert "'nonesuch'" in capsys.readouterr().err


# --- the list


@pytest.mark.parametrize("name", PAPER_RECIPES)
def test_debug_twin_keeps_every_switch(name: str) -> None:
    original, twin = dataclasses.asdict(get_recipe(name)), dataclasses.asdict(get_recipe(f"{name}-debug"))
    assert twin["run"]["total_images"] <= 6 * twin["run"]["batch_size"]
    assert twin["run"]["device"] == "cpu"
    for group, values in original.items():
        if group in ("run", "paper", "stages", "kind"):
            continue
        changed = {key for key, value in values.items() if twin[group][key] != value}
        assert changed <= SIZES.get(group, set()), group
    for stage, small in zip(original.get("stages", ()), twin.get("stages", ()), strict=True):
        assert {key for key in stage if stage[key] != small[key]} <= {"total_images", "disc_start_step"}


def _different_twins() -> list[str]:
    """One recipe of each group whose twins are the same run: B, L and XL have one twin, for example."""
    first: dict[str, str] = {}
    for name in PAPER_RECIPES:
        first.setdefault(json.dumps(flat(get_recipe(f"{name}-debug")), sort_keys=True), name)
    return list(first.values())


TERMS = {
    "repa-xl2": {"alignment"},
    "lightningdit-xl-beyond": {"alignment", "contrastive"},
    "maskdit-xl2": {"reconstruction"},
    "mdt-xl2": {"masked_mse"},
}
"""Terms of the loss that show a recipe's switch at work."""


@pytest.mark.parametrize("name", _different_twins())
def test_debug_twin_trains_and_logs(name: str, tmp_path: Path) -> None:
    assert cli.main(["train", f"{name}-debug", "--run.out", str(tmp_path)]) == 0
    config = load_run_config(tmp_path)
    stages = len(config.stages) if isinstance(config, TokenizerConfig) else 0
    logs = sorted(tmp_path.rglob("log.jsonl"))
    assert len(logs) == max(stages, 1)
    for log in logs:
        lines: list[dict[str, Any]] = [json.loads(line) for line in log.read_text().splitlines()]
        assert lines[-1]["step"] == 2 and lines[-1]["images"] == 2 * config.run.batch_size
        assert all(line["loss"] == line["loss"] for line in lines)
        assert {term for terms in TERMS.values() for term in terms} & lines[-1].keys() == TERMS.get(name, set())
    assert list(tmp_path.rglob("checkpoints/*"))
