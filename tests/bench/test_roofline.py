"""bench/roofline.py: its counts are those of a count by hand."""

import os
import sys
from pathlib import Path

import pytest
import torch

interpreter = pytest.importorskip("triton.runtime.interpreter", reason="needs triton")
sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))  # as Python does for a script
import roofline  # noqa: E402

TRUNK = {"mtp.mode": "none", "model.num_hidden_layers": 2}  # one dense, one with experts


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Tests define their kernels for the interpreter: another class is not launched."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        monkeypatch.setattr(roofline, "JITFunction", interpreter.InterpretedFunction)


def by_hand(config):
    """FLOPs of forward and backward: products (of each weight three), attention (half a square,
    once forward and twice and a half backward).
    """
    c, tokens = config.model, config.train.micro_batch_size * config.data.seq_len
    heads, width = c.num_attention_heads, c.qk_nope_head_dim + c.qk_rope_head_dim
    attention = c.hidden_size * (c.q_lora_rank + c.kv_lora_rank + c.qk_rope_head_dim)
    attention += heads * c.q_lora_rank * width
    attention += heads * c.kv_lora_rank * (c.qk_nope_head_dim + c.v_head_dim)
    attention += heads * c.v_head_dim * c.hidden_size
    dense = 3 * c.hidden_size * c.intermediate_size
    expert = 3 * c.hidden_size * c.moe_intermediate_size
    moe = c.hidden_size * c.n_routed_experts + (c.num_experts_per_tok + c.n_shared_experts) * expert
    products = 6 * tokens * (2 * attention + dense + moe + c.hidden_size * c.vocab_size)
    square = tokens * config.data.seq_len * heads * (width + c.v_head_dim)
    return products, square


def test_flops_are_those_of_a_count_by_hand(make_tiny_config):
    config = make_tiny_config(TRUNK)
    products, square = by_hand(config)
    assert roofline.measure(config, 1).flops == products + 2 * 3.5 * square


def test_what_is_computed_again_takes_time_and_is_no_model_flop(make_tiny_config):
    config = make_tiny_config(TRUNK | {"train.activation_checkpointing": "full"})
    products, square = by_hand(config)
    count = roofline.measure(config, 1)
    assert count.flops > 1.2 * (products + 7 * square)  # three products become four, but the loss
    c, tokens = config.model, config.train.micro_batch_size * config.data.seq_len
    norms = 2 * (2 * c.hidden_size + c.q_lora_rank + c.kv_lora_rank) + c.hidden_size
    # a run's own count takes attention as products, and norms as weights of one
    model = products + 2 * 3 * square + 6 * tokens * norms
    assert roofline.utilisation(config, 1e-3) == pytest.approx(model / 1e-3 / 989e12, rel=1e-12)


def test_a_layer_more_launches_what_a_layer_launches(make_tiny_config):
    """Of 12 products of weights in attention (q_a, q_b, kv_a, kv_b, o; three each), 9 of shared
    experts and 3 of the router none is lost; grouped ones are 6, attention is 2.
    """
    two, three = (
        roofline.measure(make_tiny_config(TRUNK | {"model.num_hidden_layers": layers}), 1).launches
        for layers in (2, 3)
    )
    layer = three - two
    assert (layer["products"], layer["grouped"], layer["attention"]) == (15 + 9 + 3, 6, 2)


@pytest.mark.parametrize(
    ("moved", "flops", "rate", "seconds"),
    [
        (roofline.BANDWIDTH, roofline.RATE / 2, 1.0, 1.0),  # bound by bytes
        (roofline.BANDWIDTH, roofline.RATE, 0.5, 2.0),  # by products at half the rate
        (16, 16, 1.0, roofline.LATENCY),
    ],
)
def test_an_operation_takes_the_longest_of_bytes_flops_and_a_launch(moved, flops, rate, seconds):
    count = roofline.Count()
    count.add("products", moved, flops, rate)
    assert count.seconds == {"products": pytest.approx(seconds)}


def test_what_launches_nothing_is_not_counted():
    x = torch.empty(4, 6, device="meta")
    with roofline.Count() as count:
        x.new_empty(5), torch.empty_like(x), x.detach(), x.t()[1:].unsqueeze(0)
    assert not count.launches
    with count:
        x + x
    assert count.launches == {"passes": 1} and count.seconds == {"passes": roofline.LATENCY}


def test_the_host_waits_once_in_a_layer_of_experts_over_ranks_and_never_on_one_gpu(
    make_tiny_config,
):
    """Without storage every other wait is an error: a number of a meta tensor, nonzero, tolist."""
    for layers in (2, 4):
        config = make_tiny_config(TRUNK | {"model.num_hidden_layers": layers})
        waits = [roofline.measure(config, ranks).launches["host waits"] for ranks in (1, 2)]
        assert waits == [0, layers - 1]
