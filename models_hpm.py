"""Masked autoencoder with a loss predictor (HPM, CVPR 2023, section 3). Without the predictor it is MAE.

Parameter names and initialisation are the official ones, so official HPM and MAE weights load unchanged.

Shapes: B batch, C channels, H, W image, P patch size, L patches, V visible, M masked (L = V + M), E encoder width,
F decoder width, D prediction width (P * P * C for pixels). Masks are bool (B, L), True = masked, M in every row.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block, PatchEmbed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as checkpoint_activations

import models_vit
from util.losses import PREDICTOR_LOSSES, feature_loss
from util.masking import gather_tokens, random_mask, split_mask
from util.pos_embed import get_2d_sincos_pos_embed
from util.targets import PIXEL_TARGETS
from util.weights.meta import autoencoder_settings


class MaskedAutoencoderViT(nn.Module):
    """An encoder of the visible patches and two decoders: the reconstructor, and the loss predictor.

    Args:
        img_size: side or (height, width) of the images in pixels, a multiple of the patch size.
        norm_pix_loss, relative: official names of `pixel_target` "norm_pixel" and `predictor_loss` "relative".
        vis_mask_ratio: fraction of the visible tokens replaced by a learned token (UM-MAE's second masking).
        learning_loss: add the loss predictor; without it, and with random masks, this is the MAE baseline.
        target_dim: width of feature targets; None reconstructs pixels.
        predictor_depth: blocks of the loss predictor; None for as many as the reconstructor has (published).
        predictor_loss: objective of the predictor, a name in `PREDICTOR_LOSSES`.
        pixel_target: what is reconstructed without `target_dim`, a name in `PIXEL_TARGETS`.
        score_by: how `score_patches` scores hidden patches, "predictor" or "loss".

    Raises:
        ValueError: the patch size does not divide the image, or a width is not a multiple of its number of heads.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        norm_layer: Callable[[int], nn.Module] = partial(nn.LayerNorm, eps=1e-6),
        norm_pix_loss: bool = False,
        vis_mask_ratio: float = 0.0,
        learning_loss: bool = True,
        relative: bool = True,
        target_dim: int | None = None,
        predictor_depth: int | None = None,
        predictor_loss: str | None = None,
        pixel_target: str | None = None,
        score_by: str = "predictor",
    ) -> None:
        super().__init__()
        self.img_size, self.in_chans = models_vit.image_size(img_size, patch_size), in_chans
        pixel_target = pixel_target or ("norm_pixel" if norm_pix_loss else "pixel")
        self.norm_pix_loss, self.target_transform = pixel_target == "norm_pixel", PIXEL_TARGETS[pixel_target]
        self.predictor_loss = predictor_loss or ("relative" if relative else "absolute")
        self.relative = self.predictor_loss == "relative"
        self.target_dim, self.learning_loss, self.vis_mask_ratio = target_dim, learning_loss, vis_mask_ratio
        self.grad_checkpointing, self.score_by = False, score_by

        encoder, decoder = (embed_dim, num_heads), (decoder_embed_dim, decoder_num_heads)
        for part, (width, heads) in {"encoder": encoder, "decoder": decoder}.items():
            if width % heads:
                raise ValueError(f"{part} width {width} is not a multiple of its {heads} heads")
        block = partial(Block, mlp_ratio=mlp_ratio, qkv_bias=True, norm_layer=norm_layer)

        # Encoder
        self.patch_embed = PatchEmbed(self.img_size, patch_size, in_chans, embed_dim)
        num_patches = self.patch_embed.num_patches
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + num_patches, embed_dim), requires_grad=False)
        if vis_mask_ratio > 0:
            self.vis_mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.blocks = nn.ModuleList(block(*encoder) for _ in range(depth))
        self.norm = norm_layer(embed_dim)

        # Input of both decoders
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, 1 + num_patches, decoder_embed_dim), requires_grad=False)

        # Reconstructor
        pixel_dim = patch_size**2 * in_chans
        self.decoder_blocks = nn.ModuleList(block(*decoder) for _ in range(decoder_depth))
        self.decoder_norm = norm_layer(decoder_embed_dim)
        self.decoder_pred = nn.Linear(decoder_embed_dim, target_dim or pixel_dim)

        # Loss predictor. Its output is the mean over `pixel_dim` outputs (official); see `forward_loss_predictor`.
        if learning_loss:
            predictor_depth = decoder_depth if predictor_depth is None else predictor_depth
            self.decoder_blocks_losspred = nn.ModuleList(block(*decoder) for _ in range(predictor_depth))
            self.decoder_norm_losspred = norm_layer(decoder_embed_dim)
            self.decoder_pred_losspred = nn.Linear(decoder_embed_dim, pixel_dim)

        self.initialize_weights()

    def initialize_weights(self) -> None:
        """MAE's initialisation: sin-cos positions, Xavier-uniform linear layers, tokens with a std of 0.02."""
        for table in (self.pos_embed, self.decoder_pos_embed):
            values = get_2d_sincos_pos_embed(table.shape[-1], self.patch_embed.grid_size, cls_token=True)
            table.data.copy_(torch.from_numpy(values))
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))  # initialised as a linear layer
        for name, token in self.named_parameters():
            if name in ("cls_token", "mask_token", "vis_mask_token"):
                nn.init.normal_(token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def patchify(self, imgs: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, L, P * P * C); within a patch, channels vary fastest. The grid is h x w, L = h * w."""
        batch, channels = imgs.shape[:2]
        (h, w), (p, _) = self.patch_embed.grid_size, self.patch_embed.patch_size
        x = imgs.reshape(batch, channels, h, p, w, p).permute(0, 2, 4, 3, 5, 1)  # (B, h, w, P, P, C)
        return x.reshape(batch, h * w, p * p * channels)

    def unpatchify(self, x: Tensor) -> Tensor:
        """(B, L, P * P * C) -> (B, C, H, W), the inverse of `patchify`."""
        (h, w), (p, _) = self.patch_embed.grid_size, self.patch_embed.patch_size
        x = x.reshape(x.shape[0], h, w, p, p, self.in_chans).permute(0, 5, 1, 3, 2, 4)  # (B, C, h, P, w, P)
        return x.reshape(x.shape[0], self.in_chans, h * p, w * p)

    def make_pixel_target(self, imgs: Tensor) -> Tensor:
        """Target of the reconstructor: (B, C, H, W) -> (B, L, P * P * C), float32."""
        assert self.target_dim is None, "the reconstructor's target is features, not pixels"
        target = self.patchify(imgs.float())
        return target if self.target_transform is None else self.target_transform(target)

    def run_blocks(self, blocks: Iterable[nn.Module], x: Tensor) -> Tensor:
        """Transformer blocks, with optional activation checkpointing, on N tokens: (B, N, E) -> (B, N, E)."""
        recompute = self.grad_checkpointing and torch.is_grad_enabled()
        for block in blocks:
            x = checkpoint_activations(block, x, use_reentrant=False) if recompute else block(x)
        return x

    def forward_encoder(self, imgs: Tensor, ids_visible: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W), indices of the visible patches (B, V), None for all -> normed tokens (B, 1 + V, E)."""
        x = self.patch_embed(imgs) + self.pos_embed[:, 1:]  # (B, L, E)
        if ids_visible is not None:
            x = gather_tokens(x, ids_visible)  # (B, V, E)
        if self.vis_mask_ratio > 0:
            x = self.mask_visible_tokens(x, ids_visible)
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
        x = torch.cat([cls_token, x], dim=1)  # (B, 1 + V, E)
        return self.norm(self.run_blocks(self.blocks, x))

    def mask_visible_tokens(self, x: Tensor, ids_visible: Tensor | None) -> Tensor:
        """The second masking: replace a fraction of the tokens (B, V, E) by `vis_mask_token` plus position."""
        batch, num_visible, _ = x.shape
        num_replaced = num_visible - int(num_visible * (1 - self.vis_mask_ratio))
        replaced = random_mask(batch, num_visible, num_replaced, device=x.device)[:, :, None]  # (B, V, 1)
        token = (self.vis_mask_token + self.pos_embed[:, 1:]).expand(batch, -1, -1)  # (B, L, E)
        if ids_visible is not None:
            token = gather_tokens(token, ids_visible)
        return torch.where(replaced, token.to(x.dtype), x)

    def embed_decoder_tokens(self, latent: Tensor, ids_visible: Tensor, ids_masked: Tensor) -> Tensor:
        """(B, 1 + V, E) -> input of both decoders (B, 1 + L, F): class token, visible patches, then mask tokens."""
        x = self.decoder_embed(latent)
        positions = self.decoder_pos_embed[:, 1:].expand(x.shape[0], -1, -1)  # (B, L, F)
        masked = self.mask_token + gather_tokens(positions, ids_masked)  # (B, M, F)
        visible = x[:, 1:] + gather_tokens(positions, ids_visible)  # (B, V, F)
        return torch.cat([x[:, :1] + self.decoder_pos_embed[:, :1], visible, masked], dim=1)

    def forward_loss_predictor(self, tokens: Tensor, num_last: int) -> Tensor:
        """Decoder tokens (B, 1 + L, F) -> predicted loss of the last `num_last` of them (B, num_last).

        The mean over the head's outputs is taken over its weights instead: the same value at a fraction 1 / (P * P * C)
        of the cost. The head runs in float32: in bf16, predictions within an image would tie.
        """
        x = self.run_blocks(self.decoder_blocks_losspred, tokens)
        x = self.decoder_norm_losspred(x[:, -num_last:])
        head = self.decoder_pred_losspred
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), head.weight.mean(dim=0, keepdim=True)).squeeze(-1) + head.bias.mean()

    def forward_reconstructor(self, tokens: Tensor, num_last: int) -> Tensor:
        """Decoder tokens (B, 1 + L, F) -> prediction of the last `num_last` of them (B, num_last, D)."""
        x = self.run_blocks(self.decoder_blocks, tokens)
        return self.decoder_pred(self.decoder_norm(x[:, -num_last:]))

    def forward_decoder(self, latent: Tensor, ids_visible: Tensor, ids_masked: Tensor) -> tuple[Tensor, Tensor | None]:
        """Both decoders: (B, 1 + V, E) -> prediction (B, M, D), predicted loss (B, M) or None without a predictor."""
        tokens = self.embed_decoder_tokens(latent, ids_visible, ids_masked)
        num_masked = ids_masked.shape[1]
        pred = self.forward_reconstructor(tokens, num_masked)
        return pred, self.forward_loss_predictor(tokens, num_masked) if self.learning_loss else None

    def forward_loss(self, pred: Tensor, target: Tensor) -> Tensor:
        """Loss per patch (B, M, D), (B, M, D) -> (B, M): mean squared error of pixels, or 2 - 2 cos of features."""
        if self.target_dim is not None:
            return feature_loss(pred, target)
        return (pred.float() - target.float()).square().mean(dim=-1)

    def forward_learning_loss(self, loss_pred: Tensor, patch_loss: Tensor) -> Tensor:
        """Loss of the predictor, (B, M), (B, M) -> scalar. No gradient flows into `patch_loss`."""
        return PREDICTOR_LOSSES[self.predictor_loss](loss_pred, patch_loss.detach())

    def forward(
        self, imgs: Tensor, mask: Tensor, target: Tensor | None = None, num_masked: int | None = None
    ) -> dict[str, Tensor]:
        """Reconstruct the masked patches and predict the loss of each.

        Args:
            imgs: (B, C, H, W), normalised.
            mask: (B, L) bool, True = masked, the same count in every row.
            target: (B, L, D) features; None for pixels.
            num_masked: M, static. By default it is read from the mask, which synchronises with the device.

        Returns:
            `loss` (to back-propagate), `loss_rec`, `pred` (B, M, D), `patch_loss` (B, M), `latent` (B, 1 + V, E), and
            with the predictor `loss_learn` and `loss_pred` (B, M). Values per patch are in the order of `split_mask`.
        """
        assert (target is None) == (self.target_dim is None), "feature targets and target_dim go together"
        if num_masked is None:
            num_masked = int(mask[0].sum())
        ids_visible, ids_masked = split_mask(mask, num_masked)
        latent = self.forward_encoder(imgs, ids_visible)
        pred, loss_pred = self.forward_decoder(latent, ids_visible, ids_masked)
        target = self.make_pixel_target(imgs) if target is None else target
        patch_loss = self.forward_loss(pred, gather_tokens(target, ids_masked))
        loss_rec = patch_loss.mean()
        out = {"loss": loss_rec, "loss_rec": loss_rec, "pred": pred, "patch_loss": patch_loss, "latent": latent}
        if loss_pred is not None:
            loss_learn = self.forward_learning_loss(loss_pred, patch_loss)
            out.update(loss=loss_rec + loss_learn, loss_learn=loss_learn, loss_pred=loss_pred)
        return out

    def predict_loss(self, imgs: Tensor, return_tokens: bool = False) -> Tensor | tuple[Tensor | None, Tensor]:
        """HPM's teacher forward: every patch visible, no reconstructor. (B, C, H, W) -> predicted loss (B, L).

        With `return_tokens` also the encoder's normed patch tokens (B, L, E), the target of `--target ema`. Without a
        predictor the predicted loss is None.
        """
        latent = self.forward_encoder(imgs)
        if not self.learning_loss:
            assert return_tokens, "no loss predictor"
            return None, latent[:, 1:]
        tokens = self.decoder_embed(latent) + self.decoder_pos_embed
        loss_pred = self.forward_loss_predictor(tokens, num_last=latent.shape[1] - 1)
        return (loss_pred, latent[:, 1:]) if return_tokens else loss_pred

    def score_patches(
        self, imgs: Tensor, hidden: Tensor | None = None, num_hidden: int = 0, target: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Teacher forward: (B, C, H, W) -> scores (B, L), higher for harder patches, and patch tokens (B, L, E).

        Without `hidden` these are `predict_loss`. With `hidden` (B, L), True in `num_hidden` patches of every row, the
        encoder sees the other patches and scores the hidden ones at their mask tokens, where the decoders are trained:
        by predicted loss or, with `score_by` "loss", by true reconstruction loss (AnatoMask, ECCV 2024), of features
        against `target` (B, L, D). Visible patches then score -inf, and tokens are None.
        """
        if hidden is None:
            return self.predict_loss(imgs, return_tokens=True)
        ids_visible, ids_hidden = split_mask(hidden, num_hidden)
        tokens = self.embed_decoder_tokens(self.forward_encoder(imgs, ids_visible), ids_visible, ids_hidden)
        if self.score_by == "loss":
            target = self.make_pixel_target(imgs) if target is None else target
            pred = self.forward_reconstructor(tokens, num_hidden)
            scores = self.forward_loss(pred, gather_tokens(target, ids_hidden))  # (B, num_hidden)
        else:
            scores = self.forward_loss_predictor(tokens, num_hidden)
        return scores.new_full(hidden.shape, -torch.inf).scatter(1, ids_hidden, scores), None


def _sizes(encoder: str, width: int, depth: int, heads: int) -> dict[str, Any]:
    """An encoder of `models_vit` with decoders of this width, depth and number of heads."""
    return {**models_vit.SIZES[encoder], "decoder_embed_dim": width, "decoder_depth": depth, "decoder_num_heads": heads}


SIZES = {
    "mae_vit_micro_patch16_dec64d2b": _sizes("vit_micro_patch16", 64, 2, 4),
    "mae_vit_tiny_patch16_dec128d4b": _sizes("vit_tiny_patch16", 128, 4, 4),
    "mae_vit_small_patch16_dec256d4b": _sizes("vit_small_patch16", 256, 4, 8),
    "mae_vit_base_patch16_dec512d8b": _sizes("vit_base_patch16", 512, 8, 16),
    "mae_vit_large_patch16_dec512d8b": _sizes("vit_large_patch16", 512, 8, 16),
    "mae_vit_huge_patch14_dec512d8b": _sizes("vit_huge_patch14", 512, 8, 16),
}
SIZES |= {name.split("_dec")[0]: sizes for name, sizes in SIZES.items()}  # mae_vit_base_patch16, ...

# Called with settings of `MaskedAutoencoderViT`, which replace those of the size.
MODELS: dict[str, Callable[..., MaskedAutoencoderViT]] = {
    name: partial(MaskedAutoencoderViT, **sizes) for name, sizes in SIZES.items()
}

mae_vit_micro_patch16 = mae_vit_micro_patch16_dec64d2b = MODELS["mae_vit_micro_patch16"]
mae_vit_tiny_patch16 = mae_vit_tiny_patch16_dec128d4b = MODELS["mae_vit_tiny_patch16"]
mae_vit_small_patch16 = mae_vit_small_patch16_dec256d4b = MODELS["mae_vit_small_patch16"]
mae_vit_base_patch16 = mae_vit_base_patch16_dec512d8b = MODELS["mae_vit_base_patch16"]
mae_vit_large_patch16 = mae_vit_large_patch16_dec512d8b = MODELS["mae_vit_large_patch16"]
mae_vit_huge_patch14 = mae_vit_huge_patch14_dec512d8b = MODELS["mae_vit_huge_patch14"]


def build_for(name: str, weights: dict[str, Tensor], **settings: Any) -> MaskedAutoencoderViT:
    """The model of size `name` that fits `weights` (official names), without loading them; settings that are not None
    override theirs.

    The second masking is off: pictures show the unmodified image. Raises ValueError for an encoder without its decoder.
    """
    given = {key: value for key, value in settings.items() if value is not None}
    model = MODELS[name](**{**autoencoder_settings(weights), **given})
    model.vis_mask_ratio = 0.0
    return model
