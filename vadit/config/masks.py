"""What training on part of the tokens (MaskSpec) can be combined with."""

from vadit.config.networks import DiTSpec
from vadit.config.objectives import FlowSpec, MaskSpec, RepaSpec
from vadit.config.training import EngineSpec
from vadit.runtime.errors import UsageError


def check_masks(mask: MaskSpec, model: DiTSpec, flow: FlowSpec, repa: RepaSpec, engine: EngineSpec) -> None:
    """Refuse what a masked run cannot be, or would silently not do."""
    tokens = (model.input_size // model.patch_size) ** 2
    if not 0 < int(tokens * (1 - mask.ratio)) < tokens:
        raise UsageError(
            f"mask.ratio is {mask.ratio}; of {tokens} tokens some must be masked and some visible "
            "(MaskDiT: 0.5, MDT: 0.3)"
        )
    for name, is_on, off in (
        ("repa.weight", repa.weight > 0, "--repa.weight 0"),
        ("flow.dispersive_weight", flow.dispersive_weight > 0, "--flow.dispersive-weight 0"),
        ("flow.contrastive_weight", flow.contrastive_weight > 0, "--flow.contrastive-weight 0"),
        ("model.value_residual", model.value_residual, "--model.no-value-residual"),
        ("engine.float8", engine.float8 is not None, "--engine.float8 None"),
    ):
        if is_on:
            raise UsageError(
                f"mask.kind is {mask.kind} and {name} is on; they cannot be combined: set --mask.kind none, or {off}"
            )
    if mask.kind == "maskdit":
        _check_maskdit(mask, model, flow)
    else:
        _check_mdt(mask, model, engine)


def _check_maskdit(mask: MaskSpec, model: DiTSpec, flow: FlowSpec) -> None:
    if flow.objective != "flow" or flow.path != "linear" or flow.prediction != "velocity":
        raise UsageError(
            f"mask.kind maskdit is for flow.objective flow with flow.path linear and flow.prediction velocity, found "
            f"{flow.objective}, {flow.path}, {flow.prediction}"
        )
    width, heads = mask.decoder_width, mask.decoder_heads
    if width % 4 or width % heads or (model.rope and width // heads % 4):
        raise UsageError(
            f"mask.decoder_width {width} with mask.decoder_heads {heads}: the width must be divisible by 4 and by the "
            "heads, and with model.rope each head's width by 4 (the paper: 512 and 16)"
        )
    if model.patch_size**2 * model.in_channels < 2:
        raise UsageError("mask.kind maskdit normalises each patch, which needs more than one number; patches hold one")


def _check_mdt(mask: MaskSpec, model: DiTSpec, engine: EngineSpec) -> None:
    if mask.decoder_depth >= model.depth:
        raise UsageError(
            f"mask.decoder_depth {mask.decoder_depth} must leave some of the model.depth {model.depth} blocks before "
            "the side-interpolater; lower it (MDT: 2)"
        )
    if mask.unmasked_after_images is not None:
        raise UsageError("mask.unmasked_after_images is MaskDiT's; MDT sees all tokens in every step besides: leave it")
    if engine.compile is True and engine.zero_stage == 3:
        raise UsageError(
            "engine.compile at engine.zero_stage 3 takes each block once in a step, mask.kind mdt twice; "
            "set --engine.zero-stage 2"
        )
    if not model.rope and engine.attention not in ("auto", "efficient", "math"):
        raise UsageError(
            f"mask.kind mdt without model.rope adds a learnt bias to its logits, which engine.attention "
            f"{engine.attention} cannot; set --engine.attention auto"
        )
