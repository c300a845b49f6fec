"""Masked autoencoder with a loss predictor (HPM, CVPR 2023, section 3), and the MAE baseline without one.

Parameter names and initialisation are the official ones, so official HPM and MAE weights load with no renaming.

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
from torch.utils.checkpoint import checkpoint

from util.losses import absolute_loss, feature_loss, relative_loss
from util.pos_embed import get_2d_sincos_pos_embed


def gather_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """Pick tokens by index: (B, N, E), (B, K) -> (B, K, E). Fixed shapes, unlike boolean indexing."""
    return x.gather(1, ids[:, :, None].expand(-1, -1, x.shape[-1]))


def split_mask(mask: Tensor, num_masked: int) -> tuple[Tensor, Tensor]:
    """Mask (B, L) -> indices of the visible patches (B, V) and of the masked ones (B, M), each in row order."""
    ids = mask.int().argsort(dim=1, stable=True)
    num_visible = mask.shape[1] - num_masked
    return ids[:, :num_visible], ids[:, num_visible:]


class MaskedAutoencoderViT(nn.Module):
    """Encoder on the visible patches, reconstructor, and a loss predictor of the reconstructor's shape.

    Args:
        img_size: side of the image or (height, width), in pixels; a multiple of the patch size.
        norm_pix_loss: reconstruct pixels normalised by their patch's mean and variance.
        vis_mask_ratio: share of the visible tokens replaced by a learned token (UM-MAE's second masking).
        learning_loss: have a loss predictor; without one this is the MAE baseline and `relative` is ignored.
        relative: train the predictor by ranking the masked patches of an image, not on the loss values.
        target_dim: width of feature targets; None reconstructs pixels.

    Raises:
        ValueError: the patch size does not divide the image, or a width does not fit its number of heads.
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
    ) -> None:
        super().__init__()
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        self._check(patch_size, embed_dim, num_heads, decoder_embed_dim, decoder_num_heads)
        self.in_chans = in_chans
        self.norm_pix_loss = norm_pix_loss
        self.vis_mask_ratio = vis_mask_ratio
        self.learning_loss = learning_loss
        self.relative = relative
        self.target_dim = target_dim
        self.grad_checkpointing = False

        def blocks(width: int, depth: int, heads: int) -> nn.ModuleList:
            return nn.ModuleList(
                [Block(width, heads, mlp_ratio, qkv_bias=True, norm_layer=norm_layer) for _ in range(depth)]
            )

        # Encoder
        self.patch_embed = PatchEmbed(self.img_size, patch_size, in_chans, embed_dim)
        num_patches = self.patch_embed.num_patches
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + num_patches, embed_dim), requires_grad=False)
        if vis_mask_ratio > 0:
            self.vis_mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.blocks = blocks(embed_dim, depth, num_heads)
        self.norm = norm_layer(embed_dim)

        # What both decoders read
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, 1 + num_patches, decoder_embed_dim), requires_grad=False)

        # Reconstructor
        pixel_dim = patch_size**2 * in_chans
        self.decoder_blocks = blocks(decoder_embed_dim, decoder_depth, decoder_num_heads)
        self.decoder_norm = norm_layer(decoder_embed_dim)
        self.decoder_pred = nn.Linear(decoder_embed_dim, target_dim or pixel_dim)

        # Loss predictor. Its head predicts one number as the mean of `pixel_dim` (official); see `_hardness`.
        if learning_loss:
            self.decoder_blocks_losspred = blocks(decoder_embed_dim, decoder_depth, decoder_num_heads)
            self.decoder_norm_losspred = norm_layer(decoder_embed_dim)
            self.decoder_pred_losspred = nn.Linear(decoder_embed_dim, pixel_dim)

        self.initialize_weights()

    def _check(self, patch: int, width: int, heads: int, decoder_width: int, decoder_heads: int) -> None:
        h, w = self.img_size
        if h % patch or w % patch or min(h, w) < patch:
            raise ValueError(f"patch size {patch} does not divide an image of {h} x {w}: choose a multiple of {patch}")
        for name, size, number in (("encoder", width, heads), ("decoder", decoder_width, decoder_heads)):
            if size % number:
                raise ValueError(f"{name} width {size} is not a multiple of its {number} heads")

    def initialize_weights(self) -> None:
        """MAE's initialisation: sin-cos positions, Xavier-uniform linear layers, tokens of standard deviation 0.02."""
        for table in (self.pos_embed, self.decoder_pos_embed):
            values = get_2d_sincos_pos_embed(table.shape[-1], self.patch_embed.grid_size, cls_token=True)
            table.data.copy_(torch.from_numpy(values))
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))  # as if it were a linear layer
        for name, token in self.named_parameters():
            if name in ("cls_token", "mask_token", "vis_mask_token"):
                nn.init.normal_(token, std=0.02)
        self.apply(self._init_layer)

    @staticmethod
    def _init_layer(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)

    # ---------------------------------------------------------------------------------------------------- pixels

    def patchify(self, imgs: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, L, P * P * C); within a patch, channels vary fastest."""
        batch, channels = imgs.shape[:2]
        (h, w), (p, _) = self.patch_embed.grid_size, self.patch_embed.patch_size
        x = imgs.reshape(batch, channels, h, p, w, p).permute(0, 2, 4, 3, 5, 1)  # (B, h, w, P, P, C)
        return x.reshape(batch, h * w, p * p * channels)

    def unpatchify(self, x: Tensor) -> Tensor:
        """(B, L, P * P * C) -> (B, C, H, W), the inverse of `patchify`."""
        (h, w), (p, _) = self.patch_embed.grid_size, self.patch_embed.patch_size
        x = x.reshape(x.shape[0], h, w, p, p, self.in_chans).permute(0, 5, 1, 3, 2, 4)  # (B, C, h, P, w, P)
        return x.reshape(x.shape[0], self.in_chans, h * p, w * p)

    def pixel_target(self, imgs: Tensor) -> Tensor:
        """What the reconstructor should predict: (B, C, H, W) -> (B, L, P * P * C), float32."""
        target = self.patchify(imgs.float())
        if self.norm_pix_loss:
            variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        return target

    # --------------------------------------------------------------------------------------------------- network

    def _run(self, blocks: Iterable[nn.Module], x: Tensor) -> Tensor:
        for block in blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x

    def forward_encoder(self, imgs: Tensor, ids_visible: Tensor | None = None) -> Tensor:
        """(B, C, H, W) and the patches to look at (B, V), all of them if None -> normed tokens (B, 1 + V, E)."""
        x = self.patch_embed(imgs) + self.pos_embed[:, 1:]  # (B, L, E)
        if ids_visible is not None:
            x = gather_tokens(x, ids_visible)  # (B, V, E)
        if self.vis_mask_ratio > 0:
            x = self._second_mask(x, ids_visible)
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
        x = torch.cat([cls_token, x], dim=1)  # (B, 1 + V, E)
        return self.norm(self._run(self.blocks, x))

    def _second_mask(self, x: Tensor, ids_visible: Tensor | None) -> Tensor:
        """Replace a share of the visible tokens (B, V, E) by `vis_mask_token` + position, as the official code."""
        batch, num_visible, _ = x.shape
        num_replaced = num_visible - int(num_visible * (1 - self.vis_mask_ratio))
        chosen = torch.rand(batch, num_visible, device=x.device).topk(num_replaced, dim=1).indices
        replaced = torch.zeros(batch, num_visible, 1, dtype=torch.bool, device=x.device)
        replaced = replaced.scatter(1, chosen[:, :, None], True)
        token = (self.vis_mask_token + self.pos_embed[:, 1:]).expand(batch, -1, -1)  # (B, L, E)
        if ids_visible is not None:
            token = gather_tokens(token, ids_visible)
        return torch.where(replaced, token.to(x.dtype), x)

    def _decoder_tokens(self, latent: Tensor, ids_visible: Tensor, ids_masked: Tensor) -> Tensor:
        """(B, 1 + V, E) -> (B, 1 + L, F): class token, visible patches, mask tokens, each with its position."""
        x = self.decoder_embed(latent)
        positions = self.decoder_pos_embed[:, 1:].expand(x.shape[0], -1, -1)  # (B, L, F)
        hidden = self.mask_token + gather_tokens(positions, ids_masked)  # (B, M, F)
        visible = x[:, 1:] + gather_tokens(positions, ids_visible)  # (B, V, F)
        return torch.cat([x[:, :1] + self.decoder_pos_embed[:, :1], visible, hidden.to(x.dtype)], dim=1)

    def _hardness(self, tokens: Tensor, num_last: int) -> Tensor:
        """Loss predictor on decoder tokens (B, 1 + L, F) -> predicted loss of the last `num_last` (B, num_last).

        The mean over the head's outputs is taken on its weights instead, which is the same number for a 768th of the
        work. In float32: in bf16 the predictions of an image would tie.
        """
        x = self._run(self.decoder_blocks_losspred, tokens)
        x = self.decoder_norm_losspred(x[:, -num_last:])
        head = self.decoder_pred_losspred
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), head.weight.mean(dim=0, keepdim=True)).squeeze(-1) + head.bias.mean()

    def forward_decoder(self, latent: Tensor, ids_visible: Tensor, ids_masked: Tensor) -> tuple[Tensor, Tensor | None]:
        """Both decoders: (B, 1 + V, E) -> prediction (B, M, D) and predicted loss (B, M), None without a predictor."""
        tokens = self._decoder_tokens(latent, ids_visible, ids_masked)
        num_masked = ids_masked.shape[1]
        x = self._run(self.decoder_blocks, tokens)
        pred = self.decoder_pred(self.decoder_norm(x[:, -num_masked:]))  # (B, M, D)
        return pred, self._hardness(tokens, num_masked) if self.learning_loss else None

    def forward_loss(self, pred: Tensor, target: Tensor) -> Tensor:
        """Error of each masked patch, (B, M, D), (B, M, D) -> (B, M): squared for pixels, 2 - 2 cos for features."""
        if self.target_dim is not None:
            return feature_loss(pred, target)
        return (pred.float() - target.float()).square().mean(dim=-1)

    def forward_learning_loss(self, loss_pred: Tensor, patch_loss: Tensor) -> Tensor:
        """How well the predictor does, (B, M), (B, M) -> scalar. No gradient reaches `patch_loss`."""
        objective = relative_loss if self.relative else absolute_loss
        return objective(loss_pred, patch_loss.detach())

    def forward(
        self, imgs: Tensor, mask: Tensor, target: Tensor | None = None, num_masked: int | None = None
    ) -> dict[str, Tensor]:
        """Reconstruct the masked patches and predict how hard each is.

        Args:
            imgs: (B, C, H, W), normalised.
            mask: (B, L) bool, True = masked, the same count in every row.
            target: (B, L, D) features to predict; None for pixels.
            num_masked: M. Left out, it is read off the mask, which waits for the device.

        Returns:
            `loss` (what to back-propagate), `loss_rec`, `loss_learn` (only with the predictor), `pred` (B, M, D),
            `patch_loss` (B, M), `loss_pred` (B, M; only with the predictor), `latent` (B, 1 + V, E). What is per patch
            is in row order of the masked patches.
        """
        assert (target is None) == (self.target_dim is None), "feature targets and target_dim go together"
        if num_masked is None:
            num_masked = int(mask[0].sum())
        ids_visible, ids_masked = split_mask(mask, num_masked)
        latent = self.forward_encoder(imgs, ids_visible)
        pred, loss_pred = self.forward_decoder(latent, ids_visible, ids_masked)
        if target is None:
            target = self.pixel_target(imgs)
        patch_loss = self.forward_loss(pred, gather_tokens(target, ids_masked))
        loss_rec = patch_loss.mean()
        out = {"loss": loss_rec, "loss_rec": loss_rec, "pred": pred, "patch_loss": patch_loss, "latent": latent}
        if loss_pred is not None:
            loss_learn = self.forward_learning_loss(loss_pred, patch_loss)
            out.update(loss=loss_rec + loss_learn, loss_learn=loss_learn, loss_pred=loss_pred)
        return out

    def predict_loss(self, imgs: Tensor, return_tokens: bool = False) -> Tensor | tuple[Tensor | None, Tensor]:
        """The teacher's pass: every patch visible, no reconstructor. (B, C, H, W) -> predicted loss (B, L).

        With `return_tokens` also the encoder's normed patch tokens (B, L, E), the target of `--target ema`; these alone
        and None without a predictor.
        """
        latent = self.forward_encoder(imgs)
        if not self.learning_loss:
            assert return_tokens, "there is no predictor"
            return None, latent[:, 1:]
        tokens = self.decoder_embed(latent) + self.decoder_pos_embed
        loss_pred = self._hardness(tokens, num_last=latent.shape[1] - 1)
        return (loss_pred, latent[:, 1:]) if return_tokens else loss_pred


# ------------------------------------------------------------------------------------------------------- factories


# Anything of a size can be changed: mae_vit_base_patch16(img_size=32, patch_size=4, decoder_depth=2).
_size = partial(partial, MaskedAutoencoderViT)

mae_vit_micro_patch16_dec64d2b = _size(
    patch_size=16, embed_dim=128, depth=6, num_heads=4, decoder_embed_dim=64, decoder_depth=2, decoder_num_heads=4
)
mae_vit_tiny_patch16_dec128d4b = _size(
    patch_size=16, embed_dim=192, depth=12, num_heads=3, decoder_embed_dim=128, decoder_depth=4, decoder_num_heads=4
)
mae_vit_small_patch16_dec256d4b = _size(
    patch_size=16, embed_dim=384, depth=12, num_heads=6, decoder_embed_dim=256, decoder_depth=4, decoder_num_heads=8
)
mae_vit_base_patch16_dec512d8b = _size(
    patch_size=16, embed_dim=768, depth=12, num_heads=12, decoder_embed_dim=512, decoder_depth=8, decoder_num_heads=16
)
mae_vit_large_patch16_dec512d8b = _size(
    patch_size=16, embed_dim=1024, depth=24, num_heads=16, decoder_embed_dim=512, decoder_depth=8, decoder_num_heads=16
)
mae_vit_huge_patch14_dec512d8b = _size(
    patch_size=14, embed_dim=1280, depth=32, num_heads=16, decoder_embed_dim=512, decoder_depth=8, decoder_num_heads=16
)

mae_vit_micro_patch16 = mae_vit_micro_patch16_dec64d2b
mae_vit_tiny_patch16 = mae_vit_tiny_patch16_dec128d4b
mae_vit_small_patch16 = mae_vit_small_patch16_dec256d4b
mae_vit_base_patch16 = mae_vit_base_patch16_dec512d8b
mae_vit_large_patch16 = mae_vit_large_patch16_dec512d8b
mae_vit_huge_patch14 = mae_vit_huge_patch14_dec512d8b

MODELS = {name: build for name, build in list(globals().items()) if name.startswith("mae_vit_")}


def build_for(name: str, weights: dict[str, Tensor], **settings: Any) -> MaskedAutoencoderViT:
    """The model of size `name` that `weights` (official names) are of: with a predictor, a second masking, a decoder
    of another width or depth, or feature targets, where they have them. The weights are not loaded.

    The second masking is switched off: pictures show what the model sees in the image as it is.

    Raises:
        ValueError: there is no decoder in the weights, so nothing can be reconstructed.
    """
    missing = [key for key in ("decoder_pred.weight", "decoder_embed.weight") if key not in weights]
    if missing or "patch_embed.proj.weight" not in weights:
        raise ValueError(
            "these weights are an encoder alone, without the decoder that reconstructs: take the full checkpoint "
            "(MAE calls it mae_visualize or mae_pretrain_full)"
        )
    depth = 0
    while f"decoder_blocks.{depth}.norm1.weight" in weights:
        depth += 1
    outputs = len(weights["decoder_pred.weight"])
    patch, channels = weights["patch_embed.proj.weight"].shape[-1], weights["patch_embed.proj.weight"].shape[1]
    found = {
        "patch_size": patch,
        "in_chans": channels,
        "decoder_embed_dim": len(weights["decoder_embed.weight"]),
        "decoder_depth": depth,
        "vis_mask_ratio": 0.5 if "vis_mask_token" in weights else 0.0,
        "learning_loss": "decoder_pred_losspred.weight" in weights,
        "target_dim": None if outputs == patch * patch * channels else outputs,
    }
    model = MODELS[name](**{**found, **settings})
    model.vis_mask_ratio = 0.0
    return model
