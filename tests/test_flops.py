"""FLOPs of training steps, and the peaks of GPUs that they are set against."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vadit.config import DiTConfig, vary
from vadit.estimate import flops
from vadit.recipes import get_recipe

CPU = torch.device("cpu")


def test_peaks_by_name() -> None:
    known = {"NVIDIA A100-SXM4-80GB": 312, "NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA L4": 121}
    assert {name: flops.named_peak(name) for name in known} == {name: 1e12 * value for name, value in known.items()}
    assert sum(flops.PEAK_TFLOPS.values()) == pytest.approx(21043.5)  # no number changes unnoticed
    unknown = ("NVIDIA H20X", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A100-SXM4-40GB MIG 1g.5gb")
    assert [flops.named_peak(name) for name in unknown] == [None] * len(unknown)
    config = get_recipe("lightningdit-b-debug")
    assert flops.peak_flops(config, CPU) is None
    assert flops.peak_flops(vary(config, run={"peak_tflops": 2.0}), CPU) == 2e12


def shallow(name: str, **mask: Any) -> DiTConfig:
    """A recipe's generator with four blocks; a mask's decoder has two."""
    config = get_recipe(name)
    mask = {"decoder_depth": 2, **mask} if config.mask.kind != "none" else {}
    return vary(config, model={"depth": 4}, mask=mask)


def test_flops_are_those_of_the_products() -> None:
    """By hand: 256 tokens, width D; blocks of qkv, two products of attention, proj, an MLP and the modulation."""
    config = shallow("lightningdit-xl-64ep")
    N, D, F = 256, 1152, 3072
    block = N * (4 * D * D + 2 * N * D + 3 * D * F) + 6 * D * D
    ends = N * (32 * D + 32 * D) + 2 * D * D + 256 * D + D * D  # patches in and out, last modulation, time
    assert flops.dit_flops(config.model) == 2 * (4 * block + ends)
    assert flops.training_flops(config) == 3 * flops.dit_flops(config.model)


@pytest.mark.parametrize(
    ("recipe", "masked", "expected"),
    [  # by the formulas that stood here before torch's counter
        ("maskdit-xl2", True, 20_352_499_712),
        ("maskdit-xl2", False, 37_716_918_272),
        ("mdt-xl2", True, 37_181_408_256),
        ("mdt-xl2", False, 33_923_432_448),
    ],
)
def test_flops_of_masked_passes(recipe: str, masked: bool, expected: int) -> None:
    config = shallow(recipe)
    assert flops.dit_flops(config.model, config.mask, masked=masked) == expected


def test_flops_of_a_tokenizer() -> None:
    config = get_recipe("vavae-f16d32-dinov2")

    def counted(**loss: float) -> float:
        off = {"disc_weight": 0.0, "perceptual_weight": 0.0, "vf_weight": 0.0}
        small = {"image_size": 64, "base_channels": 32}
        return flops.training_flops(vary(config, autoencoder=small, loss=off | loss))

    alone = counted()
    assert alone == 3 * 1_649_311_744  # as above
    # PatchGAN: 4x4 convolutions to 32, 16, 8, 7 and 6 places a side; forward and backward in both networks' steps.
    places = [(3 * 64, 32), (64 * 128, 16), (128 * 256, 8), (256 * 512, 7), (512, 6)]
    assert counted(disc_weight=1.0) - alone == 8 * 2 * sum(16 * weights * side**2 for weights, side in places)
    assert counted(perceptual_weight=1.0) - alone == pytest.approx(3 * 2 * 15.35e9 * (64 / 224) ** 2, rel=0.01)
    assert counted(vf_weight=1.0) - alone == pytest.approx(2 * 304e6 * 16, rel=0.01)  # DINOv2-L, forward


def test_flops_of_a_step_count_every_pass_and_what_is_aligned() -> None:
    maskdit, tuned, mdt = (shallow(name) for name in ("maskdit-xl2", "maskdit-xl2-unmasked", "mdt-xl2"))
    assert flops.training_flops(maskdit) == 3 * flops.dit_flops(maskdit.model, maskdit.mask, masked=True)
    assert flops.training_flops(tuned) == 3 * flops.dit_flops(tuned.model, tuned.mask)
    passes = [flops.dit_flops(mdt.model, mdt.mask, masked=masked) for masked in (False, True)]
    assert flops.training_flops(mdt) == 3 * sum(passes)
    changing = shallow("maskdit-xl2", unmasked_after_images=1024)
    assert flops.training_flops(changing) == flops.training_flops(maskdit)
    assert flops.tracked_flops(changing) is None and flops.tracked_flops(maskdit) is not None
    assert flops.tracked_flops(tuned) == flops.training_flops(tuned)

    repa = get_recipe("repa-xl2")
    assert isinstance(repa, DiTConfig) and repa.repa.features == "cached"
    projector = 256 * (1152 * 2048 + 2048 * 2048 + 2048 * 768)
    assert flops.training_flops(repa) == 3 * (flops.dit_flops(repa.model) + 2 * projector)
    online = vary(repa, repa={"features": "online"}, data={"images": "x"})
    assert flops.training_flops(online) - flops.training_flops(repa) == pytest.approx(2 * 86.6e6 * 256, rel=0.01)
