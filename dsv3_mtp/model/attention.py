"""Multi-head latent attention (DeepSeek-V3 section 2.1.1, eqs. 1-11): training, and decoding from latents."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_mtp.config import ModelConfig
from dsv3_mtp.model import causal
from dsv3_mtp.model.causal import causal_attention
from dsv3_mtp.model.layers import RMSNorm, rotate, yarn_mscale


class Window(NamedTuple):
    """The slots that one cached forward computes, the same for all layers. Slot and position are one number.

    A row's window is T consecutive slots; rows may start at different ones. What lies behind a window in the cache is
    masked, so that forgetting slots (a rejected draft) is no more than writing over them.
    """

    shape: tuple[int, int]  # (B, T)
    write: tuple[Any, Any]  # index of the window's slots in a cache (B, S, .)
    end: int  # slots 0..end-1 of the cache are read
    rotation: Tensor  # (B*T, 1, P/2) complex: cos + i sin of the window's positions
    mask: Tensor | None  # (1 or B, 1, T*H, end) additive; None: every slot is visible


class MLA(nn.Module):
    """Keys and values come from one compressed latent per token (R numbers) and one shared rotary key (P numbers).

    Queries are compressed as well when `q_lora_rank` is set. RMSNorm sits on both latents.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads = config.num_attention_heads
        self.nope, self.rope, self.value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.kv_rank = config.kv_lora_rank
        hidden, query = config.hidden_size, self.heads * (self.nope + self.rope)
        self.q_compressed = config.q_lora_rank is not None
        if config.q_lora_rank is not None:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, config.rms_norm_eps)
            self.q_b_proj = nn.Linear(config.q_lora_rank, query, bias=False)
        else:
            self.q_proj = nn.Linear(hidden, query, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.kv_rank + self.rope, bias=False)
        self.kv_a_layernorm = RMSNorm(self.kv_rank, config.rms_norm_eps)
        self.kv_b_proj = nn.Linear(self.kv_rank, self.heads * (self.nope + self.value), bias=False)
        self.o_proj = nn.Linear(self.heads * self.value, hidden, bias=False)
        self.scale = (self.nope + self.rope) ** -0.5
        if config.rope_scaling is not None:  # YaRN's temperature multiplies the logits: q and k each by mscale
            self.scale *= yarn_mscale(config.rope_scaling.factor, config.rope_scaling.mscale_all_dim) ** 2

    def forward(self, x: Tensor, angles: Tensor, mask: Tensor | None) -> Tensor:
        """x: (B, T, C); angles: (2, T, P/2) cos and sin; mask: bool (B, 1, T, T) True = attend, None = causal."""
        query, latent, k_rope = self.project(x)  # (B, T, H, nope+P), (B, T, R), (B, T, P)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (self.heads, -1))  # (B, T, H, nope+v)
        if causal.usable(x, mask):
            return self.o_proj(causal_attention(query, kv, k_rope, angles, self.scale))
        q_nope, q_rope = query.split([self.nope, self.rope], dim=-1)
        k_nope, value = kv.split([self.nope, self.value], dim=-1)
        k_rope = rotate(k_rope.unsqueeze(2), angles).expand(-1, -1, self.heads, -1)
        query = torch.cat([q_nope, rotate(q_rope, angles)], dim=-1).transpose(1, 2)  # (B, H, T, nope+P)
        key = torch.cat([k_nope, k_rope], dim=-1).transpose(1, 2)
        mixed = attend(query, key, value.transpose(1, 2), self.scale, mask)  # (B, H, T, v)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x: (B, T, C) -> queries (B, T, H, nope+P), latents (B, T, R) without norm, keys (B, T, P) not yet rotated."""
        query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if self.q_compressed else self.q_proj(x)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([self.kv_rank, self.rope], dim=-1)
        return query.unflatten(-1, (self.heads, -1)), latent, k_rope

    def decode(self, x: Tensor, cache: Tensor, window: Window) -> Tensor:
        """The same function of new tokens, with R+P numbers kept per past token; inference only.

        The absorbed form (V3 section 2.1.1; DeepSeek-V2 section 2.1.2): W_UK goes into the query and W_UV into the
        output, so that all heads attend to one shared key, the cache row itself, and no past key is ever expanded.

        Args:
            x: (N, C) with N = B*T, normed.
            cache: (B, S, R+P), normed latent and rotated key of each slot; the window's slots are written here.
        Returns:
            (N, C)
        """
        (rows, length), heads = window.shape, self.heads
        query = self.q_b_proj(self.q_a_layernorm.decode(self.q_a_proj(x))) if self.q_compressed else self.q_proj(x)
        q_nope, q_rope = query.view(-1, heads, self.nope + self.rope).split([self.nope, self.rope], dim=-1)  # (N, H, .)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([self.kv_rank, self.rope], dim=-1)  # (N, R), (N, P)
        turned = turn(torch.cat([q_rope, k_rope.unsqueeze(1)], dim=1), window.rotation)  # (N, H+1, P)
        entry = torch.cat([self.kv_a_layernorm.decode(latent), turned[:, heads]], dim=-1)  # (N, R+P)
        cache[window.write] = entry.view(rows, length, -1)
        w_uk, w_uv = self.kv_b_proj.weight.view(heads, -1, self.kv_rank).split(
            [self.nope, self.value], dim=1
        )  # (H, ., R)
        absorbed = torch.bmm(q_nope.transpose(0, 1), w_uk).transpose(0, 1)  # (N, H, R)
        query = torch.cat([absorbed, turned[:, :heads]], dim=-1).view(rows, 1, length * heads, -1)
        past = cache[:, : window.end].unsqueeze(1)  # (B, 1, end, R+P): the key, and in its first R columns the value
        mixed = F.scaled_dot_product_attention(query, past, past, attn_mask=window.mask, scale=self.scale)
        mixed = mixed[..., : self.kv_rank].reshape(-1, heads, self.kv_rank).transpose(0, 1)  # (H, N, R)
        return self.o_proj(torch.bmm(mixed, w_uv.transpose(1, 2)).transpose(0, 1).flatten(1))


def turn(x: Tensor, rotation: Tensor) -> Tensor:
    """`rotate` as one complex product. x: (N, H, P) contiguous; rotation: (N, 1, P/2) complex64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    pairs = torch.view_as_complex(x.to(wide).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """softmax(query key^T * scale) value, causal unless a mask is given.

    query, key: (B, H, T, qk); value: (B, H, T, v). The CPU flash kernel insists on equal widths and torch would
    silently take its T^2-memory math path otherwise, so on CPU the narrower value is padded with zeros.
    """
    width = value.shape[-1]
    if query.device.type == "cpu" and width < query.shape[-1]:
        value = F.pad(value, (0, query.shape[-1] - width))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale)
    return out[..., :width]
