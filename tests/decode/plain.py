"""Head types, a text to learn, and plain decoding without a cache to compare with."""

import torch

from dsv3_mtp.decode.draft import no_drafter
from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from dsv3_mtp.model.layers import rotary_angles
from tests import heads_under_test
from tests.conftest import tiny

HEADS = {
    "one_module": {},
    "shared_three": {"mtp.num_nextn_predict_layers": 3, "mtp.share_weights": True},
    **{
        name: {"mtp.num_nextn_predict_layers": 2, **keys}
        for name, keys in heads_under_test.HEADS.items()
        if no_drafter(tiny({"mtp.num_nextn_predict_layers": 2, **keys}).mtp) is None
    },
}
CYCLE = [
    3,
    17,
    5,
    5,
    9,
    41,
    9,
    2,
    60,
    17,
    8,
    33,
    3,
    3,
    21,
    50,
    7,
]  # ambiguous after one token, mostly clear after two


def train_on_cycle(model: DeepseekV3MTP, steps: int = 25) -> None:
    generator = torch.Generator().manual_seed(0)
    cycle = torch.tensor(CYCLE)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        starts = torch.randint(len(cycle), (8, 1), generator=generator)
        tokens = cycle[(starts + torch.arange(24 + model.lookahead)) % len(cycle)]
        noise = torch.rand(tokens.shape, generator=generator) < 0.1
        tokens = torch.where(noise, torch.randint(64, tokens.shape, generator=generator), tokens)
        optimizer.zero_grad()
        model(tokens).loss.backward()
        optimizer.step()


def plain_logits(model: DeepseekV3MTP, tokens: list[int]) -> torch.Tensor:
    """(1+D, L, V) logits of the training forward at every slot, without any cache."""
    with torch.no_grad():
        return model.logits(torch.tensor([[*tokens, *[0] * model.lookahead]]))[:, 0, : len(tokens)]


def plain_greedy(model: DeepseekV3MTP, prompt: list[int], count: int) -> list[int]:
    """Greedy continuation up to the context limit, by the training forward of the trunk alone;
    remembered.
    """
    known = _GREEDY.setdefault((id(model), tuple(prompt)), list(prompt))
    limit = min(len(prompt) + count, model.config.max_position_embeddings)
    while len(known) < limit:
        angles = rotary_angles(model.config, torch.arange(len(known)))
        with torch.no_grad():
            states, _ = model.model(model.model.embed_tokens(torch.tensor([known])), angles, None)
            known.append(int(model.lm_head(states.post_norm[0, -1]).argmax()))
    return known[len(prompt) : limit]


_GREEDY: dict[
    tuple[int, tuple[int, ...]], list[int]
] = {}  # models live as long as the session, see conftest.py
