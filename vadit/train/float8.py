"""The linear layers of the generator's blocks in float8 (torchao): products in 8 bits, weights and sums as before.

Converted are attention and MLP of every block; embedders, modulation and the last layer stay as they are: little work,
and sensitive. Parameters keep their names and stay fp32 (or bf16), so checkpoints, averages and exports do not differ.
Scales: `rowwise`, one per row and column, e4m3 throughout; `tensorwise`, one per tensor, e5m2 for gradients, faster.
"""

import dataclasses
from typing import Any

import torch
from torch import nn

from vadit.runtime import distributed
from vadit.runtime.choices import Choice
from vadit.runtime.errors import first_line
from vadit.train.engine import quiet

SETTING = "engine.float8"
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
    why = fault(recipe, rows, device, emulate)
    # Gradients of float8 layers are reduced in other buckets: all processes must have the same.
    if distributed.any_rank(why is not None, device):
        why = why or "another process cannot"
        return Choice(SETTING, "bf16", "what is always there", refused=f"{recipe} cannot be had here ({why})")
    from torchao.float8 import convert_to_float8_training

    left: dict[str, None] = {}  # an ordered set: blocks are alike

    def wanted(layer: nn.Module, name: str) -> bool:
        if name.split(".")[-1] not in LAYERS or not isinstance(layer, nn.Linear):
            return False
        fits = layer.in_features % MULTIPLE == 0 and layer.out_features % MULTIPLE == 0
        if not fits:
            left[f"{name} ({layer.in_features} to {layer.out_features})"] = None
        return fits

    for block in blocks:
        convert_to_float8_training(block, module_filter_fn=wanted, config=_config(recipe, emulate))
    choice = Choice(SETTING, recipe, "asked for")
    if not left:
        return choice
    return dataclasses.replace(choice, left_out=f"no multiples of {MULTIPLE}, so in bf16: {', '.join(left)}")


def _config(recipe: str, emulate: bool) -> Any:
    from torchao.float8 import Float8LinearConfig

    return dataclasses.replace(Float8LinearConfig.from_recipe_name(recipe), emulate=emulate)


def fault(recipe: str, rows: int, device: torch.device, emulate: bool = False) -> str | None:
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
    from torchao.float8 import convert_to_float8_training

    generator = torch.Generator().manual_seed(0)  # one of its own: trying must not move the run's random numbers
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    exact = nn.utils.skip_init(nn.Linear, 64, 96)
    exact.weight.data, exact.bias.data = draw(96, 64), draw(96)
    holder = nn.Sequential(nn.utils.skip_init(nn.Linear, 64, 96))
    holder.load_state_dict({f"0.{name}": value for name, value in exact.state_dict().items()})
    convert_to_float8_training(holder.to(device), config=_config(recipe, emulate))
    inputs, wanted = draw(32, 64).to(torch.bfloat16), draw(32, 96).to(torch.bfloat16)
    results = []
    for layer, where, dtype in ((exact, torch.device("cpu"), torch.float32), (holder, device, torch.bfloat16)):
        leaf = inputs.to(where, dtype).requires_grad_()
        out = layer(leaf)
        grads = torch.autograd.grad(out, [leaf, *layer.parameters()], wanted.to(where, out.dtype))
        results.append([value.detach().float().cpu() for value in (out, *grads)])
    for what, reference, found in zip(("output", "input's gradient", "weight's gradient"), *results, strict=False):
        off = ((found - reference).norm() / reference.norm()).item()
        if not off <= TOLERANCE:  # NaN, too
            return f"the {what} of a small layer is off by {off:.1e}, allowed are {TOLERANCE:.0e}"
    return None
