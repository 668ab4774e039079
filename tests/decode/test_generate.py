"""Generation loses nothing: speculative equals plain, batches equal single prompts, limits and
stops are kept.
"""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_mtp.decode.draft import draft_limit
from dsv3_mtp.decode.generate import Acceptance, Settings, Step, generate, stream
from dsv3_mtp.decode.sample import TokenSampler
from dsv3_mtp.heads.sequential import ChainDrafter
from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from tests.conftest import tiny
from tests.decode.plain import CYCLE, HEADS, plain_greedy, plain_logits
from tests.decode.test_sample import chi_square_p

PROMPTS = [[5], CYCLE[:7], [60, 1, 2, 3]]


@pytest.mark.parametrize(
    "trained", [pytest.param(False, marks=pytest.mark.slow), True], ids=["random", "trained"]
)
@pytest.mark.parametrize("heads", HEADS)
def test_greedy_speculative_output_is_plain_greedy_output(make_model, heads, trained):
    model = make_model(heads, trained=trained)
    for number, prompt in enumerate(PROMPTS[:2]):
        expected = plain_greedy(model, prompt, 100)  # to the context limit
        assert len(prompt) + len(expected) == model.config.max_position_embeddings
        # as many as the heads draft, fewer, and more
        for depth in ((2,), (1, 4))[number]:
            assert generate(model, [prompt], Settings(draft_depth=depth)).tokens == [expected], (
                depth
            )
    if draft_limit(model, 5) > model.mtp_config.drafts:  # modules that are used again
        for recycle in ("last", "cycle"):
            use = Settings(draft_depth=5, recycle=recycle)
            assert generate(model, [prompt], use).tokens == [expected], recycle


@pytest.mark.parametrize(
    "heads", [name for name in HEADS if name not in ("no_embedding", "pre_norm")]
)
def test_a_batch_of_different_lengths_equals_each_prompt_alone(make_model, heads):
    model = make_model(heads, trained=True)
    prompts = [*PROMPTS, CYCLE[2:5], CYCLE + CYCLE[:9]]
    for depth in (0, 1, 3) if heads == "sequential" else (3,):
        use = Settings(max_new_tokens=20, draft_depth=depth, stop_tokens=(41,))
        alone = [generate(model, [prompt], use) for prompt in prompts]
        together = generate(model, prompts, use)
        assert together.tokens == [one.tokens[0] for one in alone]
        assert together.acceptance.tokens == sum(one.acceptance.tokens for one in alone)


@pytest.mark.parametrize("heads", ["sequential", "parallel"])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_max_new_tokens_is_kept_whatever_the_drafts(make_model, heads, depth):
    model = make_model(heads, trained=True)
    expected = plain_greedy(model, CYCLE[:7], 30)
    for count in (1, 2, 3, 4, 5, 6, 30):
        got = generate(
            model, [CYCLE[:7]], Settings(max_new_tokens=count, draft_depth=depth)
        ).tokens[0]
        assert got == expected[:count]


def test_decoding_ends_at_a_stop_token_wherever_it_falls_in_a_step(make_model):
    model = make_model("sequential", trained=True)
    places = set()
    for prompt in (CYCLE[:k] for k in range(2, 7)):
        whole = plain_greedy(model, prompt, 12)
        for stop in set(whole):
            use = Settings(max_new_tokens=12, draft_depth=2, stop_tokens=(stop,))
            steps = list(stream(model, [prompt], use))
            tokens = [token for step in steps for token in step.tokens]
            assert tokens == whole[: whole.index(stop) + 1]
            assert [step.done for step in steps] == [False] * (len(steps) - 1) + [True]
            places.add((len(steps[-1].tokens), steps[-1].accepted))
    assert {
        (1, 0),
        (1, 1),
        (2, 2),
        (3, 2),
    } <= places  # after the prefill or a rejection, as draft 1, 2, as bonus


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_output_is_plain_when_the_drafts_fail_at_any_position(
    make_model, monkeypatch, in_pieces, depth
):
    """A drafter that knows the text, and is wrong at a chosen position."""
    model = make_model(trained=True)
    prompt = CYCLE[:5]
    whole = prompt + plain_greedy(model, prompt, 20)

    for wrong in range(depth + 1):

        def oracle(self, ids, last, count, sampler, wrong=wrong):
            m = last[0]
            guess = whole[m + 1 : m + 1 + count] + [0] * (count - len(whole[m + 1 : m + 1 + count]))
            drafts = [token if k != wrong else (token + 1) % 64 for k, token in enumerate(guess)]
            ids[0, m + 1 : m + 1 + count] = torch.tensor(drafts)
            return torch.tensor([drafts]), None

        monkeypatch.setattr(ChainDrafter, "draft", oracle)
        result = generate(model, [prompt], Settings(max_new_tokens=20, draft_depth=depth))
        assert result.tokens[0] == whole[len(prompt) :]
        assert result.acceptance.joint == [1.0] * wrong + [0.0] * (depth - wrong)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([1e-3, 0.05, 0.3, 1.0]),
    heads=st.sampled_from(sorted(HEADS)),
    depth=st.integers(1, 4),
    prompt=st.lists(st.integers(0, 63), min_size=1, max_size=12),
    dense=st.integers(0, 3),
)
def test_lossless_for_any_weights(seed, scale, heads, depth, prompt, dense):
    sizes = {
        "max_position_embeddings": 24,
        "initializer_range": scale,
        "first_k_dense_replace": dense,
    }
    config = tiny({f"model.{key}": value for key, value in sizes.items()} | HEADS[heads])
    model = DeepseekV3MTP(config.model, config.mtp).requires_grad_(False)
    model.init_weights(seed)
    plain = generate(model, [prompt], Settings())
    assert generate(model, [prompt], Settings(draft_depth=depth)).tokens == plain.tokens
    assert len(prompt) + len(plain.tokens[0]) == 24


@pytest.mark.parametrize(
    ("heads", "truncation"),
    [
        ("sequential", {}),
        ("sequential", {"top_p": 0.8}),
        ("parallel", {"top_k": 4}),
        ("parallel_linear", {}),
        ("sequential", {"draft_threshold": 0.2}),
        ("parallel", {"draft_vocab": tuple(range(0, 64, 3))}),
    ],
    ids=str,
)
def test_sampled_speculative_output_has_the_plain_distribution(make_model, heads, truncation):
    """Chi-square of the second and third sampled tokens of real decodes against the exact
    probabilities.
    """
    check_distribution(make_model(heads, trained=True), truncation)


def check_distribution(model: DeepseekV3MTP, more: dict) -> Acceptance:
    """`more`: settings beside the temperature."""
    prompt, rows = CYCLE[:1], 2000
    use = Settings(max_new_tokens=4, draft_depth=2, temperature=1.3, seed=3, **more)
    result = generate(model, [prompt] * rows, use)
    assert 0.02 < result.acceptance.joint[0] < 0.98
    sampler = TokenSampler(1.3, more.get("top_k"), more.get("top_p", 1.0))
    tokens = torch.tensor([row[:4] for row in result.tokens])
    for context in ([], [int(tokens[:, 0].mode().values)], tokens[:, :2].mode(0).values.tolist()):
        rows_here = (tokens[:, : len(context)] == torch.tensor(context, dtype=torch.long)).all(1)
        if rows_here.sum() < 200:
            continue
        expected = sampler.probabilities(plain_logits(model, prompt + context)[0, -1])
        counts = torch.bincount(tokens[rows_here, len(context)], minlength=64)
        assert chi_square_p(counts, expected * (expected > 1e-7)) > 1e-3
    return result.acceptance


def test_weights_changed_between_two_calls_are_seen(make_model):
    model = copy.deepcopy(make_model("sequential", trained=True))
    generate(model, [[5]], Settings(draft_depth=2))
    for parameter in model.parameters():
        # autograd's version counters do not see what goes through .data
        parameter.data += torch.randn_like(parameter) / 4
    expected = plain_greedy(model, [5], 20)
    assert generate(model, [[5]], Settings(max_new_tokens=20, draft_depth=2)).tokens == [expected]


def test_sampling_repeats_with_its_seed_only(make_model):
    model = make_model()
    runs = [
        generate(model, [[5]], Settings(max_new_tokens=20, temperature=1.0, seed=s)).tokens
        for s in (0, 0, 1)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_acceptance_counts_by_hand():
    acceptance = Acceptance()
    for tokens, accepted, drafted in [
        ([1, 2, 3], 2, 2),
        ([1], 0, 2),
        ([1, 2], 1, 2),
        ([1, 2], 1, 1),
        ([1], 0, 0),
    ]:
        acceptance.add(Step(0, tokens, accepted, drafted, False))
    assert acceptance.joint == [3 / 4, 1 / 3]
    assert acceptance.conditional == [3 / 4, 1 / 2]
    assert acceptance.tokens_per_step == 9 / 5


@pytest.mark.parametrize(
    ("prompts", "use", "message"),
    [
        ([[]], {}, "the prompt is empty"),
        ([[1], []], {}, "prompt 2 is empty"),
        ([], {}, "no prompt"),
        ([[1] * 32], {}, "the prompt has 32 tokens, but max_position_embeddings = 32"),
        ([[1, 64, -1]], {}, "outside the vocabulary of 64: -1, 64"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens must be >= 1 (got 0)"),
        ([[1]], {"draft_depth": -1}, "draft_depth must be >= 0 (got -1)"),
        ([[1]], {"draft_depth": 2, "recycle": "first"}, "recycle must be one of last, cycle"),
        ([[1]], {"draft_depth": 1, "recycle": "cycle"}, "recycle cycle has no effect: 1 drafts"),
        ([[1]], {"draft_threshold": 1.5}, "draft_threshold must be in [0, 1] (got 1.5)"),
        ([[1]], {"draft_vocab": (3, 64)}, "ids outside the vocabulary of 64: [64]"),
        ([[1]], {"draft_depth": 1, "draft_dtype": "fp4"}, "draft_dtype must be int8, or None"),
        (
            [[1]],
            {"draft_depth": 1, "draft_dtype": "int8", "compile": True},
            "draft_dtype int8 is for the C kernels",
        ),
        ([[1]], {"temperature": float("nan")}, "temperature must be 0"),
        ([[1]], {"seed": 2**63}, "seed must be >= 0 and < 2^63"),
        ([[1]], {"top_k": 3}, "no effect at temperature 0"),
        ([[1]], {"temperature": 1.0, "top_p": 0.0}, "top_p must be in (0, 1] (got 0.0)"),
        ([[1]], {"temperature": 1.0, "top_k": 0}, "top_k must be >= 1 (got 0)"),
        ([[1]], {"prefill_chunk": 0}, "prefill_chunk must be >= 1 (got 0)"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_requests_are_refused_before_any_work(make_model, prompts, use, message):
    with pytest.raises(ValueError) as error:
        stream(make_model(), prompts, Settings(**use))
    assert message in str(error.value)


def test_drafts_in_int8_need_the_c_kernels(make_model):
    model = copy.deepcopy(make_model("sequential")).double()
    with pytest.raises(ValueError, match="draft_dtype int8 is for the C kernels"):
        stream(model, [[1]], Settings(draft_depth=1, draft_dtype="int8"))


def test_speculation_needs_heads(make_tiny_config):
    config = make_tiny_config({"mtp.mode": "none"})
    with pytest.raises(ValueError, match=r"no MTP heads.*mtp.mode: none"):
        stream(DeepseekV3MTP(config.model, config.mtp), [[1]], Settings(draft_depth=1))


@pytest.mark.parametrize("how", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}])
@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("where", ["at the prompt", "behind it"])
def test_tokens_of_logits_that_are_not_finite_are_refused(make_model, where, depth, how):
    """With torch's operations, which decode on a GPU and here in float64, too."""
    model = copy.deepcopy(make_model("sequential")).double()
    weight, row = model.lm_head.weight, 3
    if where == "behind it":
        first = generate(model, [[1]], Settings(max_new_tokens=1, **how)).tokens[0][-1]
        weight, row = model.model.embed_tokens.weight, first
    weight.data[row] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        generate(model, [[1]], Settings(draft_depth=depth, **how))
