"""A source whose entropies are known: what each kind of head can reach, and that it does reach it.

On an order-1 chain a sequential module sees the token before its target, so every depth reaches the
entropy rate; a parallel head of depth k sees only t_i and is left with the entropy of k+1 steps.
"""

import math

import numpy as np
import pytest
import torch

from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from dsv3_mtp.model.output import LossSettings
from dsv3_mtp.tasks.markov import heads_on, source_nll
from tests.ranks import markov_chain, markov_tokens

STATES, DEPTHS, T, STEPS = 24, 2, 64, 100
TOLERANCE = 0.04  # nats


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sequential", "parallel", "examples.bag_head:BagHead", "leap"])
def test_heads_reach_the_entropy_that_theory_leaves_them(make_tiny_config, mode):
    config = make_tiny_config(
        {
            "mtp.mode": mode,
            "mtp.num_nextn_predict_layers": DEPTHS,
            "model.vocab_size": STATES,
            "model.hidden_size": 48,
            "model.num_hidden_layers": 2,
            "model.max_position_embeddings": T,
            "model.initializer_range": 0.02,
        }
    )
    torch.manual_seed(0)
    model = DeepseekV3MTP(config.model, config.mtp)
    model.init_weights(0)
    chain = markov_chain(STATES, sharpness=2.0)
    tokens = torch.from_numpy(markov_tokens(chain, 16 * T * STEPS + 2 * T, seed=1).astype(np.int64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95))
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = (
                1e-2 * min(1, (step + 1) / 20) * (0.55 + 0.45 * math.cos(math.pi * step / STEPS))
            )
        rows = [tokens[(step * 16 + row) * T :][: T + model.lookahead] for row in range(16)]
        out = model(torch.stack(rows), settings=LossSettings((0.5,) * DEPTHS))
        optimizer.zero_grad()
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.update_router_bias(out.load, 1e-3)
    held_out = torch.from_numpy(
        markov_tokens(chain, 256 * T + model.lookahead, seed=2).astype(np.int64)
    )
    with torch.no_grad():
        out = model(torch.stack([held_out[row * T :][: T + model.lookahead] for row in range(256)]))
    losses = (out.nll_sum / out.targets).tolist()
    walk = held_out.numpy()
    reach = []
    for head, read, aim in heads_on(chain, config.mtp):
        reach.append(source_nll(head, walk[read : len(walk) + read - aim], walk[aim:]))
        reach[-1] /= len(walk) - aim
    assert losses == pytest.approx(reach, abs=TOLERANCE)
    # the two differ
    assert step_entropy(chain, held_out, 2) - step_entropy(chain, held_out, 1) > 10 * TOLERANCE


def step_entropy(chain: np.ndarray, tokens: torch.Tensor, steps: int) -> float:
    """Mean -log P(t_{i+steps} | t_i) over the tokens under the true chain, nats."""
    power, walk = np.linalg.matrix_power(chain, steps), tokens.numpy()
    return float(-np.log(power[walk[:-steps], walk[steps:]]).mean())
