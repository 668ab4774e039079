"""llama.cpp on the same weights, for `bench/decode.py --llama PYTHON`: this project and llama.cpp
in turns, in float32 and in bfloat16.

PYTHON is an interpreter with the packages llama-cpp-python and gguf, which have no place in this
project's environment. This file runs there as a child: it writes the weights as GGUF of the
architecture `deepseek2`, and decodes when it is asked to. Its seconds are CPU seconds of its own
process, of one thread.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any


def report(python: str, model: Any, prompt: list[int], count: int, rounds: int) -> str:
    """us/token of both, and the ratio of each round. Where llama.cpp does not run: why."""
    import copy

    import torch
    from timing import quartiles, timed

    from dsv3_mtp.decode.generate import Settings, generate

    lines = [
        f"{'llama.cpp':12}{'us/token':>10}{'ours':>10}{'ours / llama.cpp':>26}{'same tokens':>14}"
    ]
    for dtype in (torch.float32, torch.bfloat16):
        own = copy.deepcopy(model)
        for parameter in own.parameters():  # as in a run: router biases stay float32
            parameter.data = parameter.data.to(dtype)
        try:
            child = Child(python, own, prompt, count)
        except ValueError as error:
            return f"llama.cpp: not run: {error}"
        settings, times = Settings(max_new_tokens=count), []
        expected = generate(own, [prompt], settings).tokens[0]
        for turn in range(1 + rounds):
            theirs, tokens = child()
            ours = timed(partial(generate, own, [prompt], settings), torch.device("cpu"))
            if turn:  # the first warms both up
                times.append((theirs, ours))
        child.close()
        low, middle, high = quartiles([ours / theirs for theirs, ours in times])
        us = [quartiles([pair[k] for pair in times])[1] / count * 1e6 for k in (0, 1)]
        ratio = f"{middle:.2f} [{low:.2f}, {high:.2f}]"
        same = next((k for k in range(count) if tokens[k] != expected[k]), count)
        row = f"{str(dtype).removeprefix('torch.'):12}{us[0]:>10.0f}{us[1]:>10.0f}{ratio:>26}"
        lines.append(f"{row}{same:>8} of {count}")
    return "\n".join(lines)


class Child:
    """llama.cpp in a process of its own. A call decodes once: CPU seconds, and the tokens."""

    def __init__(self, python: str, model: Any, prompt: list[int], count: int):
        """Raises ValueError where llama.cpp is not there, or reads this model otherwise."""
        config = model.config.model_dump()
        if config["q_lora_rank"] is None or config["rope_scaling"] is not None:
            raise ValueError("it reads no model without q_lora_rank, and YaRN otherwise")
        self.folder = tempfile.TemporaryDirectory()
        save(model, Path(self.folder.name))
        work = {"prompt": prompt, "count": count, "folder": self.folder.name, "config": config}
        self.process = subprocess.Popen(
            [python, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._ask(json.dumps(work))

    def _ask(self, line: str) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, and says why below
            print(line, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            error = self.process.communicate()[1].strip().splitlines() or ["no output"]
            raise ValueError(error[-1])
        return json.loads(answer)

    def __call__(self) -> tuple[float, list[int]]:
        seconds, tokens = self._ask("go")
        return seconds, tokens

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.folder.cleanup()


def save(model: Any, folder: Path) -> None:
    """The trunk's tensors under llama.cpp's names: a file of raw numbers for each, and a list."""
    import torch

    config, state = model.config, model.state_dict()
    heads, nope = config.num_attention_heads, config.qk_nope_head_dim
    names = {"model.embed_tokens.weight": "token_embd.weight", "lm_head.weight": "output.weight"}
    names["model.norm.weight"] = "output_norm.weight"
    tensors = {new: state[old] for old, new in names.items()}
    for i in range(config.num_hidden_layers):
        old, new = f"model.layers.{i}.", f"blk.{i}."
        for mine, theirs in LAYER.items():
            if old + mine in state:
                tensors[new + theirs] = state[old + mine]
        up = state[old + "self_attn.kv_b_proj.weight"].unflatten(0, (heads, -1))
        tensors[new + "attn_k_b.weight"] = up[:, :nope].transpose(1, 2)
        tensors[new + "attn_v_b.weight"] = up[:, nope:]
        if (both := state.get(old + "mlp.experts.gate_up_proj")) is not None:
            gate, gate_up = both.chunk(2, dim=1)
            tensors[new + "ffn_gate_exps.weight"] = gate
            tensors[new + "ffn_up_exps.weight"] = gate_up
    listing = {}
    for number, (name, x) in enumerate(tensors.items()):
        # norms and router are float32 there whatever the rest is
        wide = x.ndim == 1 or name.endswith("ffn_gate_inp.weight")
        x = (x.float() if wide else x).contiguous()
        listing[name] = [str(number), str(x.dtype).removeprefix("torch."), list(x.shape)]
        (folder / str(number)).write_bytes(x.view(torch.uint8).numpy().tobytes())
    (folder / "tensors.json").write_text(json.dumps(listing))


LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
}


# --- in the other interpreter -------------------------------------------------------------------


def write_gguf(folder: Path, config: dict[str, Any], target: Path) -> None:
    import gguf  # type: ignore[import-not-found]
    import numpy as np

    writer, c = gguf.GGUFWriter(str(target), "deepseek2"), config
    rank, rope = c["kv_lora_rank"], c["qk_rope_head_dim"]
    for key, value in {
        "context_length": c["max_position_embeddings"],
        "embedding_length": c["hidden_size"],
        "block_count": c["num_hidden_layers"],
        "feed_forward_length": c["intermediate_size"],
        "attention.head_count": c["num_attention_heads"],
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": c["q_lora_rank"],
        "attention.kv_lora_rank": rank,
        "attention.key_length": rank + rope,
        "attention.value_length": rank,
        "attention.key_length_mla": c["qk_nope_head_dim"] + rope,
        "attention.value_length_mla": c["v_head_dim"],
        "rope.dimension_count": rope,
        "leading_dense_block_count": c["first_k_dense_replace"],
        "vocab_size": c["vocab_size"],
        "expert_feed_forward_length": c["moe_intermediate_size"],
        "expert_count": c["n_routed_experts"],
        "expert_used_count": c["num_experts_per_tok"],
        "expert_shared_count": c["n_shared_experts"],
        "expert_group_count": c["n_group"],
        "expert_group_used_count": c["topk_group"],
        "expert_gating_func": 2,  # sigmoid
    }.items():
        writer.add_uint32(f"deepseek2.{key}", value)
    writer.add_float32("deepseek2.rope.freq_base", c["rope_theta"])
    writer.add_float32("deepseek2.attention.layer_norm_rms_epsilon", c["rms_norm_eps"])
    writer.add_float32("deepseek2.expert_weights_scale", c["routed_scaling_factor"])
    writer.add_bool("deepseek2.expert_weights_norm", c["norm_topk_prob"])
    writer.add_tokenizer_model("none")
    for name, (file, dtype, shape) in json.loads((folder / "tensors.json").read_text()).items():
        data = np.fromfile(folder / file, dtype=np.uint8)
        if dtype == "float32":
            writer.add_tensor(name, data.view(np.float32).reshape(shape))
        else:
            rows = data.reshape(*shape[:-1], -1)  # bytes
            writer.add_tensor(name, rows, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def child() -> None:
    import time

    import llama_cpp  # type: ignore[import-not-found]

    work = json.loads(sys.stdin.readline())
    folder, prompt, count = Path(work["folder"]), work["prompt"], work["count"]
    write_gguf(folder, work["config"], folder / "model.gguf")
    silent = llama_cpp.llama_log_callback(lambda *_: None)  # C keeps no reference
    llama_cpp.llama_log_set(silent, None)
    llama_cpp.llama_backend_init()
    path = str(folder / "model.gguf").encode()
    model = llama_cpp.llama_model_load_from_file(path, llama_cpp.llama_model_default_params())
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = settings.n_batch = len(prompt) + count
    settings.n_threads = settings.n_threads_batch = 1
    settings.type_k = settings.type_v = 0  # float32
    context = llama_cpp.llama_init_from_model(model, settings)
    if not model or not context:
        sys.exit("llama.cpp did not load the model")
    vocab = work["config"]["vocab_size"]
    print(json.dumps("ready"), flush=True)
    import numpy as np

    for _ in sys.stdin:
        start, now = time.process_time(), list(prompt)
        tokens: list[int] = []
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        while len(tokens) < count:
            ids = (llama_cpp.llama_token * len(now))(*now)
            if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(ids, len(now))):
                sys.exit("llama_decode failed")
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), (vocab,))
            now = [int(logits.argmax())]
            tokens += now
        print(json.dumps([time.process_time() - start, tokens]), flush=True)


if __name__ == "__main__":
    child()
