"""Two processes under DeepSpeed's launcher, on the CPU, against one plain process that plays both."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_worker import assert_same_end
from launched import launch_two, run_ranks
from PIL import Image
from training_plain import logged, plain_dit, plain_tokenizer, tiny_dit, tiny_tokenizer
from training_worker import LOOK

from vadit.images.pixels import channels_last, image_grid
from vadit.sampling.draw import decode, draw
from vadit.train.checkpoint.export import load_autoencoder, load_generator
from vadit.train.evaluation import quick_sampler
from vadit.train.runs import read_weights
from vadit.train.watchdog import HANG_CODE

WORKER = Path(__file__).parent / "training_worker.py"
STAGES = (1, 2, 3)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folders dit-K and tokenizer-K of two processes at ZeRO K, and two resumed ones, from one launch."""
    out = tmp_path_factory.mktemp("ranks")
    done = launch_two(WORKER, "ranks", str(out))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return out


@pytest.mark.parametrize("zero_stage", STAGES)
def test_generator_on_two_processes_is_one_of_the_same_batch(zero_stage: int, runs: Path) -> None:
    expected, weights = plain_dit(tiny_dit(runs), world_size=2)
    assert logged(runs / f"dit-{zero_stage}") == pytest.approx(expected, rel=1e-5)
    state, path = read_weights(runs / f"dit-{zero_stage}")
    assert len(list(path.glob("model-*-of-00002.safetensors"))) == 2
    assert state.keys() == weights.keys()
    for name, value in weights.items():
        assert (state[name] - value).norm() <= 1e-3 * value.norm() + 1e-3, name


@pytest.mark.parametrize("zero_stage", STAGES)
def test_tokenizer_on_two_processes_is_one_of_the_same_batch(zero_stage: int, runs: Path) -> None:
    expected, expected_disc = plain_tokenizer(tiny_tokenizer(runs, steps=2), world_size=2)
    folder = runs / f"tokenizer-{zero_stage}"
    assert logged(folder) == pytest.approx(expected, rel=1e-4)
    assert logged(folder, "step") == [1, 2]  # one log, by the main process
    last = (folder / "log.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["disc"] == pytest.approx(expected_disc[0], rel=1e-4)


@pytest.mark.parametrize("zero_stage", STAGES)
def test_many_buckets_are_as_one(zero_stage: int, runs: Path) -> None:
    found, expected = (logged(runs / f"dit-{zero_stage}{name}") for name in ("-buckets", ""))
    assert found == pytest.approx(expected, rel=1e-6)
    sizes = [json.loads((runs / f"dit-{zero_stage}{name}" / "deepspeed.json").read_text()) for name in ("-buckets", "")]
    few, many = (size["model"]["zero_optimization"]["reduce_bucket_size"] for size in sizes)
    assert few == 5_000 and many > 10 * few


# ------------------------------------------------------------------------------------------------ going on


@pytest.mark.parametrize("network", ["dit", "tokenizer"])
def test_two_processes_go_on_to_the_bit(network: str, runs: Path) -> None:
    assert_same_end(runs / f"{network}-resumed" / "killed", runs / f"{network}-resumed" / "straight")


def test_a_process_that_dies_between_two_stages_is_named(tmp_path: Path) -> None:
    codes, said = run_ranks([sys.executable, str(WORKER), "dies_between_stages", str(tmp_path)])
    assert codes[0] in (1, HANG_CODE) and codes[1] == -9, said[0]
    assert "rank 1 is gone" in said[0]


@pytest.mark.parametrize("zero_stage", STAGES)
def test_the_look_of_two_processes_is_what_the_checkpoint_draws(zero_stage: int, runs: Path) -> None:
    run = runs / f"dit-{zero_stage}"
    (line,) = (json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines())
    config = tiny_dit(run)
    network, autoencoder = load_generator(run, 0.9), load_autoencoder(runs / f"tokenizer-{zero_stage}")
    sampler = quick_sampler(config.sample, LOOK)
    with torch.no_grad():
        parts = draw(network, sampler, num_samples=70, flow=config.flow)
        images = torch.cat([decode(autoencoder, part.latents) for part in parts])
    found = np.asarray(Image.open(run / line["grid"])).astype(int)
    expected = np.asarray(image_grid(channels_last(images).numpy())).astype(int)
    assert found.shape == expected.shape and np.abs(found - expected).max() <= 1  # attention of other kernels, perhaps
    assert np.mean(found == expected) > 0.999
    shares = [json.loads(line)["comm_share"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert all(0 < share < 1 for share in shares)
