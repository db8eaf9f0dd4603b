"""FLOPs of training steps, and the memory that --dry-run tells, against what processes really allocate: within 10%.

Each case trains a small network in processes of its own. Torch's profiler tells of every allocation and release of the
CPU allocator: the peak of their sum is what torch.cuda.max_memory_allocated tells on a GPU.
"""

import json
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from vadit.config import (
    AutoencoderSpec,
    Config,
    DiTConfig,
    DiTSpec,
    FoundationSpec,
    MaskSpec,
    RepaSpec,
    SampleSpec,
    TokenizerConfig,
    vary,
)
from vadit.estimate import flops, memory
from vadit.estimate.networks import Network
from vadit.models.autoencoder import Autoencoder
from vadit.models.dit import LightningDiT
from vadit.recipes import get_recipe
from vadit.runtime import launcher
from vadit.sampling.draw import DECODE_BATCH, GROUP, decode, draw

CPU = torch.device("cpu")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
def test_a_block_that_is_freed_is_there_again_without_new_pages() -> None:
    code = """
import resource, torch
from vadit.runtime import distributed

def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(16 << 20)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

mapped = [new_pages() for _ in range(4)]
distributed.device("cpu")
kept = [new_pages() for _ in range(32)]  # small blocks may split the first few that come back
assert min(mapped) >= 32 > 4 * max(kept[-8:]), (mapped, kept)  # 32 pages of 2 MB, or 16384 of 4 KB
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


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

    small = vary(config, autoencoder={"image_size": 64, "base_channels": 32})

    def counted(**loss: float) -> float:
        off = {"disc_weight": 0.0, "perceptual_weight": 0.0, "vf_weight": 0.0, "vf_adaptive": False}
        return flops.training_flops(vary(small, loss=off | loss))

    alone = counted()
    assert alone == 3 * 1_649_311_744  # as above
    # PatchGAN: 4x4 convolutions to 32, 16, 8, 7 and 6 places a side; forward and backward in both networks' steps.
    places = [(3 * 64, 32), (64 * 128, 16), (128 * 256, 8), (256 * 512, 7), (512, 6)]
    assert counted(disc_weight=1.0) - alone == 8 * 2 * sum(16 * weights * side**2 for weights, side in places)
    assert counted(perceptual_weight=1.0) - alone == pytest.approx(3 * 2 * 15.35e9 * (64 / 224) ** 2, rel=0.01)
    aligned = counted(vf_weight=1.0)
    assert aligned - alone == pytest.approx(2 * 304e6 * 16, rel=0.01)  # DINOv2-L, forward
    with torch.device("meta"):  # its adaptive weight: from the reconstruction back to the latent
        latent = torch.zeros(1, 32, 4, 4, requires_grad=True)
        images = Autoencoder(small.autoencoder).decode(latent)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(images.sum(), latent)
    assert counted(vf_weight=1.0, vf_adaptive=True) - aligned == pytest.approx(counter.get_total_flops(), rel=0.05)


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


TOLERANCE = 0.1
TOKENIZER = "vavae-f16d32-dinov2"


@dataclass(frozen=True)
class Case:
    zero_stage: Literal[0, 1, 2, 3]
    batch: int  # Images per process and micro-batch.
    processes: int = 1
    precision: Literal["fp32", "bf16", "autocast"] = "fp32"
    gradient_checkpointing: bool = False
    gradient_accumulation: int = 1
    recipe: str = "lightningdit-b"
    perceptual: bool = True  # Of a tokenizer: LPIPS, on a VGG16 of random weights.
    aligned: bool = False  # Of a generator: REPA, with features of images.

    def config(self, folder: Path) -> Config:
        """The recipe's, small; files that it needs are made in `folder`."""
        config = get_recipe(self.recipe)
        names = ("zero_stage", "precision", "gradient_checkpointing", "gradient_accumulation")
        engine = {name: getattr(self, name) for name in names}
        images = self.batch * self.processes * self.gradient_accumulation
        run = {"device": "cpu", "batch_size": images, "out": str(folder / "run"), "total_images": 2 * images}
        config = vary(config, engine=engine, run=run, data={"path": f"debug:{images}"})
        small = _small_tokenizer if isinstance(config, TokenizerConfig) else _small_generator
        return small(self, config, folder)  # type: ignore[arg-type]


def _small_generator(case: Case, config: DiTConfig, folder: Path) -> DiTConfig:
    spec = DiTSpec(input_size=16, in_channels=32, patch_size=1, hidden_size=384, depth=3, num_heads=6)
    repa = RepaSpec(weight=0.5, block=2, features="online", foundation=TINY_VIT) if case.aligned else config.repa
    return vary(config, model=spec, repa=repa, data={"images": config.data.path if case.aligned else ""})


def _small_tokenizer(case: Case, config: TokenizerConfig, folder: Path) -> TokenizerConfig:
    vgg = folder / "vgg16.pth"
    if case.perceptual and not vgg.is_file():
        from vadit.models.lpips import vgg_features

        torch.save({f"features.{name}": value for name, value in vgg_features().state_dict().items()}, vgg)
    loss = {"vgg_weights": str(vgg)} if case.perceptual else {"perceptual_weight": 0.0}
    autoencoder = {"image_size": 64, "base_channels": 64, "attention_resolutions": (4,)}
    loss = {"disc_start_step": 1, **loss}
    return vary(config, autoencoder=autoencoder, loss=loss, foundation=TINY_VIT, stages=())


TINY_VIT = FoundationSpec(name="vit_tiny_patch16_224", weights="random", input_range="minus_one_one")


SHORT = [Case(0, batch=4), Case(3, batch=2, processes=2)]
LONG = [
    Case(2, batch=1, gradient_checkpointing=True),
    Case(1, batch=4),
    Case(1, batch=2, processes=2),
    Case(1, batch=1, gradient_accumulation=2),
    Case(1, batch=1, processes=2, gradient_accumulation=2),
    Case(1, batch=2, processes=2, precision="autocast"),
    Case(2, batch=2, processes=2),
    Case(3, batch=4),
    Case(0, batch=1, precision="autocast", gradient_checkpointing=True),
    Case(0, batch=1, precision="bf16", gradient_accumulation=2),
    Case(1, batch=1, precision="bf16"),
    Case(2, batch=2, precision="autocast"),
    Case(3, batch=1, precision="bf16", processes=2),
    Case(3, batch=1, precision="autocast", gradient_checkpointing=True),
    Case(1, batch=2, aligned=True),
    Case(0, batch=4, recipe=TOKENIZER),
    Case(1, batch=2, recipe=TOKENIZER),
    Case(2, batch=2, recipe=TOKENIZER, precision="autocast"),
    Case(2, batch=2, recipe=TOKENIZER, processes=2),
    Case(3, batch=2, recipe=TOKENIZER, processes=2),
    Case(1, batch=8, recipe=TOKENIZER, perceptual=False),
    Case(1, batch=2, recipe=TOKENIZER, precision="bf16"),
    Case(1, batch=4, recipe=TOKENIZER, perceptual=False, gradient_checkpointing=True),
]


@pytest.mark.parametrize(
    "case", [*SHORT, *(pytest.param(case, marks=pytest.mark.faults, id=str(case)) for case in LONG)], ids=str
)
def test_estimate_is_what_processes_hold(case: Case, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(launcher, "_place", launcher.Place(world_size=case.processes))
    stage = memory.estimate(case.config(tmp_path), case.processes).stages[case.zero_stage]
    # Gloo lets go of what it has sent when a thread of its own gets to run: on a busy machine that adds to the peak.
    held = [measured(case, tmp_path)]
    while stage.total < (1 - TOLERANCE) * min(held) and len(held) < 8 * (case.processes - 1):
        held.append(measured(case, tmp_path))
    assert stage.total == pytest.approx(min(held), rel=TOLERANCE), (stage.moment, stage.total, held)


@pytest.mark.parametrize(
    ("engine", "gpus", "expected"),
    [
        # Weights without activations, in units of a weight: (fp32 weights, optimizer, averages, gradients, buffers).
        # A process alone sends no gradients: at stage 0 it needs no bucket.
        ({}, 64, [(4, 8, 4, 4, 4), (4, 12 / 64, 4 / 64, 4 / 64, 8), (4, 12 / 64, 4 / 64, 4 / 64, 8), None]),
        ({}, 1, [(4, 8, 4, 4, 0), (4, 12, 4, 4, 4), (4, 12, 4, 4, 4), (4, 12, 4, 4, 8)]),
        ({"precision": "bf16"}, 64, [None, (2, 12 / 64, 4 / 64, 2 / 64, 4), (2, 12 / 64, 4 / 64, 2 / 64, 4), None]),
        ({"precision": "bf16"}, 1, [None, (2, 12, 4, 2, 6), None, (2, 12, 4, 2, 8)]),
        ({"precision": "autocast"}, 2, [None, (4, 6, 2, 2, 12), (4, 6, 2, 2, 12), None]),
        ({"overlap_comm": True}, 2, [(4, 8, 4, 4, 4), (4, 6, 2, 2, 12), (4, 6, 2, 2, 12), None]),
        ({"offload_optimizer": True, "ema_decays": (0.9, 0.99)}, 2, [(4, 8, 8, 4, 4), (4, 0, 0, 2, 8), None, None]),
        (
            {"zero_stage": 3, "offload_optimizer": True, "offload_weights": True},
            2,
            [None, None, None, (0, 0, 0, 2, 12)],
        ),
        # ZeRO 3 gathers all weights of a small network, and those to come once more.
        ({"gradient_accumulation": 2}, 64, [(4, 8, 4, 4, 4), None, None, (4 / 64, 12 / 64, 4 / 64, 4 / 64, 12)]),
        ({"precision": "autocast"}, 64, [None, None, None, (4 / 64, 12 / 64, 4 / 64, 4 / 64, 14)]),
    ],
)
def test_shares_of_the_stages(engine: Any, gpus: int, expected: list[Any]) -> None:
    config = get_recipe("lightningdit-b")
    config = vary(config, engine={"ema_decays": (0.9,), "precision": "fp32", **engine})
    network = Network("one", torch.nn.Linear(10, 10, bias=False, device="meta"), averaged=True)
    rows = memory.stages(config, [network], memory.Activations(0, 0), gpus)
    assert [row.stage for row in rows] == [0, 1, 2, 3]
    for row, wanted in zip(rows, expected, strict=True):
        if wanted is not None:
            found = (row.weights, row.optimizer, row.averages, row.gradients, row.buffers)
            assert [value / 100 for value in found] == pytest.approx(list(wanted)), row.stage
            assert row.total == pytest.approx(100 * sum(wanted))


def test_activations_come_and_go_beside_gradients() -> None:
    config = get_recipe("lightningdit-b")
    network = Network("one", torch.nn.Linear(10, 10, bias=False, device="meta"), averaged=True)
    frozen = Network("two", torch.nn.Linear(10, 5, bias=False, device="meta").requires_grad_(False))
    held = memory.Activations(1e6, 1e6 + 300)

    def rows(accumulation: int) -> list[tuple[float, ...]]:
        plain = vary(config, engine={"precision": "fp32", "gradient_accumulation": accumulation})
        found = memory.stages(plain, [network, frozen], held, 2)
        assert {row.moment for row in found} == {"backward"} and {row.activations for row in found} == {1e6}
        return [(row.weights, row.gradients, row.buffers) for row in found]

    # Weights of which 50 are frozen; buckets of 400 bytes, and what ZeRO 3 gathers twice.
    assert rows(1) == [(600, 300, 0), (600, 300, 400), (600, 0, 400), (400, 200, 1200)]
    assert rows(2) == [(600, 400, 0), (600, 400, 400), (600, 200, 400), (400, 200, 1200)]
    config = vary(config, evaluation={"every_images": 8, "tokenizer": "vae"})
    large = Network("large", torch.nn.Linear(1 << 16, 1 << 16, bias=False, device="meta"), averaged=True)
    row = memory.stages(config, [large], memory.Activations(0, 0), 64)[2]  # buckets are cut at 500 million weights
    assert (row.moment, row.gradients, row.buffers) == ("evaluation", 0, 4 << 32)


def test_what_is_held_is_counted_where_it_is_fullest(monkeypatch) -> None:
    """Two layers of 100 weights on 8 rows: they keep their inputs, and tanh its output, which is one of them."""
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)  # a ZeRO 3 run leaves DeepSpeed's there
    with FakeTensorMode():
        layers = [torch.nn.Linear(10, 10, bias=False), torch.nn.Tanh(), torch.nn.Linear(10, 10, bias=False)]
        model = torch.nn.Sequential(*layers)
        network = Network("two", model, lambda rows: model(torch.zeros(rows, 10)).sum())
        held, half = memory._Held(network, 8, "fp32"), memory._Held(network, 8, "autocast")
    row, weight = 8 * 10 * 4, 100 * 4
    assert held.kept == 2 * row + 4
    # In the backward pass of the last layer: the gradient of its output, then that of its weight, then of its input.
    assert held.most == held.kept + 4 + row + weight and held.most_with_gradients == held.most + row
    assert half.kept == 2 * row / 2 + 2 * weight / 2 + 2  # autocast keeps its copies of the weights
    memory._halve(model)  # without biases
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(("precision", "channels"), [("fp32", 16), ("bf16", 32)])
def test_estimate_of_sampling_is_what_a_cpu_allocates(precision: str, channels: int) -> None:
    spec = DiTSpec(input_size=8, in_channels=4, hidden_size=96, depth=2, num_heads=3, num_classes=10)
    tokenizer = AutoencoderSpec(
        image_size=64, latent_channels=4, base_channels=channels, channel_multipliers=(1, 2, 2, 2), num_res_blocks=1,
        attention_resolutions=(), norm_groups=4,
    )  # fmt: skip
    generator, decoder = LightningDiT(spec).eval(), Autoencoder(tokenizer).eval()
    sampler = SampleSpec(num_steps=3, cfg_scale=2.0)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        (part,) = draw(generator, sampler, num_samples=GROUP, precision=precision)
        decode(decoder, part.latents)
    there = sum(4 * weight.numel() for network in (generator, decoder) for weight in network.parameters())
    found = memory.sampling_bytes([(spec, MaskSpec())], 2 * GROUP, tokenizer, DECODE_BATCH, precision)
    assert found - there == pytest.approx(most_held(profiler), rel=0.1)


def measured(case: Case, folder: Path) -> int:
    """Bytes at the peak, in the first of the case's processes."""
    from launched import run_ranks  # not where this file is a process of its own

    case.config(folder)  # makes its files
    codes, said = run_ranks([sys.executable, __file__, json.dumps(vars(case)), str(folder)], case.processes)
    assert codes == [0] * case.processes, said
    return int((folder / "peak-0").read_text())


def train(config: Config) -> int:
    """Train two steps (Adam's moments come in the first) with the trainer's own parts; bytes allocated at the peak."""
    from vadit.train import dit, loop, tokenizer
    from vadit.train import engine as engines
    from vadit.train.checkpoint.checkpoints import Position

    torch.set_num_threads(1)
    engines.start(torch.device("cpu"))

    def two_steps(task: loop.Task, **_: Any) -> None:
        stream = task.loader.stream()
        for step in range(2):
            for engine in task.engines.values():
                engine.begin_step(1e-4)
            task.step(stream, Position(step=step))
        stream.close()

    with mock.patch.object(loop, "run", two_steps):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            if isinstance(config, TokenizerConfig):
                tokenizer.train(config)
            else:
                dit.train(config)
    engines.finish()
    return most_held(profiler)


def most_held(profiler: profile) -> int:
    """Bytes allocated at the peak."""
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    out = Path(sys.argv[2])
    peak = train(Case(**json.loads(sys.argv[1])).config(out))
    (out / f"peak-{launcher.place().rank}").write_text(str(peak))
