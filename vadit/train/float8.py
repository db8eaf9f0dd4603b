"""The linear layers of the generator's blocks in float8: products in 8 bits, weights and sums as before.

Converted are attention and MLP of every block; embedders, modulation and the last layer stay as they are: little work,
and sensitive. Parameters keep their names and stay fp32 (or bf16), so checkpoints, averages and exports do not differ.
torchao's scales: `rowwise`, one per row and column, e4m3 throughout; `tensorwise`, one per tensor, e5m2 for gradients.
`fused` (vadit.kernels.float8): SwiGLU's two layers and qkv, one scale per row, e4m3, gradients of weights in bf16.
"""

import copy
import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from vadit.config import DiTSpec
from vadit.kernels.float8 import float8_linear, float8_mlp
from vadit.models.dit import LateBiasLinear, SwiGLU
from vadit.runtime import distributed
from vadit.runtime.choices import Choice
from vadit.runtime.errors import first_line
from vadit.train.engine import quiet

SETTING = "engine.float8"
FUSED = "fused"
LAYERS = ("qkv", "proj", "w12", "w3", "fc1", "fc2")  # linear layers of attention and MLP, by name
MULTIPLE = 16  # what the sizes of a float8 product have to be multiples of
CAPABILITY = (8, 9)  # the first GPUs that multiply float8 (Ada; then Hopper)
TOLERANCE = 0.1
"""Largest relative error (2-norm) of a small layer: e4m3 rounds to 2^-4 of a number, e5m2 to 2^-3, at random."""


def convert(
    blocks: nn.ModuleList, recipe: str | None, *, rows: int, device: torch.device, emulate: bool = False
) -> Choice:
    """Let the linear layers of `blocks` multiply in float8 where that works here; `rows` is tokens per micro-batch.

    `emulate` computes in full precision with values rounded to float8, on any device: for tests.
    """
    if recipe is None:
        return Choice(SETTING, "none", "the default")
    why = _fault(recipe, rows, device, emulate)
    # Gradients of float8 layers are reduced in other buckets: all processes must have the same.
    if distributed.any_rank(why is not None, device):
        why = why or "another process cannot"
        return Choice(SETTING, "bf16", "what is always there", refused=f"{recipe} cannot be had here ({why})")
    left: dict[str, None] = {}  # an ordered set: blocks are alike

    def wanted(layer: nn.Module, name: str) -> bool:
        if name.split(".")[-1] not in LAYERS or not isinstance(layer, nn.Linear):
            return False
        fits = layer.in_features % MULTIPLE == 0 and layer.out_features % MULTIPLE == 0
        if not fits:
            left[f"{name} ({layer.in_features} to {layer.out_features})"] = None
        return fits

    for block in blocks:
        _swap(block, recipe, emulate, wanted)
    choice = Choice(SETTING, recipe, "asked for")
    if not left:
        return choice
    return dataclasses.replace(choice, left_out=f"no multiples of {MULTIPLE}, so in bf16: {', '.join(left)}")


class Float8Linear(LateBiasLinear):
    """A linear layer whose product, and that of its input's gradient, take float8."""

    def forward(self, x: Tensor, *, add_bias: bool = True) -> Tensor:
        y = float8_linear(x, self.weight)
        return y + self.bias.to(y.dtype) if add_bias else y


class Float8SwiGLU(SwiGLU):
    """SwiGLU whose products, and those of gradients but the weights', take float8."""

    def forward(self, x_BND: Tensor) -> tuple[Tensor, Tensor]:
        return float8_mlp(x_BND, self.w12.weight, self.w12.bias, self.w3.weight), self.w3.bias


def _swap(module: nn.Module, recipe: str, emulate: bool, wanted: Callable[[nn.Module, str], bool]) -> None:
    """Give the layers in `module` that are wanted their forward in float8; parameters and names stay."""
    if recipe != FUSED:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        config = dataclasses.replace(Float8LinearConfig.from_recipe_name(recipe), emulate=emulate)
        convert_to_float8_training(module, module_filter_fn=wanted, config=config)
        return
    for name, layer in module.named_modules():
        if isinstance(layer, SwiGLU) and all([wanted(layer.w12, f"{name}.w12"), wanted(layer.w3, f"{name}.w3")]):
            layer.__class__ = Float8SwiGLU
        elif isinstance(layer, LateBiasLinear) and name.endswith("qkv") and wanted(layer, name):
            layer.__class__ = Float8Linear


def _fault(recipe: str, rows: int, device: torch.device, emulate: bool) -> str | None:
    """What is in the way: hardware, sizes, package, or a small layer whose numbers are wrong; None if nothing is."""
    if not emulate:
        if device.type != "cuda":
            return "it needs a GPU"
        capability = torch.cuda.get_device_capability(device)
        if capability < CAPABILITY:
            return f"it needs a GPU of sm_{CAPABILITY[0]}{CAPABILITY[1]}, this is sm_{capability[0]}{capability[1]}"
    if rows % MULTIPLE:
        return f"a micro-batch has {rows} tokens, no multiple of {MULTIPLE}"
    try:
        with quiet():  # torchao's import registers something in a way that torch has since deprecated
            return _try_out(recipe, device, emulate)
    except Exception as error:  # whatever a missing package or kernel raises
        return first_line(error)


def _try_out(recipe: str, device: torch.device, emulate: bool) -> str | None:
    """Compare output and gradients of a small layer, as training calls it (bf16 in, fp32 weights), with fp32."""
    generator = torch.Generator().manual_seed(0)  # one of its own: trying must not move the run's random numbers
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    with torch.device("meta"):
        exact = SwiGLU(DiTSpec(hidden_size=64, mlp_ratio=3.0)) if recipe == FUSED else nn.Linear(64, 96)
    exact = exact.to_empty(device="cpu")
    for weight in exact.parameters():
        weight.data = draw(*weight.shape) / 8
    holder = nn.ModuleList([copy.deepcopy(exact).to(device)])
    _swap(holder, recipe, emulate, lambda layer, _: isinstance(layer, nn.Linear))
    inputs = draw(32, 64).to(torch.bfloat16)
    results = []
    for layer, where, dtype in ((exact, torch.device("cpu"), torch.float32), (holder[0], device, torch.bfloat16)):
        leaf = inputs.to(where, dtype).requires_grad_()
        out = layer(leaf)
        out = out[0] if isinstance(out, tuple) else out
        wanted = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out)
        grads = torch.autograd.grad(out, [leaf, *layer.parameters()], wanted, allow_unused=True)
        results.append([value.detach().float().cpu() for value in (out, *grads) if value is not None])
    for what, reference, found in zip(("output", "input's gradient", "weight's gradient"), *results, strict=False):
        off = ((found - reference).norm() / reference.norm()).item()
        if not off <= TOLERANCE:  # NaN, too
            return f"the {what} of a small layer is off by {off:.1e}, allowed are {TOLERANCE:.0e}"
    return None
