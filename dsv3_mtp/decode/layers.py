"""Layers as decoding runs them: training's functions, arranged for a few tokens at a time.

For one token the number of operations counts, and the bytes of weights that are read; arithmetic is
free. So norms give their weights to the product that follows, products with a common input become
one, the softmax scale and, where that costs little more reading, W_UK go into the query's
projection, and the views of experts are made beforehand. Each `generate` derives these weights from
the model's own: they cannot go stale, and training never sees them. Copied are the attention's
down-projections, W_UQ and W_UKV; the rest are views.

Few slots on a CPU run in C, all layers in one call (ops/c_decode.py); prompts, other types and
devices, and compiled steps run in torch.
"""

import math
from collections.abc import Iterable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_mtp.decode.cache import FewSlots, Window
from dsv3_mtp.model.attention import MLA
from dsv3_mtp.model.block import DecoderLayer
from dsv3_mtp.model.layers import MLP, RMSNorm
from dsv3_mtp.model.moe import MoE, count
from dsv3_mtp.ops import c, c_decode, c_layer, choice
from dsv3_mtp.precision.stored import weight_of

# W_UK is multiplied into W_UQ where the product has at most this many times their elements.
ABSORB = 1.5


class Norm:
    """RMSNorm as x / |(x, sqrt(C eps))|, its `direction`, times sqrt(C) weight, its `gain`."""

    def __init__(self, norm: RMSNorm):
        size, self.dtype = norm.weight.shape[0], norm.weight.dtype
        wide = torch.promote_types(self.dtype, torch.float32)
        self.gain = norm.weight.to(wide) * math.sqrt(size)  # (C,)
        self.floor = self.gain.new_tensor([math.sqrt(size * norm.eps)])

    def __call__(self, x: Tensor) -> Tensor:
        return (x / self.length(x) * self.gain).to(self.dtype)

    def direction(self, x: Tensor) -> Tensor:
        return (x / self.length(x)).to(self.dtype)

    def length(self, x: Tensor) -> Tensor:
        """(N, C) -> (N, 1), float32 or wider."""
        return torch.linalg.vector_norm(x, 2, -1, True, dtype=self.floor.dtype).hypot(self.floor)


class Attention:
    """x + MLA(norm(x)) in the absorbed form (V3 section 2.1.1; DeepSeek-V2 section 2.1.2).

    W_UK goes into the query and W_UV into the output, so that all heads attend to one shared key,
    the cache row itself, and no past key is ever expanded. The row holds the latent without its
    norm's weight: both matrices have taken it.
    """

    def __init__(self, norm: RMSNorm, mla: MLA):
        self.heads, self.rank, self.rope = mla.heads, mla.kv_rank, mla.rope
        self.norm, self.kv_norm, self.q_norm = Norm(norm), Norm(mla.kv_a_layernorm), None
        weight = partial(weight_of, name="weight", dtype=norm.weight.dtype)
        down, self.q_rank = [weight(mla.kv_a_proj_with_mqa) * self.norm.gain], 0
        if mla.q_compressed:
            self.q_norm, self.q_rank = Norm(mla.q_a_layernorm), mla.q_a_proj.weight.shape[0]
            down.insert(0, weight(mla.q_a_proj) * self.norm.gain)
            up = weight(mla.q_b_proj) * (self.q_norm.gain * mla.scale)
        else:
            up = weight(mla.q_proj) * (self.norm.gain * mla.scale)
        w_uk, w_uv = (
            (weight(mla.kv_b_proj) * self.kv_norm.gain)
            .view(self.heads, -1, self.rank)
            .split([mla.nope, mla.value], dim=1)
        )  # (H, nope, R), (H, v, R)
        self.w_uk: Tensor | None = w_uk.to(norm.weight.dtype)
        rows = up.unflatten(0, (self.heads, -1))  # (H, nope + P, q)
        if self.heads * (self.rank + mla.rope) * up.shape[1] <= ABSORB * (
            up.numel() + w_uk.numel()
        ):
            rows = torch.cat(
                [w_uk.transpose(1, 2) @ rows[:, : mla.nope], rows[:, mla.nope :]], dim=1
            )
            self.w_uk = None
        self.nope = rows.shape[1] - mla.rope
        self.paired = (
            self.norm.gain.dtype == norm.weight.dtype
            and self.nope % 2 == (self.q_rank + self.rank) % 2 == 0
        )
        self.down = torch.cat(down).to(norm.weight.dtype).t()  # (C, q + R + P)
        self.up = rows.flatten(0, 1).to(norm.weight.dtype).t()  # (q, H (R+P)), or (q, H (nope+P))
        w_uv = w_uv.to(norm.weight.dtype).contiguous()
        self.w_uv = w_uv.transpose(1, 2)  # (H, R, v)
        self.out = weight(mla.o_proj).t()  # (H v, C)

    def for_c(self) -> c_layer.Attention:
        norms = self.norm, self.q_norm or self.norm, self.kv_norm
        w_uk = None if self.w_uk is None else self.w_uk.transpose(1, 2).contiguous()
        weights = self.down.t(), self.up.t(), w_uk, self.w_uv.transpose(1, 2), self.out.t()
        floor, q_floor, kv_floor = (norm.floor.item() for norm in norms)
        return c_layer.Attention(*weights, self.rope, (floor, q_floor, kv_floor))

    def __call__(self, x: Tensor, cache: Tensor, window: Window) -> Tensor:
        """x: (N, C), N = B*T; cache: (B, S, R+P), where the window's slots are written -> (N,
        C).
        """
        hidden = self.norm.direction(x)
        low = torch.mm(hidden, self.down)
        self.write(low[:, self.q_rank :], cache, window)
        if self.q_norm is not None:
            hidden = self.q_norm.direction(low[:, : self.q_rank])
        return torch.addmm(x, self.look(hidden, cache, window), self.out)

    def write(self, low: Tensor, cache: Tensor, window: Window) -> None:
        """low: (N, R+P), latent and key of the window's slots as they are projected."""
        latent, key = low[:, : self.rank], low[:, None, self.rank :]
        key = rotate(key, window.rotation, paired=self.paired).squeeze(1)
        entry = torch.cat([self.kv_norm.direction(latent), key], dim=-1)  # (N, R+P)
        cache[window.write] = entry.view(*window.shape, -1)

    def look(self, hidden: Tensor, cache: Tensor, window: Window) -> Tensor:
        """hidden: (N, q), what the up-projection of queries reads -> mixed values (N, H v)."""
        (rows, length), heads, rank = window.shape, self.heads, self.rank
        query = torch.mm(hidden, self.up).view(rows * length, heads, -1)
        absorbed, turned = query[..., : self.nope], query[..., self.nope :]
        if self.w_uk is not None:
            absorbed = torch.bmm(absorbed.transpose(0, 1), self.w_uk).transpose(0, 1)
        turned = rotate(turned, window.rotation, paired=self.paired)
        query = torch.cat([absorbed, turned], dim=-1).view(rows, 1, length * heads, -1)
        # (B, 1, end, R+P): the key, and in its first R columns the value
        past = cache[:, : window.end].unsqueeze(1)
        if torch.compiler.is_compiling():  # a window of a few slots
            scores = query @ past.transpose(2, 3)  # (B, 1, T*H, end)
            mixed = (scores if window.mask is None else scores + window.mask).softmax(-1) @ past[
                ..., :rank
            ]
        else:
            mixed = F.scaled_dot_product_attention(
                query, past, past, attn_mask=window.mask, scale=1.0
            )[..., :rank]
        mixed = torch.bmm(mixed.reshape(-1, heads, rank).transpose(0, 1), self.w_uv)  # (H, N, v)
        return mixed.transpose(0, 1).flatten(1)


def rotate(x: Tensor, rotation: Tensor, *, paired: bool) -> Tensor:
    """`model.layers.rotate`, possibly in place. x: (N, H, P); rotation: (N, 1, P/2, 2) cosines and
    sines.

    paired: x can be viewed as complex numbers, and then it is one operation.
    """
    pairs = x.view(*x.shape[:-1], -1, 2)
    # compilers generate no code for complex numbers
    if paired and not torch.compiler.is_compiling():
        torch.view_as_complex(pairs).mul_(torch.view_as_complex(rotation))
        return x
    (even, odd), (cos, sin) = pairs.to(rotation.dtype).unbind(-1), rotation.unbind(-1)
    return (
        torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
        .flatten(-2)
        .to(x.dtype)
    )


def _matrices(mlp: MLP, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Gate, up and down."""
    weight = partial(weight_of, name="weight", dtype=dtype)
    return weight(mlp.gate_proj), weight(mlp.up_proj), weight(mlp.down_proj)


class Dense:
    """x + MLP(norm(x))."""

    def __init__(self, norm: RMSNorm, mlp: MLP):
        self.norm = Norm(norm)
        self.gate, self.up, self.down = (weight.t() for weight in _matrices(mlp, norm.weight.dtype))

    def for_c(self) -> c_layer.MLP:
        weights = self.gate.t(), self.up.t(), self.down.t()
        return c_layer.MLP(self.norm.gain, self.norm.floor.item(), weights)

    def __call__(self, x: Tensor) -> Tensor:
        """(N, C) -> (N, C)"""
        hidden = self.norm(x)
        return torch.addmm(
            x, F.silu(torch.mm(hidden, self.gate)).mul_(torch.mm(hidden, self.up)), self.down
        )


class Mixture:
    """x + MoE(norm(x))."""

    def __init__(self, norm: RMSNorm, moe: MoE):
        self.norm, self.moe = Norm(norm), moe
        self.router = moe.gate.weight.to(self.norm.gain.dtype).t()  # (C, E)

    def for_c(self) -> c_layer.MLP:
        gate, experts, shared = self.moe.gate, self.moe.experts, self.moe.shared_experts
        config, common, dtype = gate.config, None, self.norm.dtype
        router = c_layer.Router(
            gate.weight,
            gate.e_score_correction_bias,
            weight_of(experts, "gate_up_proj", dtype),
            weight_of(experts, "down_proj", dtype),
            groups=config.n_group,
            topk_group=config.topk_group,
            top_k=config.num_experts_per_tok,
            normalise=config.norm_topk_prob,
            scaling=config.routed_scaling_factor,
        )
        if shared is not None:
            common = _matrices(shared, dtype)
        return c_layer.MLP(self.norm.gain, self.norm.floor.item(), common, router)

    def __call__(self, x: Tensor) -> Tensor:
        """(N, C) -> (N, C)"""
        hidden = self.norm(x)
        # (N, E), in high precision as in V3
        scores = torch.mm(hidden.to(self.router.dtype), self.router).sigmoid()
        chosen = self.moe.gate.choose(scores)  # (N, K)
        gates = self.moe.gate.weigh(scores, chosen)  # (N, K)
        if torch.compiler.is_compiling():
            y = x + self.gathered(hidden, chosen, gates.to(x.dtype))
        else:
            y = x + self.moe.experts(hidden, chosen, gates, count(chosen, scores.shape[1]))
        return y if self.moe.shared_experts is None else y + self.moe.shared_experts(hidden)

    def gathered(self, hidden: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
        """The routed experts for a compiler: static shapes, no loop. Inductor reads the picked
        weights in place.
        """
        experts = self.moe.experts
        # (N, K, F) each
        gate, up = (
            (experts.gate_up_proj[chosen] * hidden[:, None, None, :]).sum(-1).chunk(2, dim=-1)
        )
        inner = F.silu(gate) * up * gates.unsqueeze(-1)
        return (experts.down_proj[chosen] * inner.unsqueeze(2)).sum((1, 3))


class Merge:
    """Parts side by side, each normed, times a weight, which takes the weights of the norms."""

    def __init__(self, norms: Sequence[RMSNorm], weight: Tensor):
        self.norms = [Norm(norm) for norm in norms]
        gain = torch.cat([norm.gain for norm in self.norms])
        self.weight = (weight * gain).to(weight.dtype)  # (C', parts C)

    def for_c(self) -> tuple[Tensor, Tensor]:
        return self.weight, torch.cat([norm.floor for norm in self.norms])

    def __call__(self, parts: Sequence[Tensor]) -> Tensor:
        """(N, C) each -> (N, C')"""
        normed = [norm.direction(x) for norm, x in zip(self.norms, parts, strict=True)]
        return torch.mm(torch.cat(normed, dim=-1), self.weight.t())


class Layer:
    """One decoder layer."""

    def __init__(self, layer: DecoderLayer):
        self.attention = Attention(layer.input_layernorm, layer.self_attn)
        norm, mlp = layer.post_attention_layernorm, layer.mlp
        self.feed_forward = Mixture(norm, mlp) if isinstance(mlp, MoE) else Dense(norm, mlp)

    def __call__(self, x: Tensor, cache: Tensor, window: Window) -> Tensor:
        """x: (N, C); cache: (B, S, R+P) of this layer, extended by the window's slots -> (N, C)."""
        return self.feed_forward(self.attention(x, cache, window))


class Layers:
    """Decoder layers, one after the other, what the first one reads, and the norm behind the last:
    few slots in C, where its kernels take the weights.
    """

    def __init__(
        self,
        layers: Iterable[DecoderLayer],
        norm: RMSNorm,
        table: Tensor | None = None,
        merge: Merge | None = None,
    ):
        """table: (V, C), of which tokens are embedded; None: no tokens are read. merge: takes the
        embedding and given states, or these alone; None: only one of them is read.
        """
        self.layers, self.norm, self.by_c = [Layer(layer) for layer in layers], Norm(norm), None
        self.table, self.merge = table, merge
        if choice.kernels(norm.weight) is c:
            parts = [(layer.attention.for_c(), layer.feed_forward.for_c()) for layer in self.layers]
            reads = c_decode.Reads(table, None if merge is None else merge.for_c())
            self.by_c = c_decode.Layers(parts, self.norm.gain, self.norm.floor.item(), reads)

    def read_int8(self) -> None:
        """From now on few slots are computed from int8 (ops/c_decode.py)."""
        assert self.by_c is not None, "int8 is for what runs in C"
        self.by_c = self.by_c.in_int8()

    def __call__(
        self,
        given: Tensor | None,
        tokens: Tensor | None,
        caches: Sequence[Tensor],
        window: Window | FewSlots,
    ) -> tuple[Sequence[Tensor], Tensor, Tensor]:
        """given: (B*T, C) states, and tokens (B, T), each None where the layers read none; caches:
        of each layer (B, S, R+P), extended by the window's slots -> what each layer reads, (B*T,
        C), and of the rows that the window asks for the last output and the same normed, (N, C).
        """
        if isinstance(window, FewSlots):
            assert self.by_c is not None, "Decoder.window makes these where the layers run in C"
            given = None if given is None else given.contiguous()
            read, out = self.by_c(given, tokens, caches, window.starts, window.angles, window.asked)
            return list(read), out[0], out[1]
        parts = [] if given is None else [given]
        if tokens is not None:
            assert self.table is not None
            parts.insert(0, F.embedding(tokens.flatten(), self.table))
        states = [parts[0] if self.merge is None else self.merge(parts)]
        for layer, cache in zip(self.layers, caches, strict=True):
            states.append(layer(states[-1], cache, window))
        out = states.pop()
        out = out if window.asked is None else out[window.asked]
        return states, out, self.norm(out)
