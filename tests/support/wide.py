"""Thirty architectures on which channels are removed, one row each; `tests.support.zoo` says what a row is.

`pytest.mark.parametrize("row", WIDE, ids=str)` runs a test over all of them. Every output's shape must survive.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from tests.support import wide_audio_nets as audio
from tests.support import wide_image_nets as images
from tests.support import wide_nets as nets
from tests.support import wide_sequence_nets as sequences
from tests.support.zoo import Inputs, Row


@torch.no_grad()
def shaken(model: nn.Module) -> nn.Module:
    """`model` with no bias, scale or running statistic at 0 or 1, and weights that carry the input to the output.

    Otherwise an inexact removal could pass by accident.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.mul_(6**0.5)  # He's initial values; torch's shrink a signal by more than half in each layer
        elif "bias" in name.rpartition(".")[2]:
            parameter.normal_(0.0, 0.3)
        else:  # the scale of a norm, of a layer, or the slope of a PReLU
            parameter.uniform_(0.5, 1.5)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0.0, 0.3)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2.0)
    return model


def _row(name: str, net: Callable[[], nn.Module], inputs: Callable[[torch.Generator], Inputs], notes: str = "") -> Row:
    return Row(name, lambda: shaken(net()), inputs, notes)


def _floats(*shapes: tuple[int, ...]) -> Callable[[torch.Generator], Inputs]:
    return lambda generator: (tuple(torch.randn(*shape, generator=generator) for shape in shapes), {})


def _ids(*sizes: tuple[int, int]) -> Callable[[torch.Generator], Inputs]:
    """Two sequences of ids for each (vocabulary, length)."""
    return lambda generator: (
        tuple(torch.randint(vocabulary, (2, length), generator=generator) for vocabulary, length in sizes),
        {},
    )


def _masked_ids(generator: torch.Generator) -> Inputs:
    ids = torch.randint(1, 31, (2, 9), generator=generator)
    mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
    return (), {"input_ids": ids * mask, "attention_mask": mask}


_IMAGES = _floats((2, 3, 16, 16))

WIDE: tuple[Row, ...] = (
    _row("vgg", nets.VGG, _floats((2, 3, 16, 24)), "flatten multiplies a channel by six"),
    _row("resnet", nets.ResNet, _IMAGES, "stages tied by sums, in place"),
    _row("bottleneck", nets.bottleneck, _IMAGES, "wide sums, narrow insides"),
    _row("mobilenet_v2", nets.MobileNetV2, _IMAGES, "depthwise between expand and project"),
    _row("mobilenet_v3", nets.MobileNetV3, _IMAGES, "a gate ties the channels that it multiplies"),
    _row("densenet", nets.DenseNet, _IMAGES, "a feature is read at many offsets"),
    _row("unet", images.unet, _IMAGES, "transposed convolutions, skips at an offset"),
    _row("unet_groupnorm", images.unet_groupnorm, _IMAGES, "norm groups tie a channel to its neighbours"),
    _row("inception", nets.Inception, _IMAGES, "four branches side by side, twice"),
    _row("vit", sequences.vit, _IMAGES, "fused qkv; shapes from the input's width; bare parameters"),
    _row("vit_head_dim", sequences.vit_head_dim, _IMAGES, "heads are independent of the model's width"),
    _row("split_qkv", sequences.Bert, _masked_ids, "keywords only; shapes from three attributes"),
    _row("gpt", sequences.GPT, _ids((29, 9)), "`split` by an attribute; tied head"),
    _row("llama", sequences.Llama, _ids((29, 9)), "grouped queries, rotary halves, gated MLP, own norm"),
    _row("encoder_decoder", sequences.EncoderDecoder, _ids((23, 9), (19, 6)), "torch's own; fast path in evaluation"),
    _row("audio", audio.AudioNet, _floats((2, 1, 256)), "a slope per channel; flatten by `view`"),
    _row("lstm_head", audio.ConvLSTM, _floats((2, 5, 13)), "channels become features of a recurrent net"),
    _row("bigru", audio.BiGRU, _ids((31, 9)), "two directions side by side"),
    _row("mixer", sequences.MlpMixer, _IMAGES, "tokens and channels change places"),
    _row("convnext", nets.ConvNeXt, _IMAGES, "channels first and last; a bare scale per channel"),
    _row("shufflenet", nets.ShuffleNet, _IMAGES, "chunk, cat and an interleaving of halves"),
    _row("grouped", nets.grouped, _IMAGES, "groups of several channels inside a sum"),
    _row("glu", audio.WaveNet, _floats((2, 6, 32)), "halves of one convolution gate each other"),
    _row("pixel_shuffle", images.SuperResolution, _floats((2, 3, 12, 10)), "four channels become one"),
    _row("two_outputs", nets.TwoOutputs, _IMAGES, "dict out"),
    _row(
        "shared_head", nets.Siamese, _floats((2, 3, 16, 16), (2, 3, 16, 16)), "one tower, two calls, cat and difference"
    ),
    _row("mha", sequences.MHAClassifier, _floats((2, 9, 11)), "out_proj is read, not called"),
    _row("instance_norm", images.StyleTransfer, _IMAGES, "norm without statistics; reflection padding"),
    _row("fpn", images.FPN, _IMAGES, "one head on all levels; list out"),
    _row("weight_normed_conv", audio.Vocoder, _floats((2, 8, 24)), "every weight is computed"),
)
