"""VA-VAE in training: the autoencoder, and the projection that the VF loss compares with foundation features.

Its forward returns everything the losses need, and keeps the inner tensors of that forward for the adaptive weights:
gradients with respect to them leave the parameters, and so a sharding engine's hooks, untouched.

Shape suffixes: B batch, C image channels, H W image sides, d latent channels, h w latent sides, D feature channels.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vadit.config import TokenizerConfig
from vadit.kernels import vf_loss
from vadit.models.autoencoder import Autoencoder, DiagonalGaussian


@dataclass
class Inner:
    """Tensors of the last forward, with their graph."""

    moments_BEhw: Tensor  # output of encoder.conv_out
    images_BCHW: Tensor  # output of decoder.conv_out: the reconstruction
    cos_loss: Tensor
    distmat_loss: Tensor


class AlignedAutoencoder(Autoencoder):
    """Autoencoder plus `linear_proj`, a 1x1 convolution without bias (the authors' name), where there are features.

    `recompute_tail` runs all that follows the encoder under checkpoint(): ZeRO-3 then finds its weights gathered again
    in each of the two backward passes over it.
    """

    def __init__(self, config: TokenizerConfig, feature_dim: int | None, *, recompute_tail: bool = False) -> None:
        super().__init__(config.autoencoder, config.engine.gradient_checkpointing)
        self.recompute_tail = recompute_tail
        if feature_dim is not None:
            self.linear_proj = _Alignment(config, feature_dim)
        self.inner: Inner | None = None
        self.conv_inputs: dict[str, Tensor] = {}
        for name, part in (("encoder", self.encoder), ("decoder", self.decoder)):
            part.conv_out.register_forward_pre_hook(partial(self._keep_input, name))

    def _keep_input(self, name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.conv_inputs[name] = inputs[0].detach()

    def forward(  # type: ignore[override]
        self, x_BCHW: Tensor, features_BDhw: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images and foundation features (None: no alignment) to (reconstruction (B, C, H, W), KL, L_mcos, L_mdms).

        KL is the mean over images of the sum over the latent; the last two are zero without features.
        """
        moments = self.features(x_BCHW)
        tail = partial(checkpoint, self._tail, use_reentrant=False) if self.recompute_tail else self._tail
        images, kl, cos_loss, distmat_loss = tail(moments, features_BDhw)
        self.inner = Inner(moments, images, cos_loss, distmat_loss)
        # Copies: an engine hooks what it returns, and any backward pass through a hooked tensor starts its reduction.
        return images.view_as(images), kl.view_as(kl), cos_loss.view_as(cos_loss), distmat_loss.view_as(distmat_loss)

    def _tail(self, moments_BEhw: Tensor, features_BDhw: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        posterior = DiagonalGaussian(self.quant_conv(moments_BEhw))
        z_Bdhw = posterior.sample()
        kl = posterior.kl().mean()
        cos_loss = distmat_loss = torch.zeros_like(kl)
        if features_BDhw is not None:
            cos_loss, distmat_loss = self.linear_proj(z_Bdhw, features_BDhw)
        return self.decode(z_Bdhw), kl, cos_loss, distmat_loss


class _Alignment(nn.Module):
    """Projection and loss in one module, so that a sharding engine gathers the weight for both passes."""

    def __init__(self, config: TokenizerConfig, feature_dim: int) -> None:
        super().__init__()
        self.weight = nn.Conv2d(config.autoencoder.latent_channels, feature_dim, 1, bias=False).weight
        self.margins = {"cos_margin": config.loss.cos_margin, "distmat_margin": config.loss.distmat_margin}

    def forward(self, z_Bdhw: Tensor, features_BDhw: Tensor) -> tuple[Tensor, Tensor]:
        # foundation models compute channels innermost, the convolutions perhaps, too
        z_BdN, features_BDN = z_Bdhw.flatten(2).contiguous(), features_BDhw.flatten(2).contiguous()
        return vf_loss(z_BdN, self.weight.flatten(1), features_BDN, **self.margins)
