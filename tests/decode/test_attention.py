"""The absorbed, cached attention and the cached trunk against the training forward."""

from contextlib import nullcontext

import pytest
import torch

from dsv3_mtp.decode.cache import CacheSlots, Ring
from dsv3_mtp.decode.decoder import Decoder
from dsv3_mtp.decode.generate import Settings, generate
from dsv3_mtp.decode.sample import TokenSampler
from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from dsv3_mtp.ops import choice
from tests.made_runs import randomise

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
CASES = {
    "v3": {},
    "no_query_compression": {"model.q_lora_rank": None},
    "odd_nope": {"model.qk_nope_head_dim": 7},
    "no_groups_no_shared": {"model.n_group": 1, "model.topk_group": 1, "model.n_shared_experts": 0},
    "unnormalised": {"model.norm_topk_prob": False},
    "yarn": {"model.rope_scaling": YARN},
}
TOLERANCE = {
    torch.float64: 1e-6,
    torch.float32: 2e-5,
    torch.bfloat16: 6e-2,
}  # float64: rotary angles are float32


def cached_states(model, tokens, chunks):
    """Trunk states (B, T, C) of tokens (B, T), computed in windows of the given lengths."""
    slots = CacheSlots(model, tokens.shape[1])
    caches, start, parts = slots.caches(model.config.num_hidden_layers, len(tokens)), 0, []
    with torch.inference_mode():
        decoder = Decoder(model)
        for length in chunks:
            window = decoder.window(slots, [start] * len(tokens), length)
            states = decoder.trunk(tokens[:, start : start + length], caches, window)
            parts.append(states.post_norm.view(len(tokens), length, -1))
            start += length
    return torch.cat(parts, 1)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "chunks", [[20], [1] * 20, [7, 1, 3, 9]], ids=["whole", "one_by_one", "mixed"]
)
def test_cached_trunk_equals_the_training_forward(make_model, case, chunks):
    model = make_model(overrides=CASES[case])
    tokens = torch.randint(64, (2, 20))
    expected = model.head_rows(torch.cat([tokens, tokens[:, :2]], 1)).rows[0].inputs[0]
    for how in (nullcontext(), choice.plain()):  # in C, where there is a compiler, and in torch
        with how:
            found = cached_states(model, tokens, chunks)
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_cached_logits_equal_the_uncached_ones_in_every_dtype(make_tiny_config, dtype):
    config = make_tiny_config({"model.max_position_embeddings": 48, "model.num_experts_per_tok": 4})
    model = DeepseekV3MTP(config.model, config.mtp)
    model.init_weights(1)
    for parameter in model.parameters():  # as a bfloat16 run: router biases stay float32
        parameter.data = parameter.data.to(dtype)
    tokens = torch.randint(64, (2, 20))
    with torch.no_grad():
        expected = model.logits(torch.cat([tokens, tokens[:, :2]], 1))[0]
        got = model.lm_head(cached_states(model, tokens, [7, 1, 3, 9]))
    assert got.dtype == dtype
    error = (got - expected).double().pow(2).mean().sqrt() / expected.double().pow(2).mean().sqrt()
    assert error < TOLERANCE[dtype]


def test_a_window_writes_over_rejected_slots(make_model):
    """Slots behind the last accepted one may hold anything."""
    model = make_model()
    tokens = torch.randint(64, (1, 12))
    slots = CacheSlots(model, 24)
    with torch.inference_mode():
        clean, dirty = (slots.caches(3, 1) for _ in range(2))
        decoder = Decoder(model)
        decoder.trunk(tokens[:, :8], clean, slots.window([0], 8))
        decoder.trunk(tokens[:, :8], dirty, slots.window([0], 8))
        decoder.trunk(torch.randint(64, (1, 6)), dirty, slots.window([8], 6))  # rejected drafts
        after = [
            decoder.trunk(tokens[:, 8:], cache, slots.window([8], 4)).post_norm
            for cache in (clean, dirty)
        ]
    assert torch.equal(*after)
    assert all(torch.equal(a[:, :12], b[:, :12]) for a, b in zip(clean, dirty, strict=True))


def test_rows_at_different_slots_equal_rows_alone(make_model):
    model = make_model()
    tokens = torch.randint(64, (3, 14))
    whole = cached_states(model, tokens, [14])
    slots, starts = CacheSlots(model, 24), [2, 9, 5]
    caches = slots.caches(3, 3)
    with torch.inference_mode():
        decoder = Decoder(model)
        for row, start in enumerate(starts):
            decoder.trunk(
                tokens[row : row + 1, :start],
                [cache[row : row + 1] for cache in caches],
                slots.window([0], start),
            )
        new = torch.stack([tokens[row, start : start + 4] for row, start in enumerate(starts)])
        states = decoder.trunk(new, caches, slots.window(starts, 4)).post_norm.view(3, 4, -1)
    expected = torch.stack([whole[row, start : start + 4] for row, start in enumerate(starts)])
    torch.testing.assert_close(states, expected, rtol=2e-5, atol=2e-5)


def test_the_cache_holds_the_latent_and_the_rotary_key_of_each_token_and_layer(make_model):
    model = make_model()
    config = model.config
    shapes = [cache.shape for cache in CacheSlots(model, 10).caches(3, 1)]
    assert shapes == 3 * [(1, 10, config.kv_lora_rank + config.qk_rope_head_dim)]


def test_no_tensor_of_a_long_prefill_grows_with_the_square_of_the_prompt(make_model):
    """Largest tensor made in the prefill of 256 and of 512 tokens: at most twice as large, a T x T
    mask four times.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self.size = max(self.size, tensor.numel())
            return out

        size = 0

    model = make_model(overrides={"model.max_position_embeddings": 600})
    sizes = []
    for length in (256, 512):
        with Largest() as largest:
            prompt = torch.randint(64, (length,)).tolist()
            generate(model, [prompt], Settings(max_new_tokens=2, draft_depth=1, prefill_chunk=64))
        sizes.append(largest.size)
    assert sizes[1] < 2.2 * sizes[0]


def test_the_chunk_of_the_prefill_changes_neither_tokens_nor_drafts(make_model, monkeypatch):
    model, verify, drafted = make_model("sequential"), TokenSampler.verify, []

    def recording(sampler, logits, drafts, probability, lengths):
        drafted[-1].append(probability)
        return verify(sampler, logits, drafts, probability, lengths)

    monkeypatch.setattr(TokenSampler, "verify", recording)
    prompt, tokens = torch.randint(64, (21,)).tolist(), []
    for chunk in (1, 2, 3, 4, 5, 7, 20, 21, 22, 128):
        drafted.append([])
        settings = Settings(max_new_tokens=20, draft_depth=2, temperature=1.0, prefill_chunk=chunk)
        tokens.append(generate(model, [prompt], settings).tokens)
    assert all(run == tokens[0] for run in tokens)
    for run in drafted:
        torch.testing.assert_close(run[0], drafted[-1][0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["v3", "no_query_compression", "odd_nope", "no_groups_no_shared"])
def test_a_slot_has_the_same_bits_alone_and_in_any_company(make_tiny_config, compiled, case, dtype):
    """In C. So a verified draft is the plain token, near-ties included."""
    config = make_tiny_config({"model.max_position_embeddings": 48, **CASES[case]})
    model = randomise(DeepseekV3MTP(config.model, config.mtp)).requires_grad_(False)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    tokens, found = torch.randint(64, (3, 14)), []
    with torch.inference_mode():
        decoder = Decoder(model)
        for chunks in ([1] * 14, [3, 1, 5, 4, 1]):
            states = cached_states(model, tokens, chunks)
            one_row = cached_states(model, tokens[1:2], chunks)
            assert torch.equal(states[1:2], one_row)
            logits = torch.cat([decoder.logits(part) for part in states.flatten(0, 1).split(21)])
            found.append((states, logits))
        assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
        assert torch.equal(
            decoder.logits(states[1, 3:4]), found[0][1].unflatten(0, (3, 14))[1, 3:4]
        )


def test_c_layers_refuse_what_they_would_read_beyond(make_model, compiled):
    model = make_model()
    slots = CacheSlots(model, 10)
    with torch.inference_mode():
        layers = Decoder(model).layers.layers.by_c
        tokens, caches = torch.zeros(1, 2, dtype=torch.long), slots.caches(3, 1)
        layers(None, tokens, caches, [8], slots.rotation)
        for wrong in (
            (tokens, caches, [9]),  # the second slot would be the eleventh
            (tokens, caches, [-1]),
            (tokens, caches[:2], [8]),
            (tokens, [cache[:, :9] for cache in caches], [8]),
            (tokens, [caches[0].double(), *caches[1:]], [8]),
            (tokens, slots.caches(3, 2), [8]),
            (tokens, caches, [8, 8, 8]),
            (tokens.int(), caches, [8]),
            (None, caches, [8]),
        ):
            with pytest.raises(ValueError):
                layers(None, *wrong, slots.rotation)
        for asked in ([2], [-1], [1, 0], [0, 0]):
            with pytest.raises(ValueError):
                layers(None, tokens, caches, [8], slots.rotation, asked)
        for token in (-1, 64):
            with pytest.raises(IndexError, match="1 of"):
                layers(None, torch.tensor([[token]]), caches, [8], slots.rotation)
        module = Decoder(model).heads[0].layer.by_c
        cache, hidden = slots.caches(1, 1), torch.zeros(2, 32)
        module(hidden, tokens, cache, [8], slots.rotation)
        for given in (None, hidden[:1], hidden[:, :31], hidden.double()):
            with pytest.raises(ValueError):
                module(given, tokens, cache, [8], slots.rotation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_are_asked_for_have_the_bits_that_they_have_among_all(
    make_tiny_config, compiled, dtype
):
    """And the caches are the same: those of the other slots, too."""
    for case in ("v3", "no_query_compression"):
        config = make_tiny_config({"model.max_position_embeddings": 48, **CASES[case]})
        model = randomise(DeepseekV3MTP(config.model, config.mtp)).requires_grad_(False)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        slots, tokens = CacheSlots(model, 9), torch.randint(64, (2, 4))
        with torch.inference_mode():
            decoder = Decoder(model)
            for layers, depth in ((decoder.layers.layers, 3), (decoder.heads[0].layer, 1)):
                given = None if layers.merge is None else torch.randn(8, 32).to(dtype)
                found = []
                for asked in (None, [3, 6], []):
                    caches = slots.caches(depth, 2)
                    window = slots.few([2, 5], 4, asked)
                    _, out, normed = layers(given, tokens, caches, window)
                    found.append((out, normed, *caches))
                every, some, none = found
                assert torch.equal(every[0][[3, 6]], some[0])
                assert torch.equal(every[1][[3, 6]], some[1])
                assert all(torch.equal(a, b) for a, b in zip(every[2:], none[2:], strict=True))
                assert all(torch.equal(a, b) for a, b in zip(every[2:], some[2:], strict=True))
                assert none[0].shape == (0, 32)


def test_ring_forgets_only_what_is_older_than_its_width():
    ring = Ring(2, 5, torch.zeros(1, 1))
    for start in range(0, 21, 3):
        slots = torch.arange(start, start + 3.0)
        ring.write([start, start + 1], torch.stack([slots, slots + 1])[..., None])
    assert ring.read([16, 17], 5)[..., 0].tolist() == [[16, 17, 18, 19, 20], [17, 18, 19, 20, 21]]
