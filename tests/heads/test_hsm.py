"""Hidden state mixing against the rule written out, slot by slot, in float64."""

import pytest
import torch

from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from tests.conftest import tiny

T, D = 12, 3


@pytest.fixture(scope="module")
def model() -> DeepseekV3MTP:
    config = tiny({"mtp.mode": "hsm", "mtp.num_nextn_predict_layers": D})
    model = DeepseekV3MTP(config.model, config.mtp)
    model.init_weights(1)
    return model.double()


@pytest.fixture
def seen(model, monkeypatch):
    """What the modules are given and return: the inputs, and (previous state, state) of each."""
    seen: dict = {"modules": []}
    hook = model.mtp.register_forward_pre_hook(lambda _, args: seen.update(inputs=args[0]))
    for module in model.mtp.layers:
        merge, head = module.merge, module.shared_head.forward

        def recorded(hidden, embedding, merge=merge):
            seen["modules"].append([hidden])
            return merge(hidden, embedding)

        def normed(x, head=head):
            seen["modules"][-1].append(head(x))
            return seen["modules"][-1][1]

        monkeypatch.setattr(module, "merge", recorded)
        monkeypatch.setattr(module.shared_head, "forward", normed)
    yield seen
    hook.remove()


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_each_slot_reads_the_drawn_depth_at_the_slot_that_predicts_the_same_token(
    model, seen, masked
):
    tokens = torch.randint(64, (4, T + 1 + D))
    documents = (torch.arange(T + 1 + D) // 5).expand_as(tokens) if masked else None
    model.train()
    model.head_rows(tokens, documents)
    inputs = seen["inputs"]
    states = [inputs.trunk.post_norm, *(out for _, out in seen["modules"])]
    taken = [0] * D
    for k in range(1, 1 + D):
        draws = inputs.uniform(k)
        for row in range(len(tokens)):
            for i in range(T):
                j = int(draws[row, i] * k)
                slot = i + k - 1 - j
                if slot >= T or (masked and documents[row, slot] != documents[row, i]):
                    j, slot = k - 1, i
                assert torch.equal(seen["modules"][k - 1][0][row, i], states[j][row, slot])
                taken[j] += k == D
    assert min(taken) > 4  # of the last module, each of its D candidates


@torch.no_grad()
def test_validation_is_the_chain(model):
    config = tiny({"mtp.num_nextn_predict_layers": D})
    chain = DeepseekV3MTP(config.model, config.mtp).double()
    chain.load_state_dict(model.state_dict())
    tokens = torch.randint(64, (2, T + 1 + D))
    model.eval()
    assert torch.equal(model.logits(tokens), chain.logits(tokens))
    model.train()
    assert not torch.equal(model.logits(tokens)[2:], chain.logits(tokens)[2:])
