"""Public files of random networks, in the layouts that the real ones were published in, and the networks' formulas written out."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch_fidelity import feature_extractor_inceptionv3 as theirs

from stepdistill.diffusion.draws import key
from stepdistill.eval import weights
from stepdistill.eval.extractors import Tiny

State = dict[str, Tensor]
LETTERS = [chr(c) for c in range(ord("!"), ord("~") + 1)]
WORDS = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
CONTEXT = 24


class TinyClip(Tiny):
    """Random embeddings of pictures and of words."""

    prefix = ""

    def features(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        return functional.normalize(super().features(images)[0], dim=1), None

    def text(self, prompts: Sequence[str]) -> Tensor:
        drawn = [torch.rand(self.dim, generator=torch.Generator().manual_seed(key(prompt))) for prompt in prompts]
        return functional.normalize(torch.stack(drawn), dim=1)


def known_as(patch: pytest.MonkeyPatch, name: str, file: Path) -> Path:
    """Let the table state the digest of this file."""
    patch.setitem(weights.KNOWN, name, dataclasses.replace(weights.KNOWN[name], sha256=weights.digest(file)))
    return file


def _drawn(shapes: dict[str, tuple[int, ...]], seed: int) -> State:
    """Matrices that keep a vector's size roughly, vectors near one where they scale and near zero where they shift."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, shape in shapes.items():
        drawn = torch.randn(shape, generator=generator)
        scales = name.endswith(("ln_1.weight", "ln_2.weight", "norm1.weight", "norm2.weight", "norm.weight", "gamma", "ln_pre.weight",
                                "ln_post.weight", "ln_final.weight"))
        out[name] = 1 + drawn / 8 if scales else drawn / 8 if len(shape) < 2 else drawn / math.sqrt(math.prod(shape[1:]))
    return out


# ------------------------------------------------------------------------------------------------------------------------------ Inception


def inception(file: Path) -> Path:
    """A state dict of torch-fidelity's network, with weights that keep its activations' size."""
    generator = torch.Generator().manual_seed(0)
    with (mock.patch.object(theirs, "load_state_dict_from_url"), torch.random.fork_rng(devices=[]),
          mock.patch.object(theirs.FeatureExtractorInceptionV3, "load_state_dict")):
        state = theirs.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).state_dict()
    for name, tensor in state.items():
        if name.endswith(("conv.weight", "fc.weight")):
            tensor.normal_(generator=generator).mul_(math.sqrt(2 / tensor[0].numel()))
        elif name.endswith(("bias", "running_mean")):
            tensor.normal_(generator=generator).div_(10)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5, generator=generator)
    torch.save(state, file)
    return file


# --------------------------------------------------------------------------------------------------------------------------- transformers


def _linear(state: State, name: str, x: Tensor) -> Tensor:
    return functional.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def _norm(state: State, name: str, x: Tensor, eps: float) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def _attention(qkv: Tensor, heads: int, causal: bool) -> Tensor:
    """Of queries, keys and values (B, N, 3·D), the channels of a head being neighbours."""
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if causal:
        scores = scores + torch.full(scores.shape[-2:], -math.inf).triu(1)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def _tokens(state: State, x: Tensor, conv: str) -> Tensor:
    kernel = state[f"{conv}.weight"]
    return functional.conv2d(x, kernel, state.get(f"{conv}.bias"), stride=kernel.shape[-1]).flatten(2).mT


def dinov2(width: int = 128, depth: int = 2, patch: int = 14, grid: int = 3) -> State:
    shapes = {"cls_token": (1, 1, width), "mask_token": (1, width), "pos_embed": (1, 1 + grid * grid, width),
              "patch_embed.proj.weight": (width, 3, patch, patch), "patch_embed.proj.bias": (width,)}
    for i in range(depth):
        for name, (out, inner) in {"attn.qkv": (3 * width, width), "attn.proj": (width, width), "mlp.fc1": (4 * width, width),
                                   "mlp.fc2": (width, 4 * width)}.items():
            shapes |= {f"blocks.{i}.{name}.weight": (out, inner), f"blocks.{i}.{name}.bias": (out,)}
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma"):
            shapes[f"blocks.{i}.{name}"] = (width,)
    return _drawn(shapes | {"norm.weight": (width,), "norm.bias": (width,)}, 1)


def dinov2_features(state: State, x: Tensor, positions: Tensor) -> Tensor:
    """Of normalised pictures, with embeddings (1, 1 + patches, d) for their positions."""
    x = _tokens(state, x, "patch_embed.proj")
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], 1) + positions
    for i in range(sum(name.endswith("ls1.gamma") for name in state)):
        block = {name.removeprefix(f"blocks.{i}."): tensor for name, tensor in state.items() if name.startswith(f"blocks.{i}.")}
        heads = x.shape[-1] // 64
        attended = _attention(_linear(block, "attn.qkv", _norm(block, "norm1", x, 1e-6)), heads, causal=False)
        x = x + block["ls1.gamma"] * _linear(block, "attn.proj", attended)
        x = x + block["ls2.gamma"] * _linear(block, "mlp.fc2", functional.gelu(_linear(block, "mlp.fc1", _norm(block, "norm2", x, 1e-6))))
    return _norm(state, "norm", x, 1e-6)[:, 0]


def clip(vision: int = 128, text: int = 128, patch: int = 16, grid: int = 2, dim: int = 24, depth: int = 2) -> State:
    shapes = {"logit_scale": (), "text_projection": (text, dim), "positional_embedding": (CONTEXT, text),
              "token_embedding.weight": (len(WORDS), text), "visual.proj": (vision, dim), "visual.class_embedding": (vision,),
              "visual.positional_embedding": (1 + grid * grid, vision), "visual.conv1.weight": (vision, 3, patch, patch)}
    norms = {"ln_final": text, "visual.ln_pre": vision, "visual.ln_post": vision}
    for tower, width in {"transformer": text, "visual.transformer": vision}.items():
        for i in range(depth):
            at = f"{tower}.resblocks.{i}"
            norms |= {f"{at}.ln_1": width, f"{at}.ln_2": width}
            shapes |= {f"{at}.attn.in_proj_weight": (3 * width, width), f"{at}.attn.in_proj_bias": (3 * width,)}
            for name, (out, inner) in {"attn.out_proj": (width, width), "mlp.c_fc": (4 * width, width),
                                       "mlp.c_proj": (width, 4 * width)}.items():
                shapes |= {f"{at}.{name}.weight": (out, inner), f"{at}.{name}.bias": (out,)}
    shapes |= {f"{name}.{kind}": (width,) for name, width in norms.items() for kind in ("weight", "bias")}
    return _drawn(shapes, 2)


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _blocks(state: State, tower: str, x: Tensor, head: int, activation: Callable[[Tensor], Tensor], causal: bool) -> Tensor:
    for i in range(sum(name.startswith(tower) and name.endswith("ln_1.weight") for name in state)):
        at = f"{tower}.resblocks.{i}"
        qkv = functional.linear(_norm(state, f"{at}.ln_1", x, 1e-5), state[f"{at}.attn.in_proj_weight"], state[f"{at}.attn.in_proj_bias"])
        x = x + _linear(state, f"{at}.attn.out_proj", _attention(qkv, x.shape[-1] // head, causal))
        x = x + _linear(state, f"{at}.mlp.c_proj", activation(_linear(state, f"{at}.mlp.c_fc", _norm(state, f"{at}.ln_2", x, 1e-5))))
    return x


def clip_pictures(state: State, x: Tensor, head: int = 64, activation: Callable[[Tensor], Tensor] = quick_gelu) -> Tensor:
    """Embeddings of normalised pictures."""
    x = _tokens(state, x, "visual.conv1")
    x = torch.cat([state["visual.class_embedding"].expand(len(x), 1, -1), x], 1) + state["visual.positional_embedding"]
    x = _blocks(state, "visual.transformer", _norm(state, "visual.ln_pre", x, 1e-5), head, activation, causal=False)
    return functional.normalize(_norm(state, "visual.ln_post", x[:, 0], 1e-5) @ state["visual.proj"], dim=-1)


def tokens_of(prompt: str) -> list[int]:
    """A vocabulary of single letters, the last of a word marked; beyond the context nothing is read."""
    words = [WORDS.index(letter) for word in prompt.lower().split() for letter in (*word[:-1], word[-1] + "</w>")]
    return [len(WORDS) - 2, *words[:CONTEXT - 2], len(WORDS) - 1]


def clip_text(state: State, prompt: str, activation: Callable[[Tensor], Tensor] = quick_gelu) -> Tensor:
    """Embedding (1, d), read at the end of the text."""
    tokens = tokens_of(prompt)
    x = state["token_embedding.weight"][tokens][None] + state["positional_embedding"][:len(tokens)]
    x = _norm(state, "ln_final", _blocks(state, "transformer", x, 64, activation, causal=True), 1e-5)
    return functional.normalize(x[:, -1] @ state["text_projection"], dim=-1)


def archive(state: State, file: Path) -> Path:
    """A TorchScript archive, as OpenAI published."""
    module = nn.Module()
    for name, tensor in state.items():
        *path, leaf = name.split(".")
        inner = module
        for step in path:
            if step not in inner._modules:
                inner.add_module(step, nn.Module())
            inner = inner.get_submodule(step)
        inner.register_parameter(leaf, nn.Parameter(tensor))
    torch.jit.save(torch.jit.script(module), str(file))
    return file
