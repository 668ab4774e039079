"""Heads that are trained on an objective reach its optimum, on a chain where that is known.

The trunk is exact: its embedding is one-hot, its layers add nothing, and its output head holds log
P, so that the teacher behind token a is row a of P. A head of depth 1 that sees only t_i = s has to
stand for all of these rows, a with probability P(s, a). What is best then depends on the objective:

    ce, kl    the mean of the rows, row s of P^2 (closed form)
    tv        a linear program
    lk        a concave maximum without a closed form

The expected overlap is that of the tv optimum at best: a head that is trained on it is accepted
more often than any head that is trained on cross-entropy can be.
"""

import math
from functools import cache

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize

from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from dsv3_mtp.model.output import LossSettings
from dsv3_mtp.tasks.markov import stationary, transition_matrix
from tests.conftest import tiny
from tests.ranks import markov_tokens

STATES, C, T, ROWS = 6, 32, 64, 64
CHAIN = transition_matrix(STATES, sharpness=2.0, chain_seed=5)


def overlap(q: np.ndarray) -> np.ndarray:
    """(S, S): [s, a] = sum_v min(P(a, v), q(s, v))."""
    return np.minimum(CHAIN[None], q[:, None]).sum(-1)


def expected(values: np.ndarray) -> float:
    """Of values [s, a], over t_i = s and t_{i+1} = a."""
    return float(stationary(CHAIN) @ (CHAIN * values).sum(1))


def loss_of(objective: str, q: np.ndarray) -> float:
    """What a head with the table q (S, S) loses, nats or probability."""
    if objective == "ce":
        return -float(stationary(CHAIN) @ ((CHAIN @ CHAIN) * np.log(q)).sum(1))
    if objective == "kl":
        return expected((CHAIN[None] * (np.log(CHAIN)[None] - np.log(q)[:, None])).sum(-1))
    return expected(1 - overlap(q) if objective == "tv" else -np.log(overlap(q)))


def best_tv() -> np.ndarray:
    """Of each s: maximise sum_a P(s, a) sum_v m(a, v), m <= P, m(a, v) <= q(v), sum_v q(v) = 1."""
    n, rows = STATES, []
    for s in range(n):
        cost = np.concatenate([-np.repeat(CHAIN[s], n), np.zeros(n)])  # m (n*n), then q (n)
        below = np.hstack([np.eye(n * n), -np.tile(np.eye(n), (n, 1))])
        one = np.concatenate([np.zeros(n * n), np.ones(n)])[None]
        bounds = [(0, p) for p in CHAIN.flatten()] + [(0, 1)] * n
        found = linprog(cost, A_ub=below, b_ub=np.zeros(n * n), A_eq=one, b_eq=[1.0], bounds=bounds)
        assert found.success
        rows.append(found.x[-n:])
    return np.array(rows)


def best_lk() -> np.ndarray:
    """Of each s: maximise sum_a P(s, a) log m(a), a concave function of m and q under the linear
    constraints above.
    """
    n, rows = STATES, []
    mean = CHAIN @ CHAIN
    below = np.hstack([-np.eye(n * n), np.tile(np.eye(n), (n, 1))])  # q(v) - m(a, v) >= 0
    for s in range(n):
        start = np.concatenate([np.minimum(CHAIN, mean[s]).flatten(), mean[s]])

        def cost(x, s=s):
            return -CHAIN[s] @ np.log(x[: n * n].reshape(n, n).sum(1))

        def gradient(x, s=s):
            per_row = -CHAIN[s] / x[: n * n].reshape(n, n).sum(1)
            return np.concatenate([np.repeat(per_row, n), np.zeros(n)])

        rules = [
            {"type": "ineq", "fun": lambda x: below @ x, "jac": lambda x: below},
            {"type": "eq", "fun": lambda x: x[-n:].sum() - 1},
        ]
        bounds = [(1e-12, p) for p in CHAIN.flatten()] + [(1e-12, 1)] * n
        found = minimize(
            cost,
            start,
            jac=gradient,
            bounds=bounds,
            constraints=rules,
            options={"maxiter": 500, "ftol": 1e-12},
        )
        assert found.success, found.message
        rows.append(found.x[-n:])
    return np.array(rows)


@cache
def best(objective: str) -> np.ndarray:
    """(S, S): row s is the best q of a head that sees t_i = s."""
    if objective in ("ce", "kl"):
        return CHAIN @ CHAIN
    return best_tv() if objective == "tv" else best_lk()


def exact_trunk(mode: str, objective: str) -> DeepseekV3MTP:
    config = tiny(
        {
            "mtp.mode": mode,
            "mtp.objective": {objective: 1.0},
            "mtp.detach": "all",
            "model.vocab_size": STATES,
            "model.hidden_size": C,
            "model.num_hidden_layers": 1,
            "model.first_k_dense_replace": 1,
            "model.max_position_embeddings": T,
        }
    )
    model = DeepseekV3MTP(config.model, config.mtp)
    model.init_weights(0)
    with torch.no_grad():
        (layer,) = model.model.layers
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(30 * torch.eye(STATES, C))
        rows = torch.from_numpy(np.log(CHAIN)).T / math.sqrt(C)  # (V, S)
        model.lm_head.weight.zero_()[:, :STATES] = rows
    model.freeze_trunk()
    return model


def table(model: DeepseekV3MTP) -> np.ndarray:
    """(S, S): what the head of depth 1 predicts behind each token, mean over 64 texts."""
    tokens = torch.randint(STATES, (64, STATES, T + 2))
    tokens[:, :, T - 1] = torch.arange(STATES)
    with torch.no_grad():
        logits = model.logits(tokens.flatten(0, 1))[1, :, T - 1]
    return logits.double().softmax(-1).view(64, STATES, STATES).mean(0).numpy()


@cache
def trained(mode: str, objective: str) -> np.ndarray:
    torch.manual_seed(0)
    model = exact_trunk(mode, objective)
    walk = torch.from_numpy(markov_tokens(CHAIN, ROWS * T + 2, seed=1).astype(np.int64))
    tokens = torch.stack([walk[row * T :][: T + 2] for row in range(ROWS)])
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer, steps = torch.optim.Adam(learning), 80
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - step / steps)
        optimizer.zero_grad()
        model(tokens, settings=LossSettings((1.0,))).loss.backward()
        optimizer.step()
    return table(model)


def test_the_teacher_is_the_chain():
    model = exact_trunk("parallel_linear", "kl")
    tokens = torch.randint(STATES, (2, T + 2))
    p = model.logits(tokens)[0].softmax(-1)
    assert np.abs(p.detach().numpy() - CHAIN[tokens[:, :T].numpy()]).max() < 1e-5


def test_the_optima_are_optima_and_differ():
    """No table that was found for another objective, and none nearby, is better."""
    noise = np.random.default_rng(0)
    for objective in ("ce", "kl", "tv", "lk"):
        least = loss_of(objective, best(objective).clip(1e-300))
        for other in ("ce", "tv", "lk"):
            assert loss_of(objective, best(other).clip(1e-300)) >= least - 1e-7
            for _ in range(50):
                near = best(other) * np.exp(0.1 * noise.normal(size=(STATES, STATES))) + 1e-6
                assert loss_of(objective, near / near.sum(1, keepdims=True)) >= least - 1e-7
    gain = loss_of("tv", best("ce")) - loss_of("tv", best("tv"))
    print({o: loss_of("tv", best(o)) for o in ("ce", "tv", "lk")})
    assert gain > 0.02


@pytest.mark.parametrize("objective", ["ce", "kl", "tv", "lk"])
def test_a_head_that_is_trained_on_an_objective_reaches_its_optimum(objective):
    q, least = (
        trained("parallel_linear", objective),
        loss_of(objective, best(objective).clip(1e-300)),
    )
    print(objective, loss_of(objective, q), least, "overlap", 1 - loss_of("tv", q))
    assert least - 1e-6 <= loss_of(objective, q) <= least + 0.01


@pytest.mark.parametrize("mode", ["parallel_linear", "parallel"])
def test_a_head_that_is_trained_on_tv_is_accepted_more_often_than_the_best_of_cross_entropy(mode):
    accepted, of_ce = 1 - loss_of("tv", trained(mode, "tv")), 1 - loss_of("tv", best("ce"))
    print(mode, accepted, of_ce, 1 - loss_of("tv", best("tv")))
    assert accepted > of_ce + 0.01
