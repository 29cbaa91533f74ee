"""Lists the architectures of `architectures.py`: one of each family, small members, random weights.

Each row says how a network is built and what it is called with; its package is imported only then.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """An architecture: `build()` gives the network, and the arguments and keywords that it is called with."""

    name: str
    package: str
    build: Callable[[], Built]


def _of(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _image(size: int, channels: int = 3, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, size, size)


# Name, edge of the pictures, what makes it small.
_TIMM: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("beit_base_patch16_224", 64, {"img_size": 64, "embed_dim": 96, "depth": 3, "num_heads": 3}),
    ("eca_botnext26ts_256", 64, {"img_size": 64}),
    ("halonet26t", 256, {}),
    ("lambda_resnet26t", 128, {"img_size": 128}),
    ("gernet_s", 64, {}),
    ("repvgg_a0", 64, {}),
    ("mobileone_s0", 64, {}),
    ("cait_xxs24_224", 64, {"img_size": 64, "depth": 3}),
    ("coat_tiny", 64, {"img_size": 64}),
    ("convit_tiny", 64, {"img_size": 64, "depth": 4}),
    ("convmixer_768_32", 56, {}),
    ("convnext_atto", 64, {}),
    ("crossvit_tiny_240", 240, {}),
    ("cs3darknet_focus_s", 64, {}),
    ("davit_tiny", 64, {"depths": (1, 1, 1, 1), "embed_dims": (24, 48, 96, 192), "num_heads": (3, 6, 12, 24)}),
    ("deit_tiny_distilled_patch16_224", 64, {"img_size": 64, "depth": 3}),
    ("densenet121", 64, {}),
    ("dla34", 64, {}),
    ("dpn68", 64, {}),
    ("edgenext_xx_small", 64, {}),
    ("efficientformer_l1", 224, {}),
    ("efficientformerv2_s0", 224, {}),
    ("efficientnet_b0", 64, {}),
    ("efficientvim_m1", 64, {}),
    ("efficientvit_b0", 64, {}),
    ("efficientvit_m0", 224, {}),
    ("eva02_tiny_patch14_224", 56, {"img_size": 56, "depth": 3}),
    ("fasternet_t0", 64, {}),
    ("fastvit_t8", 64, {}),
    ("focalnet_tiny_srf", 64, {}),
    ("gcvit_xxtiny", 224, {}),
    ("ghostnet_050", 64, {}),
    ("hardcorenas_b", 64, {}),
    ("hgnetv2_b0", 64, {}),
    ("hiera_tiny_224", 224, {"embed_dim": 32, "stages": (1, 1, 2, 1)}),
    ("hrnet_w18_small", 64, {}),
    ("iformer_s", 64, {}),
    ("inception_next_atto", 64, {}),
    ("inception_v4", 96, {}),
    ("levit_128s", 224, {}),
    ("lowformer_b0", 64, {}),
    ("test_mambaout", 64, {}),
    ("test_coatnet", 160, {}),
    ("poolformerv2_s12", 64, {}),
    ("caformer_s18", 64, {}),
    ("gmlp_ti16_224", 64, {"img_size": 64}),
    ("resmlp_12_224", 64, {"img_size": 64}),
    ("mobilenetv3_small_050", 64, {}),
    ("mobilevit_xxs", 64, {}),
    ("mvitv2_tiny", 64, {"img_size": 64}),
    ("nest_tiny", 64, {"img_size": 64}),
    ("nextvit_small", 64, {}),
    ("test_nfnet", 64, {}),
    ("pit_ti_224", 64, {"img_size": 64}),
    ("pvt_v2_b0", 64, {}),
    ("rdnet_tiny", 64, {}),
    ("regnetx_002", 64, {}),
    ("regnety_002", 64, {}),
    ("repghostnet_050", 64, {}),
    ("repvit_m1", 64, {}),
    ("res2net50_14w_8s", 64, {}),
    ("resnest14d", 64, {}),
    ("resnet10t", 64, {}),
    ("resnetv2_18", 64, {}),
    ("rexnet_100", 64, {}),
    ("selecsls42", 64, {}),
    ("legacy_seresnet18", 64, {}),
    ("sequencer2d_s", 64, {"img_size": 64, "layers": (1, 1, 2, 1)}),
    ("shvit_s1", 64, {}),
    ("skresnet18", 64, {}),
    ("starnet_s050", 64, {}),
    ("swiftformer_xs", 224, {}),
    ("swin_tiny_patch4_window7_224", 56, {"img_size": 56, "embed_dim": 48, "depths": (2, 2, 2)}),
    ("swinv2_tiny_window8_256", 64, {"img_size": 64, "embed_dim": 48, "depths": (2, 2, 2), "num_heads": (3, 6, 12)}),
    ("tiny_vit_5m_224", 224, {"depths": (1, 1, 2, 1)}),
    ("tnt_s_legacy_patch16_224", 64, {"img_size": 64, "depth": 2}),
    ("tresnet_m", 64, {}),
    ("twins_svt_small", 64, {"img_size": 64, "depths": (1, 1, 2, 1)}),
    ("twins_pcpvt_small", 64, {"img_size": 64, "depths": (1, 1, 2, 1)}),
    ("visformer_tiny", 64, {"img_size": 64}),
    ("vit_tiny_patch16_224", 64, {"img_size": 64, "depth": 4}),
    ("test_vit_relpos", 160, {}),
    ("samvit_base_patch16_224", 64, {"img_size": 64, "embed_dim": 96, "depth": 3, "num_heads": 3}),
    ("vitamin_small_224", 64, {"img_size": 64}),
    ("volo_d1_224", 64, {"img_size": 64}),
    ("ese_vovnet19b_slim_dw", 64, {}),
    ("xception41p", 64, {}),
    ("xcit_nano_12_p8_224", 64, {"img_size": 64, "depth": 3}),
    ("vgg11_bn", 64, {}),
    ("inception_v3", 96, {}),
    ("mixer_s32_224", 64, {"img_size": 64}),
    ("swinv2_cr_tiny_ns_224", 64, {"img_size": 64, "embed_dim": 48, "depths": (2, 2, 2), "num_heads": (3, 6, 12)}),
    ("test_maxvit", 64, {"img_size": 64}),
    ("cpubone_nano", 64, {}),
    ("cspnext_tiny", 64, {}),
    ("lcnetv2_small", 64, {}),
    ("hieradet_small", 64, {}),
)


def _timm(name: str, size: int, options: dict[str, Any]) -> Row:
    def build() -> Built:
        return _of("timm.create_model")(name, num_classes=10, **options), (_image(size),), {}

    return Row(name, "timm", build)


# Path below `torchvision.models`, edge, options.
_TORCHVISION: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("alexnet", 96, {"num_classes": 10}),
    ("squeezenet1_1", 64, {"num_classes": 10}),
    ("googlenet", 96, {"num_classes": 10, "init_weights": False}),
    ("shufflenet_v2_x0_5", 64, {"num_classes": 10}),
    ("mnasnet0_5", 64, {"num_classes": 10}),
    ("segmentation.deeplabv3_mobilenet_v3_large", 64, {"num_classes": 5, "weights_backbone": None}),
    ("segmentation.fcn_resnet50", 64, {"num_classes": 5, "weights_backbone": None}),
    ("segmentation.lraspp_mobilenet_v3_large", 64, {"num_classes": 5, "weights_backbone": None}),
    ("swin_v2_t", 64, {"num_classes": 10}),
)
_DETECTORS = {
    "detection.ssdlite320_mobilenet_v3_large": {},
    "detection.retinanet_resnet50_fpn": {"min_size": 96, "max_size": 128},
    "detection.fcos_resnet50_fpn": {"min_size": 96, "max_size": 128},
    "detection.fasterrcnn_mobilenet_v3_large_320_fpn": {"min_size": 96, "max_size": 128},
}
_VIDEOS = ("video.r3d_18", "video.r2plus1d_18")


def _torchvision() -> Iterator[Row]:
    def pictures(path: str, size: int, options: dict[str, Any]) -> Callable[[], Built]:
        return lambda: (_of(f"torchvision.models.{path}")(weights=None, **options), (_image(size),), {})

    def detector(path: str, options: dict[str, Any]) -> Callable[[], Built]:
        def build() -> Built:
            make = _of(f"torchvision.models.{path}")
            return make(weights=None, weights_backbone=None, num_classes=5, **options), ([*_image(96).abs()],), {}

        return build

    def video(path: str) -> Callable[[], Built]:
        return lambda: (_of(f"torchvision.models.{path}")(num_classes=10), (torch.randn(1, 3, 4, 32, 32),), {})

    def vit() -> Built:
        make = _of("torchvision.models.vision_transformer.VisionTransformer")
        net = make(image_size=64, patch_size=16, num_layers=3, num_heads=4, hidden_dim=128, mlp_dim=256, num_classes=10)
        return net, (_image(64),), {}

    def maxvit() -> Built:
        make = _of("torchvision.models.maxvit.MaxVit")
        sizes = {"stem_channels": 24, "partition_size": 4, "block_channels": [24, 48], "block_layers": [1, 1]}
        return make((64, 64), **sizes, head_dim=12, stochastic_depth_prob=0.0, num_classes=10), (_image(64),), {}

    def mvit() -> Built:
        block, make = (_of(f"torchvision.models.video.mvit.{name}") for name in ("MSBlockConfig", "MViT"))
        strides = ([1, 1, 1], [1, 2, 2], [1, 1, 1])
        widths = ((1, 48, 48), (2, 48, 96), (2, 96, 96))
        blocks = [block(*width, [3] * 3, [3] * 3, q, [1, 2, 2]) for width, q in zip(widths, strides, strict=True)]
        net = make((32, 32), 4, blocks, True, True, True, True, num_classes=10)
        return net, (torch.randn(1, 3, 4, 32, 32),), {}

    for path, size, options in _TORCHVISION:
        yield Row(path, "torchvision", pictures(path, size, options))
    for path, options in _DETECTORS.items():
        yield Row(path, "torchvision", detector(path, options))
    for path in _VIDEOS:
        yield Row(path, "torchvision", video(path))
    for build in (vit, maxvit, mvit):
        yield Row(build.__name__, "torchvision", build)


_TEXT = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 128, "max_position_embeddings": 64}  # fmt: skip
_DECODER = {**_TEXT, "num_key_value_heads": 2, "pad_token_id": 0}
_TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", _TEXT),
    "albert": ("AlbertForSequenceClassification", {**_TEXT, "embedding_size": 32}),
    "deberta": ("DebertaV2ForSequenceClassification", {**_TEXT, "relative_attention": True, "pos_att_type": ["c2p"]}),
    "distilbert": ("DistilBertForSequenceClassification",
                   {"vocab_size": 99, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128}),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 99, "n_embd": 64, "n_layer": 2, "n_head": 4}),
    "gpt_neox": ("GPTNeoXForCausalLM", _TEXT),
    "bloom": ("BloomForCausalLM", {"vocab_size": 99, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "llama": ("LlamaForCausalLM", _DECODER),
    "qwen3": ("Qwen3ForCausalLM", {**_DECODER, "head_dim": 16}),
    "gemma": ("GemmaForCausalLM", {**_DECODER, "head_dim": 16}),
    "phi": ("PhiForCausalLM", _DECODER),
    "mamba": ("MambaForCausalLM", {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}),
    "fnet": ("FNetForSequenceClassification", _TEXT),
    "electra": ("ElectraForTokenClassification", {**_TEXT, "embedding_size": 32}),
    "mpnet": ("MPNetForSequenceClassification", _TEXT),
    "xlnet": ("XLNetForSequenceClassification",
              {"vocab_size": 99, "d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 128}),
    "convbert": ("ConvBertForSequenceClassification", {**_TEXT, "embedding_size": 64}),
    "opt": ("OPTForCausalLM", {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                               "ffn_dim": 128, "max_position_embeddings": 64, "word_embed_proj_dim": 64}),
    "mixtral": ("MixtralForCausalLM", {**_DECODER, "num_local_experts": 4}),
    "falcon": ("FalconForCausalLM", {**_TEXT, "new_decoder_architecture": False, "multi_query": True}),
    "bart": ("BartForConditionalGeneration",
             {"vocab_size": 99, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
              "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "eos_token_id": 98,
              "pad_token_id": 0, "max_position_embeddings": 64}),
    "modernbert": ("ModernBertForSequenceClassification", {**_TEXT, "pad_token_id": 0}),
}  # fmt: skip


def _transformers() -> Iterator[Row]:
    def text(model: str, options: dict[str, Any]) -> Callable[[], Built]:
        def build() -> Built:
            kind = _of(f"transformers.{model}")
            return kind(kind.config_class(**options)), (), {"input_ids": torch.randint(1, 99, (2, 12))}

        return build

    def t5() -> Built:
        config = _of("transformers.T5Config")(vocab_size=99, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
        ids = torch.randint(1, 99, (2, 12))
        return _of("transformers.T5ForConditionalGeneration")(config), (), {"input_ids": ids, "decoder_input_ids": ids}

    def whisper() -> Built:
        config = _of("transformers.WhisperConfig")(
            vocab_size=99, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, max_source_positions=32,
            num_mel_bins=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        )  # fmt: skip
        inputs = {"input_features": torch.randn(2, 16, 64), "decoder_input_ids": torch.randint(3, 99, (2, 6))}
        return _of("transformers.WhisperForConditionalGeneration")(config), (), inputs

    def wav2vec2() -> Built:
        config = _of("transformers.Wav2Vec2Config")(
            **{key: _TEXT[key] for key in _TEXT if key != "max_position_embeddings"}, conv_dim=(32, 32),
            conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
            num_feat_extract_layers=2,
            apply_spec_augment=False,
        )  # fmt: skip
        return _of("transformers.Wav2Vec2ForCTC")(config), (torch.randn(2, 800),), {}

    def hubert() -> Built:
        config = _of("transformers.HubertConfig")(
            **{key: _TEXT[key] for key in _TEXT if key != "max_position_embeddings"}, conv_dim=(32, 32),
            conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
            num_feat_extract_layers=2, apply_spec_augment=False,
        )  # fmt: skip
        return _of("transformers.HubertForCTC")(config), (torch.randn(2, 800),), {}

    def vit() -> Built:
        sizes = {key: _TEXT[key] for key in _TEXT if key not in ("max_position_embeddings", "vocab_size")}
        config = _of("transformers.ViTConfig")(**sizes, image_size=32, patch_size=8)
        return _of("transformers.ViTForImageClassification")(config), (_image(32),), {}

    def swin() -> Built:
        config = _of("transformers.SwinConfig")(
            image_size=32, patch_size=2, embed_dim=32, depths=(2, 2), num_heads=(2, 4), window_size=4
        )
        return _of("transformers.SwinForImageClassification")(config), (_image(32),), {}

    def clip() -> Built:
        text = {**_TEXT, "eos_token_id": 98, "pad_token_id": 0}
        vision = {**{key: _TEXT[key] for key in text.keys() & _TEXT.keys() if key[:3] not in ("max", "voc")},
                  "image_size": 32, "patch_size": 8}  # fmt: skip
        config = _of("transformers.CLIPConfig")(text_config=text, vision_config=vision, projection_dim=32)
        inputs = {"input_ids": torch.randint(1, 98, (2, 12)), "pixel_values": _image(32)}
        return _of("transformers.CLIPModel")(config), (), inputs

    def segformer() -> Built:
        return (
            _of("transformers.SegformerForSemanticSegmentation")(_of("transformers.SegformerConfig")()),
            (_image(64),),
            {},
        )

    for name, (model, options) in _TRANSFORMERS.items():
        yield Row(name, "transformers", text(model, options))
    for build in (t5, whisper, wav2vec2, segformer, hubert, vit, swin, clip):
        yield Row(build.__name__, "transformers", build)


# Name of a model of pytorchcv, edge of the pictures.
_PYTORCHCV = {
    "bninception": 224, "cbam_resnet18": 224, "diracnet18v2": 224, "fractalnet_cifar10": 32, "igcv3_wd4": 224,
    "menet108_8x1_g3": 224, "octresnet10_ad2": 224, "peleenet": 224, "proxylessnas_cpu": 224,
    "pyramidnet110_a48_cifar10": 32, "ror3_56_cifar10": 32, "sqnxt23_w1": 224, "shufflenet_g3_wd4": 224,
    "wrn16_10_cifar10": 32, "zfnet": 224, "lednet_cityscapes": 64, "espcnet_cityscapes": 64,
}  # fmt: skip


def _pytorchcv() -> Iterator[Row]:
    def build(name: str, size: int) -> Callable[[], Built]:
        return lambda: (_of("pytorchcv.model_provider.get_model")(name, pretrained=False), (_image(size),), {})

    for name, size in _PYTORCHCV.items():
        yield Row(name, "pytorchcv", build(name, size))


def _others() -> Iterator[Row]:
    def unet() -> Built:
        return _of("segmentation_models_pytorch.Unet")("resnet18", encoder_weights=None, classes=3), (_image(64),), {}

    def monai_unet() -> Built:
        net = _of("monai.networks.nets.UNet")(3, 1, 2, channels=(16, 32, 64), strides=(2, 2), num_res_units=2)
        return net, (torch.randn(1, 1, 16, 16, 16),), {}

    def unetr() -> Built:
        net = _of("monai.networks.nets.UNETR")(
            1, 2, (32, 32, 32), feature_size=16, hidden_size=96, mlp_dim=192, num_heads=4
        )
        return net, (torch.randn(1, 1, 32, 32, 32),), {}

    def yolo(config: str) -> Callable[[], Built]:
        return lambda: (_of("ultralytics.nn.tasks.DetectionModel")(config, verbose=False), (_image(64),), {})

    def diffusion() -> Built:
        net = _of("denoising_diffusion_pytorch.Unet")(32, dim_mults=(1, 2), flash_attn=False)
        return net, (_image(16), torch.tensor([3, 7])), {}

    def dit() -> Built:
        net = _of("diffusers.DiTTransformer2DModel")(4, 16, 4, num_layers=2, sample_size=8, norm_num_groups=4)
        steps, classes = torch.tensor([3, 7]), torch.tensor([1, 2])
        return net, (), {"hidden_states": _image(8, 4), "timestep": steps, "class_labels": classes}

    def x_decoder() -> Built:
        layers = _of("x_transformers.Decoder")(dim=64, depth=2, heads=4, attn_dim_head=16, rotary_pos_emb=True)
        net = _of("x_transformers.TransformerWrapper")(num_tokens=99, max_seq_len=32, attn_layers=layers)
        return net, (torch.randint(99, (2, 12)),), {}

    def plain_vit() -> Built:
        net = _of("vit_pytorch.ViT")(
            image_size=32, patch_size=8, num_classes=10, dim=64, depth=2, heads=4, mlp_dim=128, dim_head=16
        )
        return net, (_image(32),), {}

    def cct() -> Built:
        make = _of("vit_pytorch.cct.CCT")
        return make(img_size=32, embedding_dim=64, num_layers=2, num_heads=4, num_classes=10), (_image(32),), {}

    yield Row("unet", "segmentation_models_pytorch", unet)
    yield Row("unet_3d", "monai", monai_unet)
    yield Row("unetr", "monai", unetr)
    yield Row("yolov5n", "ultralytics", yolo("yolov5n.yaml"))
    yield Row("yolov8n", "ultralytics", yolo("yolov8n.yaml"))
    yield Row("yolo11n", "ultralytics", yolo("yolo11n.yaml"))
    yield Row("diffusion_unet", "denoising_diffusion_pytorch", diffusion)
    yield Row("dit", "diffusers", dit)
    yield Row("decoder", "x_transformers", x_decoder)
    yield Row("vit", "vit_pytorch", plain_vit)
    yield Row("cct", "vit_pytorch", cct)


def _tests() -> Iterator[Row]:
    def build(row: Any) -> Callable[[], Built]:
        return lambda: (row.build(), *row.inputs())

    for row in _of("tests.support.wide.WIDE"):
        yield Row(row.name, "tests", build(row))


def rows() -> Iterator[Row]:
    """All architectures, by package."""
    yield from _tests()
    yield from (_timm(*row) for row in _TIMM)
    yield from _torchvision()
    yield from _transformers()
    yield from _pytorchcv()
    yield from _others()
