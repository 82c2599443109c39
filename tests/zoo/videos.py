"""The text-to-video families: the text arrives as embeddings, so that no text encoder has to be built."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import (
    AdaptiveProjectedGuidance,
    AllegroPipeline,
    AllegroTransformer3DModel,
    AnimateDiffPipeline,
    AnimateDiffSDXLPipeline,
    AnyFlowFARPipeline,
    AnyFlowFARTransformer3DModel,
    AnyFlowPipeline,
    AnyFlowTransformer3DModel,
    AutoencoderKLAllegro,
    AutoencoderKLCogVideoX,
    AutoencoderKLCosmos,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    AutoencoderKLMagvit,
    AutoencoderKLMochi,
    AutoencoderKLWan,
    ClassifierFreeGuidance,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    ConfigMixin,
    Cosmos2_5_PredictBasePipeline,
    Cosmos2TextToImagePipeline,
    Cosmos2VideoToWorldPipeline,
    CosmosTextToWorldPipeline,
    CosmosTransformer3DModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EasyAnimatePipeline,
    EasyAnimateTransformer3DModel,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeliosPipeline,
    HeliosScheduler,
    HeliosTransformer3DModel,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
    LattePipeline,
    LatteTransformer3DModel,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
    LTXConditionPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
    ModelMixin,
    MotifVideoPipeline,
    MotifVideoTransformer3DModel,
    MotionAdapter,
    SanaVideoPipeline,
    SanaVideoTransformer3DModel,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    TextToVideoSDPipeline,
    UNet2DConditionModel,
    UNet3DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from torch import Tensor
from transformers import CLIPTokenizer, UMT5Config, UMT5EncoderModel
from zoo.base import Exhibit, meanings, quiet, shaken
from zoo.basics import SD_TABLE, clip_tokenizer, vae

LENGTH, WIDTH = 12, 32
LEFT_OUT: dict[str, str] = {
    "helios-pyramid": "it takes a list of steps, one for each size of the picture, and no num_inference_steps",
}


def _words(prompts: Sequence[str]) -> Tensor:
    return meanings(prompts, LENGTH, WIDTH)


def _pooled(prompts: Sequence[str]) -> Tensor:
    return meanings(prompts, WIDTH)


def _mask(prompts: Sequence[str]) -> Tensor:
    """A token for every two letters and one for the end, padded on the right."""
    return torch.stack([torch.arange(LENGTH) <= len(prompt) // 2 for prompt in prompts]).long()


def _mask_left(prompts: Sequence[str]) -> Tensor:
    return _mask(prompts).flip(1)


def _layers(prompts: Sequence[str]) -> Tensor:
    """Two layers of a text encoder, one behind the other."""
    return meanings(prompts, LENGTH, 2 * WIDTH)


def _size(height: int, width: int, frames: int = 9, *, named: str = "num_frames", also: Mapping[str, Any] | None = None,
          **makers: Callable[[Sequence[str]], Any]) -> Callable[[Sequence[str]], dict[str, Any]]:
    """`inputs` of one size: each value for the prompts and, as `negative_...`, for as many empty ones; bare embeddings if none is named."""
    makers = makers or {"prompt_embeds": _words}

    def inputs(prompts: Sequence[str]) -> dict[str, Any]:
        sides = {"": prompts, "negative_": [""] * len(prompts)}
        texts = {sign + name: make(side) for sign, side in sides.items() for name, make in makers.items()}
        return {**texts, "height": height, "width": width, **({named: frames} if frames else {}), **(also or {})}

    return inputs


def _wan_network(seed: int = 0, channels: int = 16) -> WanTransformer3DModel:
    return shaken(WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=channels, out_channels=channels, text_dim=WIDTH, freq_dim=32, ffn_dim=32,
        num_layers=2, rope_max_seq_len=32), seed)


def _wan_vae(**options: Any) -> AutoencoderKLWan:
    return shaken(AutoencoderKLWan(**{"base_dim": 3, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, **options}), 2)


def _unipc(flow_shift: float) -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift)


def _wan(flow_shift: float = 3.0, **parts: Any) -> WanPipeline:
    parts = {"transformer": _wan_network(), "vae": _wan_vae(), **parts}
    return quiet(WanPipeline(tokenizer=None, text_encoder=None, scheduler=_unipc(flow_shift), **parts))


def wan21() -> WanPipeline:
    return _wan()


def wan22() -> WanPipeline:
    return _wan(transformer_2=_wan_network(1), boundary_ratio=0.875)


def wan22_5b() -> WanPipeline:
    autoencoder = _wan_vae(z_dim=48, is_residual=True, in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16,
                           latents_mean=[0.0] * 48, latents_std=[1.0] * 48)
    return _wan(5.0, transformer=_wan_network(channels=48), vae=autoencoder, expand_timesteps=True)


def cogvideox(big: bool = False) -> CogVideoXPipeline:
    """The big one has another clock, solver and places of its tokens."""
    network = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=WIDTH, num_layers=2,
        sample_width=4, sample_height=4, sample_frames=9, max_text_seq_length=LENGTH, use_rotary_positional_embeddings=big)
    autoencoder = AutoencoderKLCogVideoX(block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2)
    scheduler = (CogVideoXDPMScheduler if big else CogVideoXDDIMScheduler)(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, prediction_type="v_prediction",
        rescale_betas_zero_snr=True, set_alpha_to_one=True, snr_shift_scale=1.0 if big else 3.0, timestep_spacing="trailing")
    return quiet(CogVideoXPipeline(None, None, shaken(autoencoder, 2), shaken(network), scheduler))


def _ltx_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024,
                                           max_image_seq_len=4096, shift_terminal=0.1)


def _ltx_parts() -> tuple[AutoencoderKLLTXVideo, None, None, LTXVideoTransformer3DModel]:
    network = LTXVideoTransformer3DModel(in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16,
                                         cross_attention_dim=32, num_layers=2, caption_channels=WIDTH)
    widths, layers = (8, 8, 8, 8), (1, 1, 1, 1, 1)
    autoencoder = AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=widths, decoder_block_out_channels=widths, layers_per_block=layers,
        decoder_layers_per_block=layers)
    return shaken(autoencoder, 2), None, None, shaken(network)


def ltx() -> LTXPipeline:
    return quiet(LTXPipeline(_ltx_scheduler(), *_ltx_parts()))


def ltx_condition() -> LTXConditionPipeline:
    return quiet(LTXConditionPipeline(FlowMatchEulerDiscreteScheduler(), *_ltx_parts()))


def _hunyuan_vae() -> AutoencoderKLHunyuanVideo:
    return shaken(AutoencoderKLHunyuanVideo(latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4), 2)


def hunyuan_video() -> HunyuanVideoPipeline:
    network = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=2, num_single_layers=2,
        num_refiner_layers=1, text_embed_dim=WIDTH, pooled_projection_dim=WIDTH, rope_axes_dim=(2, 4, 4))
    return quiet(HunyuanVideoPipeline(
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, transformer=shaken(network),
        vae=_hunyuan_vae(), scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0)))


def mochi() -> MochiPipeline:
    network = MochiTransformer3DModel(num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16, in_channels=12,
                                      text_embed_dim=WIDTH, time_embed_dim=8, max_sequence_length=LENGTH)
    autoencoder = AutoencoderKLMochi(encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4, layers_per_block=(1,) * 5)
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    return quiet(MochiPipeline(scheduler, shaken(autoencoder, 2), None, None, shaken(network)))


def latte() -> LattePipeline:
    network = LatteTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, cross_attention_dim=32, sample_size=8,
        patch_size=2, activation_fn="gelu-approximate", attention_bias=True, num_embeds_ada_norm=1000, norm_type="ada_norm_single",
        norm_elementwise_affine=False, norm_eps=1e-6, caption_channels=WIDTH, video_length=3)
    return quiet(LattePipeline(None, None, vae(), shaken(network), DDIMScheduler(clip_sample=False)))


def _motion_parts(**options: Any) -> tuple[UNet2DConditionModel, MotionAdapter, DDIMScheduler]:
    network = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=WIDTH, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **options)
    adapter = MotionAdapter(block_out_channels=(8, 16), motion_layers_per_block=1, motion_num_attention_heads=2, motion_norm_num_groups=4)
    scheduler = DDIMScheduler(**{**SD_TABLE, "beta_schedule": "linear"}, timestep_spacing="linspace", steps_offset=1)
    return network, shaken(adapter, 1), scheduler


def animatediff() -> AnimateDiffPipeline:
    network, adapter, scheduler = _motion_parts()
    pipeline = AnimateDiffPipeline(vae(), None, None, network, adapter, scheduler)
    shaken(pipeline.unet)
    return quiet(pipeline)


def animatediff_sdxl() -> AnimateDiffSDXLPipeline:
    network, adapter, scheduler = _motion_parts(addition_embed_type="text_time", addition_time_embed_dim=8,
                                                projection_class_embeddings_input_dim=6 * 8 + WIDTH)
    pipeline = AnimateDiffSDXLPipeline(vae(), None, None, None, None, network, adapter, scheduler)
    shaken(pipeline.unet)
    return quiet(pipeline)


def text_to_video() -> TextToVideoSDPipeline:
    network = UNet3DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=WIDTH, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"))
    return quiet(TextToVideoSDPipeline(vae(), None, None, shaken(network), DDIMScheduler(**SD_TABLE, set_alpha_to_one=False)))


def allegro() -> AllegroPipeline:
    network = AllegroTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, num_layers=2, cross_attention_dim=24, sample_width=4,
        sample_height=4, sample_frames=2, caption_channels=WIDTH)
    autoencoder = AutoencoderKLAllegro(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2)
    scheduler = EulerAncestralDiscreteScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    return quiet(AllegroPipeline(None, None, shaken(autoencoder, 2), shaken(network), scheduler))


def hunyuan_video15() -> HunyuanVideo15Pipeline:
    network = HunyuanVideo15Transformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=2, num_refiner_layers=1,
        text_embed_dim=WIDTH, text_embed_2_dim=WIDTH, image_embed_dim=8, rope_axes_dim=(2, 4, 4), target_size=64, task_type="t2v")
    autoencoder = AutoencoderKLHunyuanVideo15(latent_channels=4, block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1)
    return quiet(HunyuanVideo15Pipeline(
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, transformer=shaken(network), vae=shaken(autoencoder, 2),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0), guider=ClassifierFreeGuidance(guidance_scale=6.0)))


class Harmless(ModelMixin, ConfigMixin):
    """In the place of the guardrails that the Cosmos pipelines insist on: they are not installed, and no prompt is given to them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("none", torch.zeros(1))


def _cosmos_network(channels: int = 16, **options: Any) -> CosmosTransformer3DModel:
    return shaken(CosmosTransformer3DModel(**{
        "in_channels": channels, "out_channels": 16, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "mlp_ratio": 2,
        "text_embed_dim": WIDTH, "adaln_lora_dim": 4, "max_size": (4, 32, 32), "extra_pos_embed_type": None, **options}))


def cosmos() -> CosmosTextToWorldPipeline:
    autoencoder = AutoencoderKLCosmos(encoder_block_out_channels=(8, 8, 8, 8), decode_block_out_channels=(8, 8, 8, 8), resolution=64,
                                      attention_resolutions=(8,), num_layers=1)
    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, final_sigmas_type="sigma_min")
    return quiet(CosmosTextToWorldPipeline(
        None, None, _cosmos_network(extra_pos_embed_type="learnable"), shaken(autoencoder, 2), scheduler, Harmless()))


def cosmos2_image() -> Cosmos2TextToImagePipeline:
    return quiet(Cosmos2TextToImagePipeline(
        None, None, _cosmos_network(), _wan_vae(), FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True), Harmless()))


def cosmos2_video() -> Cosmos2VideoToWorldPipeline:
    return quiet(Cosmos2VideoToWorldPipeline(
        None, None, _cosmos_network(17), _wan_vae(), FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True), Harmless()))


def cosmos2_video_inputs(prompts: Sequence[str]) -> dict[str, Any]:
    """Each prompt goes on from a first picture of its own."""
    return {**_size(32, 32)(prompts), "image": meanings(prompts, 3, 32, 32).sigmoid()}


def cosmos25() -> Cosmos2_5_PredictBasePipeline:
    network = _cosmos_network(17, use_crossattn_projection=True, crossattn_proj_in_channels=WIDTH, encoder_hidden_states_channels=WIDTH)
    scheduler = UniPCMultistepScheduler(use_karras_sigmas=True, use_flow_sigmas=True, prediction_type="flow_prediction", sigma_max=200.0,
                                        sigma_min=0.01)
    return quiet(Cosmos2_5_PredictBasePipeline(None, None, network, _wan_vae(), scheduler, Harmless()))


def easyanimate() -> EasyAnimatePipeline:
    network = EasyAnimateTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, patch_size=2, num_layers=2, mmdit_layers=1,
        time_embed_dim=8, text_embed_dim=WIDTH, sample_width=4, sample_height=4, add_norm_text_encoder=True)
    autoencoder = AutoencoderKLMagvit(latent_channels=4, block_out_channels=[8, 8, 8, 8], layers_per_block=1, norm_num_groups=2)
    return quiet(EasyAnimatePipeline(shaken(autoencoder, 2), None, None, shaken(network), FlowMatchEulerDiscreteScheduler(shift=5.0)))


def kandinsky5() -> Kandinsky5T2VPipeline:
    network = Kandinsky5Transformer3DModel(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=WIDTH, in_text_dim2=WIDTH, time_dim=16, model_dim=32, ff_dim=32, num_text_blocks=1,
        num_visual_blocks=2, axes_dims=(4, 6, 6), visual_cond=True)
    return quiet(Kandinsky5T2VPipeline(
        transformer=shaken(network), vae=_hunyuan_vae(), text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0)))


def kandinsky5_inputs(prompts: Sequence[str]) -> dict[str, Any]:
    """Its lengths mask nothing, so that all prompts have one length; the empty ones have another."""
    inputs = _size(32, 32, prompt_embeds_clip=_pooled)(prompts)
    for sign, side, length in (("", prompts, LENGTH), ("negative_", [""] * len(prompts), 8)):
        inputs[f"{sign}prompt_embeds_qwen"] = meanings(side, length, WIDTH)
        inputs[f"{sign}prompt_cu_seqlens"] = length * torch.arange(len(side) + 1, dtype=torch.int32)
    return inputs


def sana_video() -> SanaVideoPipeline:
    network = SanaVideoTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, num_layers=2, num_cross_attention_heads=2, cross_attention_head_dim=12,
        cross_attention_dim=24, caption_channels=WIDTH)
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0)
    return quiet(SanaVideoPipeline(None, None, _wan_vae(), shaken(network), scheduler))


def _skyreels_parts() -> tuple[None, None, SkyReelsV2Transformer3DModel, AutoencoderKLWan, UniPCMultistepScheduler]:
    network = SkyReelsV2Transformer3DModel(num_attention_heads=2, attention_head_dim=12, text_dim=WIDTH, freq_dim=32, ffn_dim=32,
                                           num_layers=2, rope_max_seq_len=32)
    return None, None, shaken(network), _wan_vae(), _unipc(8.0)


def skyreels_v2() -> SkyReelsV2Pipeline:
    return quiet(SkyReelsV2Pipeline(*_skyreels_parts()))


def skyreels_v2_forcing() -> SkyReelsV2DiffusionForcingPipeline:
    """Each frame has a clock and a solver of its own. (The smaller model, which is told the frames a second, takes one prompt alone.)"""
    return quiet(SkyReelsV2DiffusionForcingPipeline(*_skyreels_parts()))


def ltx2() -> LTX2Pipeline:
    """Pictures and sound are denoised together; the connectors between text and network are a network of their own."""
    network = LTX2VideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32, audio_in_channels=8,
        audio_out_channels=8, audio_num_attention_heads=2, audio_attention_head_dim=8, audio_cross_attention_dim=16, num_layers=2,
        caption_channels=WIDTH, rope_type="split")
    sides = {f"{kind}_connector_{name}": value for kind in ("video", "audio") for name, value in (
        ("num_attention_heads", 2), ("attention_head_dim", 16), ("num_layers", 1), ("num_learnable_registers", 4))}
    connectors = LTX2TextConnectors(caption_channels=WIDTH, text_proj_in_factor=2, rope_type="split", **sides)
    autoencoder = AutoencoderKLLTX2Video(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8), layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 4, spatial_compression_ratio=32, temporal_compression_ratio=8)
    sound = AutoencoderKLLTX2Audio(base_channels=8, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=2, mel_bins=16)
    return quiet(LTX2Pipeline(
        scheduler=_ltx_scheduler(), vae=shaken(autoencoder, 2), audio_vae=shaken(sound, 3), text_encoder=None, tokenizer=None,
        connectors=shaken(connectors, 1), transformer=shaken(network), vocoder=None))


def motif_video() -> MotifVideoPipeline:
    network = MotifVideoTransformer3DModel(
        num_attention_heads=2, attention_head_dim=10, num_layers=2, num_single_layers=2, num_decoder_layers=1, text_embed_dim=WIDTH,
        rope_axes_dim=(2, 4, 4), enable_text_cross_attention_dual=True, enable_text_cross_attention_single=True)
    return quiet(MotifVideoPipeline(
        FlowMatchEulerDiscreteScheduler(shift=15.0), _wan_vae(), None, None, shaken(network), AdaptiveProjectedGuidance(
            guidance_scale=8.0, adaptive_projected_guidance_rescale=12.0, adaptive_projected_guidance_momentum=0.1,
            use_original_formulation=True)))


def _anyflow_text() -> tuple[CLIPTokenizer, UMT5EncoderModel]:
    """These append negative embeddings that they are given to the others even where nothing is guided, and break."""
    tokenizer = clip_tokenizer()
    text = UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), d_model=WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=4))
    return tokenizer, shaken(text, 1)


ANYFLOW = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": WIDTH, "freq_dim": 32, "ffn_dim": 32, "num_layers": 2,
           "rope_max_seq_len": 32}


def anyflow() -> AnyFlowPipeline:
    network = AnyFlowTransformer3DModel(**ANYFLOW)
    return quiet(AnyFlowPipeline(*_anyflow_text(), shaken(network), _wan_vae(), FlowMapEulerDiscreteScheduler(shift=5.0)))


def anyflow_far() -> AnyFlowFARPipeline:
    """Frame after frame, each with a memory of those before it."""
    network = AnyFlowFARTransformer3DModel(**ANYFLOW, chunk_partition=(1, 1, 1), full_chunk_limit=2)
    return quiet(AnyFlowFARPipeline(*_anyflow_text(), shaken(network), _wan_vae(), FlowMapEulerDiscreteScheduler(shift=5.0)))


def anyflow_inputs(prompts: Sequence[str]) -> dict[str, Any]:
    return {"prompt": list(prompts), "max_sequence_length": 24, "height": 32, "width": 32, "num_frames": 9}


def helios() -> HeliosPipeline:
    network = HeliosTransformer3DModel(num_attention_heads=2, attention_head_dim=12, text_dim=WIDTH, freq_dim=32, ffn_dim=32, num_layers=2,
                                       rope_dim=(4, 4, 4))
    scheduler = HeliosScheduler(stages=1, stage_range=[0, 1], use_dynamic_shifting=True)
    return quiet(HeliosPipeline(None, None, _wan_vae(), scheduler, shaken(network)))


MASKED = {"prompt_embeds": _words, "prompt_attention_mask": _mask}
UNSAID = {"negative_prompt": None}  # by default it is an empty string, which forbids embeddings in its place
HELIOS = {"num_latent_frames_per_chunk": 2}
EXHIBITS: dict[str, Exhibit] = {
    "wan21": Exhibit(wan21, _size(32, 32), {"width": 48}),
    "cogvideox": Exhibit(cogvideox, _size(32, 32), {"width": 48}),
    "ltx": Exhibit(ltx, _size(128, 128, **MASKED), {"width": 192}),
    "hunyuan-video": Exhibit(hunyuan_video, _size(32, 32, **MASKED, pooled_prompt_embeds=_pooled), {"width": 48}),
    "mochi": Exhibit(mochi, _size(32, 32, 7, **MASKED), {"width": 48}),
    "latte": Exhibit(latte, _size(8, 8, 3, named="video_length", also=UNSAID), {"width": 16}),
    "animatediff": Exhibit(animatediff, _size(16, 16, 3), {"width": 24}),
    "wan22": Exhibit(wan22, _size(32, 32), {"width": 48}),
    "wan22-5b": Exhibit(wan22_5b, _size(64, 64), {"width": 96}),
    "allegro": Exhibit(allegro, _size(32, 32, 8, also=UNSAID, **MASKED), {"width": 48}),
    "hunyuan-video15": Exhibit(hunyuan_video15, _size(64, 64, prompt_embeds=_words, prompt_embeds_mask=_mask, prompt_embeds_2=_words,
                                                      prompt_embeds_mask_2=_mask), {"width": 96}),
    "cosmos": Exhibit(cosmos, _size(32, 32), {"width": 48}),
    "cosmos2-image": Exhibit(cosmos2_image, _size(32, 32, 0), {"width": 48}),
    "cosmos2-video": Exhibit(cosmos2_video, cosmos2_video_inputs, {"width": 48}),
    "easyanimate": Exhibit(easyanimate, _size(32, 32, **MASKED), {"width": 48}),
    "kandinsky5": Exhibit(kandinsky5, kandinsky5_inputs, {"width": 48}),
    "sana-video": Exhibit(
        sana_video, _size(32, 32, named="frames", also={**UNSAID, "use_resolution_binning": False}, **MASKED), {"width": 64}),
    "skyreels-v2": Exhibit(skyreels_v2, _size(32, 32), {"width": 48}),
    "ltx2": Exhibit(ltx2, _size(128, 128, also={"spatio_temporal_guidance_blocks": [1]}, prompt_embeds=_layers,
                                prompt_attention_mask=_mask_left), {"width": 192}),
    "motif-video": Exhibit(motif_video, _size(32, 32, **MASKED), {"width": 48}),
    "animatediff-sdxl": Exhibit(animatediff_sdxl, _size(16, 16, 3, prompt_embeds=_words, pooled_prompt_embeds=_pooled), {"width": 24}),
    "text-to-video": Exhibit(text_to_video, _size(16, 16, 3), {"width": 24}),
    "anyflow": Exhibit(anyflow, anyflow_inputs, {"width": 48}),
    "helios": Exhibit(helios, _size(32, 32, 5, also=HELIOS), {"width": 48}),
    "helios-two-chunks": Exhibit(helios, _size(32, 32, 10, also=HELIOS), {"width": 48}),
    "cogvideox-5b": Exhibit(lambda: cogvideox(big=True), _size(32, 32), {"width": 48}),
    "ltx-condition": Exhibit(ltx_condition, _size(128, 128, **MASKED), {"width": 192}),
    "cosmos25": Exhibit(cosmos25, _size(32, 32), {"width": 48}),
    "skyreels-v2-forcing": Exhibit(skyreels_v2_forcing, _size(32, 32, also={"prompt": None}), {"width": 48}),
    "anyflow-far": Exhibit(anyflow_far, anyflow_inputs, {"width": 48}),
}
