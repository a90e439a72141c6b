"""The stages of timm's plain vision transformers (ViT, DeiT), with attention whose heads can be removed."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from wml_ray.networks.spec import Stages
from wml_ray.networks.staging import NotAChain

LAYERS = 4  # stages that the blocks are divided into


class Attention(nn.Module):
    """Multi-head self-attention, (B, N, D) to (B, N, D), with as many heads as its `qkv` has rows for.

    The rows of `qkv` are those of the queries, the keys and the values, head after head.
    """

    def __init__(self, qkv: nn.Linear, proj: nn.Linear, head_dim: int) -> None:
        super().__init__()
        self.qkv, self.proj, self.head_dim = qkv, proj, head_dim

    @property
    def num_heads(self) -> int:
        """Heads that are left."""
        return self.qkv.out_features // (3 * self.head_dim)

    def forward(self, tokens_BND: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attention of the tokens of an image to each other; the other arguments are those of timm's blocks."""
        heads = self.qkv(tokens_BND).unflatten(-1, (3, self.num_heads, self.head_dim))
        queries, keys, values = heads.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = scaled_dot_product_attention(queries, keys, values, attn_mask, is_causal=is_causal)
        outputs: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return outputs


class Tokens(nn.Module):
    """Images (B, C, H, W) to tokens (B, N, D): a class token and the patches, with their positions."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.cls_token, self.pos_embed = network.cls_token, network.pos_embed
        self.patch_embed, self.norm_pre = network.patch_embed, network.norm_pre

    def forward(self, images: Tensor) -> Tensor:
        """Tokens, the class token first if there is one."""
        tokens = self.patch_embed(images)
        if self.cls_token is not None:  # a shape and no len(), which exporters take for a constant
            tokens = torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        outputs: Tensor = self.norm_pre(tokens + self.pos_embed)
        return outputs


class TokenPool(nn.Module):
    """Tokens (B, N, D) to features (B, D): the class token, or the mean of the patches."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.mean, self.first_patch = network.global_pool == "avg", network.num_prefix_tokens

    def forward(self, tokens_BND: Tensor) -> Tensor:
        """The feature of each image."""
        return tokens_BND[:, self.first_patch :].mean(1) if self.mean else tokens_BND[:, 0]


def is_transformer(network: nn.Module) -> bool:
    """Whether `network` is a plain vision transformer of timm."""
    return type(network).__module__ == "timm.models.vision_transformer"


def transformer_stages(network: nn.Module) -> Stages:
    """The stages `stem` (the tokens), `layer1` to `layer4` (a quarter of the blocks each) and `head`.

    Raises:
        NotAChain: the network has a part that these stages lack.
    """
    parts: Any = network
    for name in ("reg_token", "attn_pool"):
        if getattr(parts, name, None) is not None:
            raise NotAChain(f"{name} is a part that only plain vision transformers without it are cut with")
    if parts.global_pool not in ("token", "avg") or parts.no_embed_class:
        raise NotAChain("global_pool is neither of the class token nor of the patches, or cls_token has no position")
    for index, block in enumerate(parts.blocks):
        block.attn = _prunable(block.attn, f"blocks.{index}.attn")
    stages: Stages = {"stem": Tokens(parts)}
    blocks, depth = list(parts.blocks), len(parts.blocks)
    for layer in range(min(LAYERS, depth)):
        first, last = layer * depth // min(LAYERS, depth), (layer + 1) * depth // min(LAYERS, depth)
        inner = nn.Sequential()
        for index in range(first, last):
            inner.add_module(str(index), blocks[index])
        stages[f"layer{layer + 1}"] = nn.Sequential()
        cast(nn.Sequential, stages[f"layer{layer + 1}"]).add_module("blocks", inner)
    head = nn.Sequential()
    for name, module in {"norm": parts.norm, "pool": TokenPool(parts), "fc_norm": parts.fc_norm}.items():
        head.add_module(name, module)
    head.add_module("head_drop", parts.head_drop)
    head.add_module("head", parts.head)
    stages["head"] = head
    return stages


def _prunable(attention: Any, path: str) -> Attention:
    """`attention` of timm as one whose heads can be removed."""
    extras = ("q_norm", "k_norm", "norm", "gate", "attn_drop", "proj_drop")
    active = [
        name
        for name in extras
        if not isinstance(module := getattr(attention, name, None), (nn.Identity, type(None)))
        and not (isinstance(module, nn.Dropout) and module.p == 0)
    ]
    if not isinstance(getattr(attention, "qkv", None), nn.Linear) or active:
        raise NotAChain(f"{path} is no plain self-attention{f' (it has {active[0]})' if active else ''}")
    return Attention(attention.qkv, attention.proj, attention.head_dim)
