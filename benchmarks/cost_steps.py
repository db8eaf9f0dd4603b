"""The steps that bench_cost.py counts: the trainers' and the sampler's own code, around networks on a virtual GPU."""

from __future__ import annotations

import collections
import dataclasses
import functools
import tempfile
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from bench_step import override
from torch._subclasses.fake_tensor import unset_fake_temporarily
from virtual_gpu import VirtualGPU, fake, install

from vadit.config import Config, DiTConfig, TokenizerConfig, settled, vary
from vadit.kernels import dispatch
from vadit.recipes import get_recipe
from vadit.runtime.precision import allow_tf32, computing
from vadit.train.checkpoint.checkpoints import Position

LOW = 2  # The smaller of the two depths that a generator is counted at: its first and last block are different ones.
SIDE = 512  # Side of the square weights that the optimizer's part is counted with.


@dataclass(frozen=True)
class Case:
    """One combination of settings."""

    recipe: str
    what: str  # train or sample.
    batch: int
    precision: str
    kernels: str
    compile: bool
    settings: tuple[str, ...] = ()


Counted = dict[str, Any]
"""One run on the virtual GPU, as JSON: launches, bytes kept and held at most, what the host waited for; see `count`."""


def configure(case: Case) -> Config:
    """The recipe's config with the case's settings."""
    config = get_recipe(case.recipe)
    for setting in case.settings:
        config = override(config, setting)
    precision = "fp32" if case.precision == "tf32" else case.precision
    config = vary(config, engine={"precision": precision, "compile": case.compile}, run={"batch_size": case.batch})
    return settled(config, processes=1, device="cuda")


class StandIn:
    """What the trainers' steps call an engine, around a network on the virtual GPU; with no optimizer behind it."""

    device = torch.device("cuda")

    def __init__(self, gpu: VirtualGPU, module: Any, config: Config, name: str, forward: Any = None) -> None:
        self.gpu, self.module, self.name, self.forward = gpu, module, name, forward or module
        self.spec, self.precision = config.engine, config.engine.precision
        on_device(module, self.compute_dtype())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.gpu.phase = f"{self.name}forward"
        with self.autocast():
            return self.forward(*args, **kwargs)

    def autocast(self) -> Any:
        return torch.autocast("cuda", torch.bfloat16, enabled=self.precision == "autocast")

    def compute_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def backward(self, loss: Any, *, checked: Any = None) -> None:
        """As `Engine.backward`, which makes a loss that is not finite a NaN."""
        self.gpu.phase, self.kept = f"{self.name}backward", self.gpu.held
        sound = torch.isfinite(loss.detach() if checked is None else checked)
        (loss * torch.where(sound, 1.0, float("nan"))).backward()
        for weight in self.module.parameters():
            weight.grad = None

    def step(self, engines: Any) -> bool:
        """As the guard's, which steps the optimizer."""
        return False


def on_device(module: Any, dtype: torch.dtype) -> Any:
    """Give a module of the meta device its parameters and buffers on the virtual GPU, in `dtype` where casts reach."""
    for part in module.modules():
        for kept in (part._parameters, part._buffers):
            for name, value in kept.items():
                if value is not None:
                    cast = value.is_floating_point() and type(part).__name__ != "RotaryTable"
                    new = torch.empty(value.shape, dtype=dtype if cast else value.dtype, device="cuda")
                    kept[name] = torch.nn.Parameter(new, value.requires_grad) if kept is part._parameters else new
    return module


def built(make: Callable[[], Any]) -> Any:
    """A network of the meta device: timm reads values while it builds, which fake tensors have not."""
    with unset_fake_temporarily(), torch.device("meta"):
        return make()


Step = tuple[Callable[[], object], list[Any]]  # A step, and the engines that it goes through.


def train_generator(gpu: VirtualGPU, config: DiTConfig) -> Step:
    """A step of vadit.train.dit without the optimizer."""
    from vadit.models.masked import training_network
    from vadit.runtime.compiled import compile_each
    from vadit.train import float8
    from vadit.train.dit import train_step

    model = built(lambda: training_network(config).train())
    engine: Any = StandIn(gpu, model, config, "", model.forward_features)
    if config.engine.compile:
        compile_each(model.compiled_blocks)
    spec, images = config.model, config.run.batch_size
    with mock.patch.object(float8, "_try_out", lambda *_: None):  # it compares numbers, and there are none
        rows = images * (spec.input_size // spec.patch_size) ** 2
        choice = float8.convert(model.blocks, config.engine.float8, rows=rows, device=engine.device)
    assert not choice.refused, choice.refused
    latents = torch.empty(images, spec.in_channels, spec.input_size, spec.input_size, device="cuda")
    batch = (latents, torch.empty(images, dtype=torch.long, device="cuda"))
    return lambda: train_step(engine, None, engine, config, iter([batch]), Position(0, 0)), [engine]


def train_tokenizer(gpu: VirtualGPU, config: TokenizerConfig) -> Step:
    """A step of vadit.train.tokenizer with its discriminator, without the optimizers. Frozen networks lack weights."""
    from vadit.models.aligned import AlignedAutoencoder
    from vadit.models.discriminator import PatchDiscriminator
    from vadit.models.foundation import FoundationModel
    from vadit.models.lpips import LPIPS
    from vadit.runtime.compiled import compile_each
    from vadit.train import tokenizer

    spec, loss = config.autoencoder, config.loss
    random = dataclasses.replace(config.foundation, weights="random")
    with mock.patch.multiple(LPIPS, _load_backbone=lambda *_: None, _load_heads=lambda *_: None):
        lpips = on_device(built(lambda: LPIPS(None)), torch.float32)
    foundation = on_device(built(lambda: FoundationModel(random, spec.latent_size)), torch.float32)
    model = built(lambda: AlignedAutoencoder(config, foundation.feature_dim).train())
    critic = PatchDiscriminator(spec.in_channels, loss.disc_channels, loss.disc_layers)
    critic = built(lambda: tokenizer._Discriminator(critic).train())
    phases = {"foundation": foundation, "LPIPS, its gradient": lpips, "discriminator, adaptive weights": critic.network}
    for phase, module in phases.items():
        module.register_forward_pre_hook(lambda *_, phase=phase: setattr(gpu, "phase", phase))
    engines = [StandIn(gpu, model, config, "autoencoder "), StandIn(gpu, critic, config, "discriminator ")]
    if config.engine.compile:
        compile_each(tokenizer.frozen_parts(foundation, lpips))
    networks: Any = tokenizer.Networks(engines[0], engines[1], foundation, lpips)
    images = torch.empty(
        config.run.batch_size, spec.in_channels, *[spec.image_size] * 2, dtype=torch.uint8, device="cuda"
    )
    images = types.SimpleNamespace(images=images)
    late = Position(loss.disc_start_step, 0)
    return lambda: tokenizer.train_step(networks, None, engines[0], config, iter([images]), late), engines


def sample_step(config: DiTConfig, guided: bool, precision: Any) -> Step:
    """A step of Euler's method on a batch of samples, as vadit.sampling draws them."""
    from vadit.models.masked import training_network
    from vadit.runtime.compiled import compile_each
    from vadit.sampling.solvers import sample_ode

    dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
    model = on_device(built(lambda: training_network(config).eval()), dtype)
    if config.engine.compile:
        compile_each(model.compiled_blocks)
    spec, images = config.model, config.run.batch_size
    noise = torch.empty(images, spec.in_channels, spec.input_size, spec.input_size, device="cuda")
    labels = torch.empty(images, dtype=torch.long, device="cuda")
    scale = {"num_steps": 2, "cfg_interval": (0.0, 1.0), "cfg_scale": config.sample.cfg_scale if guided else 1.0}
    sample = dataclasses.replace(config.sample, **scale)

    def step() -> None:
        with computing(precision, "cuda"):
            sample_ode(model, noise, labels, sample, flow=config.flow)

    return step, []


def decode_step(config: DiTConfig) -> Step:
    """Decoding a batch of latents by the f16d32 tokenizer, fp32, as `vadit sample` does."""
    from vadit.models.autoencoder import Autoencoder
    from vadit.sampling.draw import decode

    spec = get_recipe("vavae-f16d32-dinov2").autoencoder
    model = on_device(built(lambda: Autoencoder(spec).eval()), torch.float32)
    latents = torch.empty(
        config.run.batch_size, config.model.in_channels, *[config.model.input_size] * 2, device="cuda"
    )
    return lambda: decode(model, latents), []


def count(case: Case) -> list[Counted]:
    """Count a case on the virtual GPU, which takes this process over.

    A generator's step at both depths, a tokenizer's once; of sampling the step at both depths, without guidance and
    with it, and decoding.
    """
    install()
    torch.set_num_threads(1)
    config: Any = configure(case)
    allow_tf32(config.engine.tf32)
    if not case.compile:
        torch.compiler.set_stance("force_eager")
    if isinstance(config, TokenizerConfig):
        return [counted(case, 0, lambda gpu: train_tokenizer(gpu, config))]
    depths = [(depth, vary(config, model={"depth": depth})) for depth in (LOW, LOW + 1)]
    if case.what == "train":
        return [counted(case, depth, lambda gpu, one=one: train_generator(gpu, one)) for depth, one in depths]
    steps = [
        (depth, lambda _, one=one, guided=guided: sample_step(one, guided, case.precision))
        for guided in (False, True)
        for depth, one in depths
    ]
    return [counted(case, *step) for step in (*steps, (0, lambda _: decode_step(config)))]


def counted(case: Case, depth: int, make: Callable[[VirtualGPU], Step]) -> Counted:
    """Run one step; compiled ones for the second time."""
    utils = torch._dynamo.utils
    torch._dynamo.reset()
    utils.counters.clear()
    gpu = VirtualGPU()
    with dispatch.setting(case.kernels), fake():
        step, engines = make(gpu)
        for _ in range(1 + case.compile):
            gpu.launches, gpu.host_waits = [], []
            utils.clear_compilation_metrics()
            with gpu.recording("forward"):
                step()
    trained = [weight for engine in engines for weight in engine.module.parameters() if weight.requires_grad]
    return {
        "depth": depth,
        "launches": gpu.launches,
        "kept": engines[0].kept if engines else 0,
        "weights": sum(weight.numel() for weight in trained),
        "tensors": len(trained),
        "host_waits": gpu.host_waits,
        "graph_breaks": sum(utils.counters["graph_break"].values()),
        "recompilations": len(utils.get_compilation_metrics()),  # whatever is compiled later than in the first step
    }


def _sum_of_weights(module: Any) -> Any:
    """A loss whose gradients cost nothing else."""
    return sum((weight * torch.ones_like(weight)).sum() for weight in module.parameters()).float()


def count_optimizer(case: Case) -> list[Counted]:
    """Count what the engine does in a step besides the network's own passes, on the CPU, at two numbers of weights."""
    from vadit.train.ema import ShardedEMA
    from vadit.train.engine import Engine
    from vadit.train.guard import Guard

    config, found = configure(case), []
    for tensors in (4, 8):
        module = torch.nn.Sequential(*(torch.nn.Linear(SIDE, SIDE, bias=False) for _ in range(tensors)))
        module.forward = functools.partial(_sum_of_weights, module)
        device = torch.device("cpu")
        engine = Engine(module, optimizer=config.optimizer, spec=config.engine, global_batch=1, device=device)
        from deepspeed.accelerator import get_accelerator

        with tempfile.TemporaryDirectory() as folder:
            guard, ema = Guard(config.guard, Path(folder)), ShardedEMA(engine, config.engine.ema_decays)
            for step in range(3):  # the first ones make what the others find
                plain, gpu = (VirtualGPU("cpu", module.parameters()) for _ in range(2))
                engine.begin_step(1e-4)
                get_accelerator().synchronize = lambda *_: gpu.wait("synchronize")  # noqa: B023
                with plain.recording("optimizer"):
                    torch.autograd.grad(module.forward(), list(module.parameters()))
                if hasattr(ema, "begin_step"):
                    ema.begin_step(step)
                with gpu.recording("optimizer"):
                    engine.backward(engine())
                    if guard.step({"model": engine}):
                        ema.update(step)
        launches = collections.Counter(gpu.launches) - collections.Counter(plain.launches)
        found.append({"tensors": tensors, "weights": tensors * SIDE**2, "host_waits": gpu.host_waits,
                      "launches": [*launches.elements()]})  # fmt: skip
    return found
