"""What SGLang says of an export: run by the python of an environment that has it (test_sglang.py).

    python tests/hf/sglang_engine.py < request.json > answer.json

Request and answer are those of vllm_engine.py. The engine's scheduler is a process that imports
this file again, so kernels are put in place at its top.
"""

import json
import os
import sys
from pathlib import Path

import sglang_kernels

os.environ |= {"HF_HUB_OFFLINE": "1", "SGLANG_USE_CPU_ENGINE": "1", "CUDA_VISIBLE_DEVICES": ""}
sglang_kernels.install()


def start(request: dict, config: dict):
    from sglang import Engine

    drafts = {
        "speculative_algorithm": "EAGLE",
        "speculative_num_steps": request["drafts"],
        "speculative_eagle_topk": 1,
        "speculative_num_draft_tokens": request["drafts"] + 1,
    }
    return Engine(
        model_path=request["folder"],
        skip_tokenizer_init=True,
        device="cpu",
        dtype="float32",
        # named for both phases: as the one backend it gives way to another where there is no AMX
        attention_backend="torch_native",
        prefill_attention_backend="intel_amx",
        decode_attention_backend="intel_amx",
        context_length=config["max_position_embeddings"],
        max_total_tokens=1024,
        max_running_requests=1,  # each prompt alone, as the counts of the other side are made
        disable_radix_cache=True,
        disable_overlap_schedule=True,
        log_level="warning",
        **(drafts if request["drafts"] else {}),
    )


def generate(engine, prompt: list[int], new_tokens: int, **options) -> dict:
    sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
    return engine.generate(input_ids=prompt, sampling_params=sampling, **options)


def answer(request: dict) -> dict:
    config = json.loads(Path(request["folder"], "config.json").read_text())
    engine = start(request, config)
    said = [generate(engine, prompt, request["new_tokens"]) for prompt in request["prompts"]]
    found: dict = {"tokens": [one["output_ids"] for one in said]}
    if request["drafts"]:
        found["steps"] = sum(one["meta_info"]["spec_verify_ct"] for one in said)
        # of each prompt the number of steps of which 0, 1, .. drafts stood
        stood = [one["meta_info"]["spec_correct_drafts_histogram"] for one in said]
        found["accepted"] = [
            sum(sum(counts[k + 1 :]) for counts in stood) for k in range(request["drafts"])
        ]
    else:
        scored = {"logprob_start_len": 0, "top_logprobs_num": config["vocab_size"]}
        said = [
            generate(engine, prompt, 1, return_logprob=True, **scored)
            for prompt in request["prompts"]
        ]
        found["logprobs"] = [
            [
                [logprob for logprob, *_ in sorted(slot, key=lambda one: one[1])]
                for slot in one["meta_info"]["input_top_logprobs"][1:]
            ]
            for one in said
        ]
    engine.shutdown()
    return found


if __name__ == "__main__":
    print(json.dumps(answer(json.load(sys.stdin))))
