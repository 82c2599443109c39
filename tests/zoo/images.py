"""Image pipelines: every text-to-image family of diffusers that can be made a few thousand numbers small without a model hub."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanImage,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    AutoencoderKLWan,
    BriaFiboPipeline,
    BriaPipeline,
    BriaTransformer2DModel,
    ChromaPipeline,
    ChromaTransformer2DModel,
    CMStochasticIterativeScheduler,
    CogVideoXDDIMScheduler,
    CogView3PlusPipeline,
    CogView3PlusTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    ConsistencyModelPipeline,
    DDPMScheduler,
    DDPMWuerstchenScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    ErnieImagePipeline,
    ErnieImageTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    GlmImagePipeline,
    GlmImageTransformer2DModel,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
    IFPipeline,
    JoyImageEditPipeline,
    JoyImageEditTransformer3DModel,
    Kandinsky3Pipeline,
    Kandinsky3UNet,
    Kandinsky5T2IPipeline,
    Kandinsky5Transformer3DModel,
    KandinskyV22Pipeline,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    LuminaNextDiT2DModel,
    LuminaPipeline,
    NucleusMoEImagePipeline,
    NucleusMoEImageTransformer2DModel,
    OmniGenPipeline,
    OmniGenTransformer2DModel,
    OvisImagePipeline,
    OvisImageTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SchedulerMixin,
    SCMScheduler,
    SD3Transformer2DModel,
    StableCascadeDecoderPipeline,
    StableCascadePriorPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    UniPCMultistepScheduler,
    VQModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.guiders import AdaptiveProjectedMixGuidance
from diffusers.models.transformers.transformer_bria_fibo import BriaFiboTransformer2DModel
from diffusers.models.unets import StableCascadeUNet
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel
from torch import Tensor
from transformers import (
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)
from zoo.base import Exhibit, meaning, meanings, quiet, shaken
from zoo.basics import SD_TABLE, clip_text, clip_tokenizer, vae

WIDTH = 32
"""Of every embedding that `inputs` gives."""
TOKENS = 8
"""The longest text."""
SIZE = {"height": 16, "width": 16}
SIZE8 = {"height": 64, "width": 64}
"""With `vae8`."""
BLIND = {"text_encoder": None, "tokenizer": None}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
BETAS = {key: value for key, value in SD_TABLE.items() if key != "clip_sample"}
FLOW = FlowMatchEulerDiscreteScheduler
DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}


# What the texts become


def t5_tokenizer() -> T5Tokenizer:
    """Single letters again."""
    letters = [(chr(c), -3.0) for c in range(ord("!"), ord("~") + 1)]
    return T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters], extra_ids=0, model_max_length=512)


def t5_text(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """A random T5 encoder."""
    config = T5Config(vocab_size=len(tokenizer), d_model=WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=4)
    return shaken(T5EncoderModel(config), 3)


def clip_pooled(tokenizer: CLIPTokenizer, width: int = WIDTH) -> CLIPTextModelWithProjection:
    """A random CLIP text encoder that also sums its text up in one vector."""
    return shaken(CLIPTextModelWithProjection(clip_text(tokenizer, width, projection_dim=width).config), 4)


def count(prompt: str) -> int:
    """The number of its tokens, from 1 (of nothing) to `TOKENS`."""
    return min(TOKENS, 1 + len(prompt) // 3)


def masks(prompts: Sequence[str]) -> Tensor:
    """Which of the `TOKENS` are text."""
    return torch.stack([torch.arange(TOKENS) < count(prompt) for prompt in prompts]).long()


def told(prompts: Sequence[str], mask: str = "", pooled: bool = False, shape: Sequence[int] = (TOKENS, WIDTH),
         kind: torch.dtype = torch.long) -> dict[str, Any]:
    """Embeddings of the prompts and of as many empty ones, with the masks that go by the name `mask`."""
    nothing = [""] * len(prompts)
    words: dict[str, Any] = {"prompt_embeds": meanings(prompts, *shape), "negative_prompt_embeds": meanings(nothing, *shape)}
    if mask:
        words |= {mask: masks(prompts).to(kind), f"negative_{mask}": masks(nothing).to(kind)}
    if pooled:
        words |= {"pooled_prompt_embeds": meanings(prompts, WIDTH), "negative_pooled_prompt_embeds": meanings(nothing, WIDTH)}
    return words


def listed(prompts: Sequence[str]) -> list[Tensor]:
    """One embedding each, as long as its prompt."""
    return [meaning(prompt, count(prompt), WIDTH) for prompt in prompts]


def _plain(prompts: Sequence[str]) -> dict[str, Any]:
    return told(prompts) | SIZE


def _masked(prompts: Sequence[str]) -> dict[str, Any]:
    return told(prompts, "prompt_attention_mask") | SIZE


def _masked64(prompts: Sequence[str]) -> dict[str, Any]:
    return told(prompts, "prompt_attention_mask") | SIZE8


def _pooled(prompts: Sequence[str]) -> dict[str, Any]:
    return told(prompts, pooled=True) | SIZE


# What the latents become


def vae8(channels: int = 4, **options: Any) -> AutoencoderKL:
    """A random VAE that halves each side three times, for the pipelines that know no other factor."""
    return vae(channels, block_out_channels=(8,) * 4, layers_per_block=1, down_block_types=("DownEncoderBlock2D",) * 4,
               up_block_types=("UpDecoderBlock2D",) * 4, sample_size=64, **options)


def vae_dc() -> AutoencoderDC:
    """A random deep-compression autoencoder that quarters each side."""
    blocks = ("ResBlock", "ResBlock", "EfficientViTBlock")
    layers, scales = (1,) * 3, ((), (), (5,))
    return shaken(AutoencoderDC(latent_channels=4, attention_head_dim=2, encoder_block_types=blocks, decoder_block_types=blocks,
                                encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8), encoder_layers_per_block=layers,
                                decoder_layers_per_block=layers, encoder_qkv_multiscales=scales, decoder_qkv_multiscales=scales,
                                downsample_block_type="conv", upsample_block_type="interpolate", scaling_factor=0.41407), 2)


def vae_qwen() -> AutoencoderKLQwenImage:
    """A random causal video VAE that halves each side once."""
    return shaken(AutoencoderKLQwenImage(base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
                                         latents_mean=[0.1] * 4, latents_std=[1.5] * 4), 2)


def vae_wan(**options: Any) -> AutoencoderKLWan:
    """A random causal video VAE that halves each side three times."""
    return shaken(AutoencoderKLWan(base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
                                   latents_mean=[0.1] * 4, latents_std=[1.5] * 4, **options), 2)


def vae_flux2() -> AutoencoderKLFlux2:
    """A random VAE that halves each side once and normalises its latents by patches."""
    coder = AutoencoderKLFlux2(block_out_channels=(16, 16), latent_channels=4, norm_num_groups=4, sample_size=16, layers_per_block=1,
                               down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    coder.bn.running_mean.copy_(meaning("mean", 16))
    coder.bn.running_var.copy_(meaning("variance", 16).exp())
    return shaken(coder, 2)


def movq() -> VQModel:
    """A random VQ autoencoder that halves each side once."""
    return shaken(VQModel(block_out_channels=(32, 32), latent_channels=4, num_vq_embeddings=16, vq_embed_dim=4,
                          norm_type="spatial", down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
                          up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D")), 2)


# The pipelines


def sdxl(scheduler: SchedulerMixin | None = None) -> StableDiffusionXLPipeline:
    tokenizer = clip_tokenizer()
    network = UNet2DConditionModel(sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=64,
                                   attention_head_dim=(2, 4), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                                   up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2),
                                   use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
                                   projection_class_embeddings_input_dim=6 * 8 + 32)
    return quiet(StableDiffusionXLPipeline(
        vae(), clip_text(tokenizer), clip_pooled(tokenizer), tokenizer, clip_tokenizer(), shaken(network),
        scheduler or EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"), add_watermarker=False))


def sd3() -> StableDiffusion3Pipeline:
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    network = SD3Transformer2DModel(sample_size=8, patch_size=2, in_channels=4, num_layers=2, **HEADS, joint_attention_dim=WIDTH,
                                    caption_projection_dim=32, pooled_projection_dim=32, out_channels=4, pos_embed_max_size=16,
                                    dual_attention_layers=(0,), qk_norm="rms_norm")
    short = clip_pooled(clip, 16)
    return quiet(StableDiffusion3Pipeline(
        shaken(network), FLOW(shift=3.0), vae(shift_factor=0.06), short, clip, clip_pooled(clip, 16), clip, t5_text(t5), t5))


def _sd3_inputs(prompts: Sequence[str]) -> dict[str, Any]:
    return {"prompt": list(prompts), "max_sequence_length": 24} | SIZE


def pixart(cls: type[DiffusionPipeline] = PixArtAlphaPipeline) -> DiffusionPipeline:
    alpha, tokenizer = cls is PixArtAlphaPipeline, t5_tokenizer()
    network = PixArtTransformer2DModel(num_attention_heads=3, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2,
                                       cross_attention_dim=48, sample_size=128 if alpha else 8, caption_channels=WIDTH)
    return quiet(cls(tokenizer, t5_text(tokenizer), vae(), shaken(network), DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02)))


def _pixart_inputs(prompts: Sequence[str]) -> dict[str, Any]:
    return {"prompt": list(prompts), "max_sequence_length": 24, "use_resolution_binning": False, "clean_caption": False} | SIZE


def hunyuandit() -> HunyuanDiTPipeline:
    network = HunyuanDiT2DModel(**HEADS, hidden_size=32, in_channels=4, patch_size=2, sample_size=8, num_layers=4,
                                cross_attention_dim=WIDTH, cross_attention_dim_t5=WIDTH, pooled_projection_dim=16,
                                text_len=TOKENS, text_len_t5=TOKENS)
    scheduler = DDPMScheduler(**SD_TABLE | {"beta_end": 0.018}, prediction_type="v_prediction", steps_offset=1, timestep_spacing="leading")
    return quiet(HunyuanDiTPipeline(vae8(), None, None, shaken(network), scheduler, None, None, requires_safety_checker=False))


def _hunyuandit_inputs(prompts: Sequence[str]) -> dict[str, Any]:
    clip, t5 = told(prompts, "prompt_attention_mask"), told([f"{prompt} " for prompt in prompts], "prompt_attention_mask")
    return clip | {f"{key}_2": value for key, value in t5.items()} | SIZE8 | {"use_resolution_binning": False}


def sana() -> SanaPipeline:
    network = SanaTransformer2DModel(in_channels=4, out_channels=4, **HEADS, num_layers=2, num_cross_attention_heads=2,
                                     cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=WIDTH, sample_size=8)
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return quiet(SanaPipeline(**BLIND, vae=vae_dc(), transformer=shaken(network), scheduler=scheduler))


def _sana_inputs(prompts: Sequence[str]) -> dict[str, Any]:
    return _masked(prompts) | {"negative_prompt": None, "height": 32, "width": 32, "use_resolution_binning": False}


def lumina2() -> Lumina2Pipeline:
    network = Lumina2Transformer2DModel(sample_size=8, in_channels=4, hidden_size=32, num_layers=2, num_refiner_layers=1,
                                        num_attention_heads=2, num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 4, 8),
                                        axes_lens=(32, 16, 16), cap_feat_dim=WIDTH)
    return quiet(Lumina2Pipeline(shaken(network), FLOW(shift=6.0), vae8(shift_factor=0.1), **BLIND))


def lumina() -> LuminaPipeline:
    network = LuminaNextDiT2DModel(sample_size=8, hidden_size=32, num_layers=2, num_attention_heads=2, num_kv_heads=1, multiple_of=16,
                                   cross_attention_dim=WIDTH)
    return quiet(LuminaPipeline(shaken(network), FLOW(), vae8(), **BLIND))


def auraflow() -> AuraFlowPipeline:
    network = AuraFlowTransformer2DModel(sample_size=8, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, **HEADS,
                                         joint_attention_dim=WIDTH, caption_projection_dim=32, pos_embed_max_size=256)
    return quiet(AuraFlowPipeline(**BLIND, vae=vae(), transformer=shaken(network), scheduler=FLOW(shift=1.73)))


def chroma() -> ChromaPipeline:
    network = ChromaTransformer2DModel(in_channels=16, num_layers=1, num_single_layers=1, **HEADS, joint_attention_dim=WIDTH,
                                       axes_dims_rope=(4, 4, 8), approximator_num_channels=16, approximator_hidden_dim=16,
                                       approximator_layers=1)
    return quiet(ChromaPipeline(FLOW(**DYNAMIC), vae(shift_factor=0.1), None, None, shaken(network)))


def _chroma_inputs(prompts: Sequence[str]) -> dict[str, Any]:
    return told(prompts, "prompt_attention_mask", kind=torch.float32) | SIZE  # floats, which attention adds: so does its own text encoding


def cogview4() -> CogView4Pipeline:
    network = CogView4Transformer2DModel(in_channels=4, out_channels=4, num_layers=2, **HEADS, text_embed_dim=WIDTH, time_embed_dim=32,
                                         condition_dim=8, pos_embed_max_size=16, sample_size=8, rope_axes_dim=(16, 16))
    scheduler = FLOW(use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear")
    return quiet(CogView4Pipeline(**BLIND, vae=vae(), transformer=shaken(network), scheduler=scheduler))


def flux(guided: bool = True) -> FluxPipeline:
    network = FluxTransformer2DModel(in_channels=16, num_layers=1, num_single_layers=1, **HEADS, joint_attention_dim=WIDTH,
                                     pooled_projection_dim=WIDTH, guidance_embeds=guided, axes_dims_rope=(4, 4, 8))
    scheduler = FLOW(shift=3.0, **DYNAMIC) if guided else FLOW(shift=1.0)
    return quiet(FluxPipeline(scheduler, vae(shift_factor=0.1), None, None, None, None, shaken(network)))


def flux2() -> Flux2Pipeline:
    network = Flux2Transformer2DModel(in_channels=16, num_layers=1, num_single_layers=1, **HEADS, joint_attention_dim=WIDTH,
                                      timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4))
    return quiet(Flux2Pipeline(FLOW(shift=3.0, **DYNAMIC), vae_flux2(), None, None, shaken(network)))


def _flux2_inputs(prompts: Sequence[str]) -> dict[str, Any]:
    return {"prompt_embeds": meanings(prompts, TOKENS, WIDTH)} | SIZE


def qwen_image() -> QwenImagePipeline:
    network = QwenImageTransformer2DModel(in_channels=16, out_channels=4, num_layers=2, **HEADS, joint_attention_dim=WIDTH,
                                          axes_dims_rope=(4, 4, 8))
    scheduler = FLOW(**DYNAMIC | {"max_shift": 0.9, "max_image_seq_len": 8192}, shift_terminal=0.02)
    return quiet(QwenImagePipeline(scheduler, vae_qwen(), None, None, shaken(network)))


def _qwen_inputs(prompts: Sequence[str]) -> dict[str, Any]:
    return told(prompts, "prompt_embeds_mask") | SIZE


def z_image() -> ZImagePipeline:
    network = ZImageTransformer2DModel(in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=WIDTH,
                                       axes_dims=[4, 4, 8], axes_lens=[128, 32, 32])
    return quiet(ZImagePipeline(FLOW(shift=3.0), vae(shift_factor=0.1), None, None, shaken(network)))


def _z_image_inputs(prompts: Sequence[str]) -> dict[str, Any]:
    return {"prompt_embeds": listed(prompts), "negative_prompt_embeds": listed([""] * len(prompts))} | SIZE


def kandinsky3() -> Kandinsky3Pipeline:
    network = Kandinsky3UNet(time_embedding_dim=16, groups=4, attention_head_dim=8, layers_per_block=2, block_out_channels=(16, 16, 16, 16),
                             cross_attention_dim=16, encoder_hid_dim=WIDTH)
    return quiet(Kandinsky3Pipeline(None, None, shaken(network), DDPMScheduler(beta_schedule="squaredcos_cap_v2"), movq()))


def _kandinsky3_inputs(prompts: Sequence[str]) -> dict[str, Any]:
    return told(prompts, "attention_mask") | SIZE8


def cogview3() -> CogView3PlusPipeline:
    network = CogView3PlusTransformer2DModel(in_channels=4, out_channels=4, num_layers=2, **HEADS, text_embed_dim=WIDTH, time_embed_dim=32,
                                             condition_dim=8, pos_embed_max_size=16, sample_size=8)
    scheduler = CogVideoXDDIMScheduler(**SD_TABLE, prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=4.0,
                                       timestep_spacing="trailing")
    return quiet(CogView3PlusPipeline(**BLIND, vae=vae(), transformer=shaken(network), scheduler=scheduler))


def hidream() -> HiDreamImagePipeline:
    network = HiDreamImageTransformer2DModel(patch_size=2, in_channels=4, num_layers=1, num_single_layers=1, **HEADS, text_emb_dim=WIDTH,
                                             caption_channels=[WIDTH, WIDTH], axes_dims_rope=(4, 6, 6), max_resolution=(16, 16),
                                             llama_layers=[0, 1])
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipeline = HiDreamImagePipeline(scheduler, vae(shift_factor=0.1), *[None] * 8, shaken(network))
    pipeline.default_sample_size = 8  # whatever size is asked for, it paints that many pixels
    return quiet(pipeline)


def _hidream_inputs(prompts: Sequence[str]) -> dict[str, Any]:
    words, layers = told(prompts, pooled=True), told(prompts, shape=(2, TOKENS, WIDTH))
    for sign in ("", "negative_"):
        words[f"{sign}prompt_embeds_t5"] = words.pop(f"{sign}prompt_embeds")
        words[f"{sign}prompt_embeds_llama3"] = layers[f"{sign}prompt_embeds"].transpose(0, 1)
    return words | SIZE


def bria() -> BriaPipeline:
    network = BriaTransformer2DModel(in_channels=16, num_layers=1, num_single_layers=1, **HEADS, joint_attention_dim=WIDTH,
                                     axes_dims_rope=[4, 4, 8])
    return quiet(BriaPipeline(shaken(network), FLOW(**DYNAMIC), vae(shift_factor=0.0), None, None))


def bria_fibo() -> BriaFiboPipeline:
    network = BriaFiboTransformer2DModel(in_channels=4, num_layers=1, num_single_layers=1, **HEADS, joint_attention_dim=32,
                                         axes_dims_rope=[4, 4, 8], text_encoder_dim=16)
    config = SmolLM3Config(vocab_size=128001, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                           num_key_value_heads=1, pad_token_id=0, eos_token_id=None)  # the pipeline writes token 128000 for no text
    return quiet(BriaFiboPipeline(shaken(network), FLOW(**DYNAMIC), vae_wan(in_channels=12, out_channels=12, patch_size=2),
                                  shaken(SmolLM3ForCausalLM(config), 3), t5_tokenizer()))


def hunyuan_image(distilled: bool = False) -> HunyuanImagePipeline:
    network = HunyuanImageTransformer2DModel(in_channels=4, out_channels=4, **HEADS, num_layers=1, num_single_layers=1,
                                             num_refiner_layers=1, text_embed_dim=WIDTH, text_embed_2_dim=WIDTH, rope_axes_dim=(8, 8),
                                             guidance_embeds=distilled, use_meanflow=distilled)
    decoder = AutoencoderKLHunyuanImage(in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 32), layers_per_block=1,
                                        spatial_compression_ratio=2, sample_size=16, scaling_factor=0.75)
    return quiet(HunyuanImagePipeline(
        FLOW(shift=4.0 if distilled else 5.0), shaken(decoder, 2), None, None, None, None, shaken(network),
        guider=AdaptiveProjectedMixGuidance(enabled=not distilled),
        ocr_guider=AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=38, enabled=not distilled)))


def _hunyuan_image_inputs(prompts: Sequence[str]) -> dict[str, Any]:
    words, glyphs = told(prompts, "prompt_embeds_mask"), told([f"{prompt} " for prompt in prompts], "prompt_embeds_mask")
    return words | {f"{key}_2": value for key, value in glyphs.items()} | SIZE


def longcat_image() -> LongCatImagePipeline:
    network = LongCatImageTransformer2DModel(in_channels=64, num_layers=1, num_single_layers=1, **HEADS, joint_attention_dim=WIDTH,
                                             pooled_projection_dim=WIDTH, axes_dims_rope=[4, 4, 8])
    tokenizer = t5_tokenizer()
    text = {"vocab_size": len(tokenizer), "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "bos_token_id": None, "eos_token_id": None,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    pipeline = LongCatImagePipeline(FLOW(**DYNAMIC), vae(16, shift_factor=0.1), shaken(encoder, 3), tokenizer, None, shaken(network))
    pipeline.tokenizer_max_length = 24
    return quiet(pipeline)


def _longcat_inputs(prompts: Sequence[str]) -> dict[str, Any]:
    return {"prompt": list(prompts), "negative_prompt": [""] * len(prompts), "enable_prompt_rewrite": False} | SIZE


def ovis_image() -> OvisImagePipeline:
    network = OvisImageTransformer2DModel(in_channels=16, out_channels=16, num_layers=1, num_single_layers=1, **HEADS,
                                          joint_attention_dim=WIDTH, axes_dims_rope=(4, 4, 8))
    return quiet(OvisImagePipeline(FLOW(shift=3.0, **DYNAMIC), vae(shift_factor=0.1), None, None, shaken(network)))


def glm_image() -> GlmImagePipeline:
    network = GlmImageTransformer2DModel(in_channels=4, out_channels=4, num_layers=2, **HEADS, text_embed_dim=WIDTH, time_embed_dim=32,
                                         condition_dim=8, prior_vq_quantizer_codebook_size=64)
    scheduler = FLOW(use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear")
    decoder = vae(latents_mean=[0.1] * 4, latents_std=[1.5] * 4)
    return quiet(GlmImagePipeline(None, None, None, None, decoder, shaken(network), scheduler))


def _glm_inputs(prompts: Sequence[str]) -> dict[str, Any]:
    return told(prompts) | {"prior_token_ids": meanings(prompts, 16).mul(20).long().abs().clamp(max=63)} | SIZE


def nucleusmoe_image() -> NucleusMoEImagePipeline:
    network = NucleusMoEImageTransformer2DModel(in_channels=16, out_channels=4, num_layers=2, **HEADS, joint_attention_dim=WIDTH,
                                                axes_dims_rope=(4, 4, 8), mlp_ratio=8.0,
                                                dense_moe_strategy="leave_first_block_dense", num_experts=4,
                                                moe_intermediate_dim=16, capacity_factors=2.0)
    return quiet(NucleusMoEImagePipeline(shaken(network), FLOW(**DYNAMIC), vae_qwen(), None, None))


def ernie_image() -> ErnieImagePipeline:
    network = ErnieImageTransformer2DModel(hidden_size=48, num_attention_heads=3, num_layers=2, ffn_hidden_size=32, in_channels=16,
                                           out_channels=16, text_in_dim=WIDTH, rope_axes_dim=(4, 6, 6))
    return quiet(ErnieImagePipeline(shaken(network), vae_flux2(), None, None, FLOW(shift=3.0)))


def kandinsky5() -> Kandinsky5T2IPipeline:
    network = Kandinsky5Transformer3DModel(in_text_dim=WIDTH, in_text_dim2=WIDTH, time_dim=32, model_dim=32, ff_dim=32, num_text_blocks=1,
                                           num_visual_blocks=2, axes_dims=(4, 6, 6))
    pipeline = Kandinsky5T2IPipeline(shaken(network), vae8(), None, None, None, None, FLOW(shift=3.0))
    pipeline.resolutions = [(64, 64), (96, 64)]  # any other size becomes the nearest of these
    return quiet(pipeline)


def _kandinsky5_inputs(prompts: Sequence[str]) -> dict[str, Any]:
    words: dict[str, Any] = dict(SIZE8)
    for sign, texts in (("", prompts), ("negative_", [""] * len(prompts))):
        words |= {f"{sign}prompt_embeds_qwen": meanings(texts, TOKENS, WIDTH), f"{sign}prompt_embeds_clip": meanings(texts, WIDTH),
                  f"{sign}prompt_cu_seqlens": TOKENS * torch.arange(len(texts) + 1)}
    return words


def consistency_models() -> ConsistencyModelPipeline:
    network = UNet2DModel(sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
                          down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"), num_class_embeds=10, downsample_type="resnet",
                          up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"), resnet_time_scale_shift="scale_shift",
                          upsample_type="resnet", attention_head_dim=4)
    return quiet(ConsistencyModelPipeline(shaken(network), CMStochasticIterativeScheduler()))


def latent_consistency() -> LatentConsistencyModelPipeline:
    tokenizer = clip_tokenizer()
    network = UNet2DConditionModel(sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=32,
                                   attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                                   up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), time_cond_proj_dim=16)
    return quiet(LatentConsistencyModelPipeline(
        vae(), clip_text(tokenizer), tokenizer, shaken(network), LCMScheduler(**SD_TABLE, set_alpha_to_one=True), None, None,
        requires_safety_checker=False))


def stable_cascade_prior() -> StableCascadePriorPipeline:
    tokenizer = clip_tokenizer()
    network = StableCascadeUNet(in_channels=4, out_channels=4, timestep_ratio_embedding_dim=16, conditioning_dim=32,
                                block_out_channels=(32, 32), num_attention_heads=(2, 2), down_num_layers_per_block=(1, 1),
                                up_num_layers_per_block=(1, 1), clip_image_in_channels=16, clip_text_in_channels=WIDTH,
                                clip_text_pooled_in_channels=WIDTH, switch_level=(False,))
    return quiet(StableCascadePriorPipeline(tokenizer, clip_pooled(tokenizer), shaken(network), DDPMWuerstchenScheduler(),
                                            resolution_multiple=2.0))


def stable_cascade() -> StableCascadeDecoderPipeline:
    tokenizer = clip_tokenizer()
    plain = ("SDCascadeResBlock", "SDCascadeTimestepBlock")
    network = StableCascadeUNet(in_channels=4, out_channels=4, timestep_ratio_embedding_dim=16, patch_size=2, conditioning_dim=32,
                                block_out_channels=(16, 32), num_attention_heads=(0, 2), down_num_layers_per_block=(1, 1),
                                up_num_layers_per_block=(1, 1), block_types_per_layer=(plain, (*plain, "SDCascadeAttnBlock")),
                                effnet_in_channels=4, clip_text_pooled_in_channels=WIDTH, timestep_conditioning_type=("sca",))
    decoder = PaellaVQModel(embed_dim=8, num_vq_embeddings=16, bottleneck_blocks=1)
    return quiet(StableCascadeDecoderPipeline(shaken(network), tokenizer, clip_pooled(tokenizer), DDPMWuerstchenScheduler(),
                                              shaken(decoder, 2), latent_dim_scale=4.0))


def pixel_unet(**options: Any) -> UNet2DConditionModel:
    """The cross-attention UNet of DeepFloyd and Kandinsky 2, which predicts a variance too."""
    return shaken(UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=32, attention_head_dim=4,
        encoder_hid_dim=WIDTH, resnet_time_scale_shift="scale_shift", mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), **options))


def kandinsky2_2() -> KandinskyV22Pipeline:
    network = pixel_unet(in_channels=4, out_channels=8, encoder_hid_dim_type="image_proj", addition_embed_type="image")
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, clip_sample=False, variance_type="learned_range")
    return quiet(KandinskyV22Pipeline(network, scheduler, movq()))


def _kandinsky2_2_inputs(prompts: Sequence[str]) -> dict[str, Any]:
    return {"image_embeds": meanings(prompts, WIDTH), "negative_image_embeds": meanings([""] * len(prompts), WIDTH)} | SIZE


def deepfloyd_if() -> IFPipeline:
    network = pixel_unet(in_channels=3, out_channels=6, encoder_hid_dim_type="text_proj", addition_embed_type="text",
                         addition_embed_type_num_heads=4, act_fn="gelu")
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="learned_range", thresholding=True,
                              dynamic_thresholding_ratio=0.95, sample_max_value=1.5)
    return quiet(IFPipeline(None, None, network, scheduler, None, None, None, requires_safety_checker=False))


def sana_sprint() -> SanaSprintPipeline:
    network = SanaTransformer2DModel(in_channels=4, out_channels=4, **HEADS, num_layers=2, num_cross_attention_heads=2,
                                     cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=WIDTH, sample_size=8,
                                     guidance_embeds=True, qk_norm="rms_norm_across_heads")
    return quiet(SanaSprintPipeline(**BLIND, vae=vae_dc(), transformer=shaken(network), scheduler=SCMScheduler()))


def _sana_sprint_inputs(prompts: Sequence[str]) -> dict[str, Any]:
    return {"prompt_embeds": meanings(prompts, TOKENS, WIDTH), "prompt_attention_mask": masks(prompts), "height": 32, "width": 32,
            "use_resolution_binning": False, "intermediate_timesteps": None}  # which is for two steps only


def krea2() -> Krea2Pipeline:
    network = Krea2Transformer2DModel(in_channels=16, num_layers=2, **HEADS, num_key_value_heads=1, intermediate_size=32,
                                      timestep_embed_dim=16, text_hidden_dim=WIDTH, num_text_layers=2, text_num_attention_heads=2,
                                      text_num_key_value_heads=2, text_intermediate_size=32, num_layerwise_text_blocks=1,
                                      num_refiner_text_blocks=1, axes_dims_rope=(4, 6, 6))
    return quiet(Krea2Pipeline(FLOW(**DYNAMIC | {"max_image_seq_len": 6400}), vae_qwen(), None, None, shaken(network), (0, 1)))


def _krea2_inputs(prompts: Sequence[str]) -> dict[str, Any]:
    return told(prompts, "prompt_embeds_mask", shape=(TOKENS, 2, WIDTH), kind=torch.bool) | SIZE


def omnigen() -> OmniGenPipeline:
    tokenizer = t5_tokenizer()
    network = OmniGenTransformer2DModel(hidden_size=32, num_attention_heads=2, num_key_value_heads=2, intermediate_size=32, num_layers=2,
                                        pad_token_id=0, vocab_size=len(tokenizer), max_position_embeddings=512, time_step_dim=16,
                                        original_max_position_embeddings=512, pos_embed_max_size=16,
                                        rope_scaling={"short_factor": [1.0] * 8, "long_factor": [1.0] * 8, "type": "su"})
    return quiet(OmniGenPipeline(shaken(network), FLOW(invert_sigmas=True), vae8(), tokenizer))


def joyimage() -> JoyImageEditPipeline:
    network = JoyImageEditTransformer3DModel(in_channels=4, hidden_size=32, num_attention_heads=2, text_dim=WIDTH, num_layers=2,
                                             rope_dim_list=[4, 6, 6])
    decoder = vae_wan(scale_factor_spatial=128)  # which is not so: every size it is asked for becomes one of about 1024 x 1024
    return quiet(JoyImageEditPipeline(FLOW(shift=4.0), decoder, None, None, shaken(network), None))


def _joyimage_inputs(prompts: Sequence[str]) -> dict[str, Any]:
    return told(prompts, "prompt_embeds_mask") | {"height": 1024, "width": 1024}


def flux2_klein() -> Flux2KleinPipeline:
    network = Flux2Transformer2DModel(in_channels=16, num_layers=1, num_single_layers=1, **HEADS, joint_attention_dim=WIDTH,
                                      timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False)
    return quiet(Flux2KleinPipeline(FLOW(shift=3.0, **DYNAMIC), vae_flux2(), None, None, shaken(network)))


def qwen_image21() -> QwenImage21Pipeline:
    network = QwenImage21Transformer2DModel(in_channels=4, out_channels=4, num_layers=2, **HEADS, context_in_dim=WIDTH,
                                            axes_dims_rope=(4, 4, 8))
    decoder = AutoencoderKLQwenImage21(base_dim=8, decoder_base_dim=8, z_dim=4, dim_mult=[1] * 5, num_res_blocks=1,
                                       latents_mean=[0.1] * 4, latents_std=[1.5] * 4)
    words = ["<|endoftext|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    words += [chr(c) for c in range(ord("!"), ord("~") + 1)]
    tokenizer = Qwen2Tokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    processor = Qwen3VLProcessor(Qwen2VLImageProcessor(), tokenizer, Qwen3VLVideoProcessor(), chat_template="{{ messages[0]['role'] }}")
    scheduler = FLOW(**DYNAMIC | {"max_shift": 0.9, "max_image_seq_len": 8192}, shift_terminal=0.02)
    return quiet(QwenImage21Pipeline(scheduler, shaken(decoder, 2), None, processor, shaken(network)))


def _qwen21_inputs(prompts: Sequence[str]) -> dict[str, Any]:
    return told(prompts, "prompt_embeds_mask") | {"height": 128, "width": 128}


EXHIBITS = {
    "sdxl": Exhibit(sdxl, lambda prompts: {"prompt": list(prompts)} | SIZE, {"width": 24}),
    "sdxl-edm": Exhibit(lambda: sdxl(EDMEulerScheduler(prediction_type="v_prediction", sigma_schedule="exponential")),
                        lambda prompts: {"prompt": list(prompts)} | SIZE, {"width": 24}),
    "sd3": Exhibit(sd3, _sd3_inputs, {"width": 24}),
    "pixart-alpha": Exhibit(pixart, _pixart_inputs, {"width": 24}),
    "pixart-sigma": Exhibit(lambda: pixart(PixArtSigmaPipeline), _pixart_inputs, {"width": 24}),
    "hunyuandit": Exhibit(hunyuandit, _hunyuandit_inputs, {"width": 96}),
    "sana": Exhibit(sana, _sana_inputs, {"width": 64}),
    "lumina2": Exhibit(lumina2, _masked64, {"width": 96}),
    "lumina": Exhibit(lumina, _masked64, {"width": 96}),
    "auraflow": Exhibit(auraflow, _masked, {"width": 32}),
    "chroma": Exhibit(chroma, _chroma_inputs, {"width": 24}),
    "cogview4": Exhibit(cogview4, _plain, {"width": 32}),
    "flux-dev": Exhibit(flux, _pooled, {"width": 24}),
    "flux-schnell": Exhibit(lambda: flux(False), _pooled, {"width": 24}),
    "flux2": Exhibit(flux2, _flux2_inputs, {"width": 24}),
    "qwen-image": Exhibit(qwen_image, _qwen_inputs, {"width": 24}),
    "z-image": Exhibit(z_image, _z_image_inputs, {"width": 24}),
    "kandinsky3": Exhibit(kandinsky3, _kandinsky3_inputs, {"width": 128}),
    "cogview3": Exhibit(cogview3, _plain, {"width": 32}),
    "hidream": Exhibit(hidream, _hidream_inputs, {"width": 64}),
    "bria": Exhibit(bria, _plain, {"width": 24}),
    "bria_fibo": Exhibit(bria_fibo, lambda prompts: {"prompt": list(prompts), "height": 128, "width": 128}, {"width": 192}),
    "hunyuan_image": Exhibit(hunyuan_image, _hunyuan_image_inputs, {"width": 24}),
    "hunyuan_image-distilled": Exhibit(lambda: hunyuan_image(True), _hunyuan_image_inputs, {"width": 24}),
    "longcat_image": Exhibit(longcat_image, _longcat_inputs, {"width": 24}),
    "ovis_image": Exhibit(ovis_image, lambda prompts: _plain(prompts) | {"negative_prompt": None}, {"width": 24}),
    "glm_image": Exhibit(glm_image, _glm_inputs, {"width": 32, "prior_token_ids": torch.arange(32)[None]}),
    "nucleusmoe_image": Exhibit(nucleusmoe_image, _qwen_inputs, {"width": 24}),
    "ernie_image": Exhibit(ernie_image, lambda prompts: _z_image_inputs(prompts) | {"height": 32, "width": 32}, {"width": 48}),
    "kandinsky5": Exhibit(kandinsky5, _kandinsky5_inputs, {"width": 96}),
    "consistency_models": Exhibit(
        consistency_models, lambda prompts: {"batch_size": len(prompts), "class_labels": [len(prompt) % 10 for prompt in prompts]}),
    "latent_consistency": Exhibit(latent_consistency, lambda prompts: {"prompt": list(prompts)} | SIZE, {"width": 24}),
    "stable_cascade-prior": Exhibit(stable_cascade_prior, lambda prompts: {"prompt": list(prompts)} | SIZE, {"width": 24}),
    "stable_cascade": Exhibit(
        stable_cascade, lambda prompts: {"prompt": list(prompts), "image_embeddings": meanings(prompts, 4, 2, 2)}),
    "kandinsky2_2": Exhibit(kandinsky2_2, _kandinsky2_2_inputs, {"width": 24}),
    "deepfloyd_if": Exhibit(deepfloyd_if, _plain, {"width": 24}),
    "sana_sprint": Exhibit(sana_sprint, _sana_sprint_inputs, {"width": 64}),
    "krea2": Exhibit(krea2, _krea2_inputs, {"width": 24}),
    "omnigen": Exhibit(omnigen, lambda prompts: {"prompt": list(prompts)} | SIZE8, {"width": 96}),
    "joyimage": Exhibit(joyimage, _joyimage_inputs, {"height": 768, "width": 1280}),
    "flux2-klein": Exhibit(flux2_klein, _plain, {"width": 24}),
    "qwen-image21": Exhibit(qwen_image21, _qwen21_inputs, {"width": 192}),
}
LEFT_OUT: dict[str, str] = {
    "kolors": "its tokenizer needs sentencepiece, without which diffusers hides the class",
    "prx": "its guided call gives the network two times whatever the number of prompts, which fails for more than one",
    "ideogram4": "a call without guidance_scale, and guidance_schedule=None beside it, is for 48 steps only",
    "dreamlite": "takes one prompt at a time",
}
