"""What vLLM says of an export: run by the python of an environment that has it (test_vllm.py).

    python tests/hf/vllm_engine.py < request.json > answer.json

Request: {folder, prompts, new_tokens, drafts}. Answer: greedy tokens of each prompt; of each prompt
the log-probabilities of all tokens behind its slots 0, 1, ..; counts of the drafts.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_MLA_DISABLE": "1",  # its MLA kernels are for rank 512 and rope 64 alone
}


def answer(request: dict) -> dict:
    from vllm import LLM, SamplingParams

    config = json.loads(Path(request["folder"], "config.json").read_text())
    drafts = {"method": "mtp", "num_speculative_tokens": request["drafts"]}
    engine = LLM(
        request["folder"],
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=config["max_position_embeddings"],
        max_num_seqs=1,  # each prompt alone, as the counts of the other side are made
        max_logprobs=config["vocab_size"],
        # vllm-cpu 0.32: its compiled rotary operation is wrong for three-dimensional queries
        compilation_config={"custom_ops": ["none"]},
        speculative_config=drafts if request["drafts"] else None,
        disable_log_stats=False,
    )
    greedy = SamplingParams(
        temperature=0, max_tokens=request["new_tokens"], ignore_eos=True, detokenize=False
    )
    scored = SamplingParams(max_tokens=1, prompt_logprobs=config["vocab_size"], detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]
    tokens = [list(out.outputs[0].token_ids) for out in engine.generate(prompts, greedy)]
    counts = {metric.name: metric for metric in engine.get_metrics()}
    found = {"tokens": tokens}
    if request["drafts"]:
        accepted = counts["vllm:spec_decode_num_accepted_tokens_per_pos"].values
        found |= {"steps": counts["vllm:spec_decode_num_drafts"].value, "accepted": accepted}
    else:
        found["logprobs"] = [
            [[slot[token].logprob for token in sorted(slot)] for slot in out.prompt_logprobs[1:]]
            for out in engine.generate(prompts, scored)
        ]
    return found


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        found = answer(json.load(sys.stdin))
    print(json.dumps(found))
