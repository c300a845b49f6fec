"""How much a pre-training step has to compute, by formula.

Multiply-accumulates (one is two floating-point operations) of the products, which is all but a hundredth of the work;
norms, activations, softmax and losses are not counted, and neither is what gradient checkpointing computes again.

Shapes: L patches, V visible, M masked, E encoder width, F decoder width, D prediction width.
"""

from models_hpm import MaskedAutoencoderViT


def _blocks(blocks: list, tokens: int) -> int:
    """Transformer blocks on a number of tokens: four projections, two products of attention, the MLP."""
    total = 0
    for block in blocks:
        weights = (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
        total += tokens * sum(layer.weight.numel() for layer in weights)
        total += 2 * tokens * tokens * block.attn.qkv.in_features
    return total


def _patch_embed(model: MaskedAutoencoderViT) -> int:
    return model.patch_embed.num_patches * model.patch_embed.proj.weight.numel()  # of every patch, then V are kept


def _predictor(model: MaskedAutoencoderViT, outputs: int) -> int:
    tokens = 1 + model.patch_embed.num_patches
    return _blocks(model.decoder_blocks_losspred, tokens) + outputs * model.decoder_embed.out_features


def teacher_macs(model: MaskedAutoencoderViT) -> int:
    """The teacher's pass over one image: encoder and predictor on every patch."""
    tokens = 1 + model.patch_embed.num_patches
    embed = tokens * model.decoder_embed.weight.numel()
    return _patch_embed(model) + _blocks(model.blocks, tokens) + embed + _predictor(model, tokens - 1)


def student_macs(model: MaskedAutoencoderViT, num_masked: int) -> int:
    """The student's forward and backward pass over one image.

    A backward pass takes two products for each of the forward pass, for the weights' gradient and the input's; the
    image needs none.
    """
    tokens = 1 + model.patch_embed.num_patches
    visible = tokens - num_masked  # with the class token
    macs = _patch_embed(model) + _blocks(model.blocks, visible) + visible * model.decoder_embed.weight.numel()
    macs += _blocks(model.decoder_blocks, tokens) + num_masked * model.decoder_pred.weight.numel()
    if model.learning_loss:
        macs += _predictor(model, num_masked)
    return 3 * macs - _patch_embed(model)


def step_flops(model: MaskedAutoencoderViT, num_masked: int, batch_size: int) -> int:
    """Floating-point operations of a step: the student, and the teacher where there is a predictor."""
    macs = student_macs(model, num_masked) + (teacher_macs(model) if model.learning_loss else 0)
    return 2 * macs * batch_size
