#!/bin/bash
# One GPU session of ten minutes, most valuable first: bash bench/gpu_session.sh, in the repository's root.
#
# Every step has its own process group, limit and log. A step that fails, hangs or ignores signals
# loses itself only. What is known is on disk as it becomes known:
#   $OUT/summary.txt   a line per step, as it ends    $OUT/log.txt   everything
#   $OUT/*.json        figures of the benchmarks      $OUT/*.json.gz traces
# BUDGET: seconds for all (540). DRY=1: tiny sizes on a CPU, to try the script. ONLY: a regular
# expression of step names. DATA: prefix of a Megatron pair with at most 2048 token ids.
set -u
OUT=${OUT:-gpu_session}; mkdir -p "$OUT"; OUT=$(cd "$OUT" && pwd)
DRY=${DRY:-}; RUNS=$OUT/runs; S=$OUT/summary.txt; L=$OUT/log.txt; T0=$(date +%s)
DATA=${DATA:-data/pystdlib-2048}; END=$((T0 + ${BUDGET:-540})); ONLY=${ONLY:-.}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TORCH_NCCL_ASYNC_ERROR_HANDLING=1
export DS_ACCELERATOR=${DS_ACCELERATOR:-$([ -n "$DRY" ] && echo cpu || echo cuda)} OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$OUT/triton}
CHILD=; trap '[ -n "$CHILD" ] && kill -KILL -- -"$CHILD" 2>/dev/null; exit 130' INT TERM HUP

step() {  # name, limit in seconds, command...
  local name=$1 limit=$2 left=$((END - $(date +%s))); shift 2
  [[ $name =~ $ONLY ]] || return 0
  if [ "$left" -lt 10 ]; then echo "$name: no time left" | tee -a "$S"; return 0; fi
  [ -n "$DRY" ] && limit=$((4 * limit))  # many share a CPU
  [ "$limit" -gt "$left" ] && limit=$left
  echo "=== $name (limit $limit s, at $(($(date +%s) - T0)) s)" >> "$L"
  local t=$(date +%s) from=$(($(wc -l < "$L") + 1)) rc=0
  setsid timeout --signal=INT --kill-after=8 "$limit" "$@" < /dev/null >> "$L" 2>&1 & CHILD=$!
  wait "$CHILD" || rc=$?
  kill -KILL -- -"$CHILD" 2>/dev/null; CHILD=  # what it left behind
  local found; found=$(tail -n +"$from" "$L" | grep -aE 'cudnn|tok/s|[0-9]x \[|passed|failed|[Ee]rror|finished' | tail -1 | cut -c1-160)
  echo "$name: rc $rc, $(($(date +%s) - t)) s | $found" | tee -a "$S"
}

TRAIN="python tools/train.py --set run.dir=$RUNS --set data.train=$DATA --set data.val=$DATA --set data.build=null
  --set model.vocab_size=2048 --set log.every=1 --set log.tensorboard=false --set eval.every=0
  --set eval.batches=1 --set train.dtype=bfloat16 --set checkpoint.every=1000"
TOKENS=2621440 MORE=3276800 ROUNDS=5 LAYERS=6 PYTEST="python -m pytest -q -x -p no:cacheprovider"
SMALL="--config configs/v3_small.yaml --set train.batch_size=64 --set train.micro_batch_size=32 --set data.seq_len=1024"
STEP="python bench/step.py" BIG="--config configs/v3_3b.yaml"
KERNELS="attention passes experts loss"
if [ -n "$DRY" ]; then
  TINY="--set model.hidden_size=64 --set model.intermediate_size=96 --set model.moe_intermediate_size=32
    --set model.num_hidden_layers=2 --set model.n_routed_experts=8 --set model.n_group=1 --set model.topk_group=1
    --set model.num_experts_per_tok=2 --set model.vocab_size=256 --set data.seq_len=32 --set train.micro_batch_size=2"
  SMALL="--config configs/v3_small.yaml $TINY --set train.batch_size=4"
  TRAIN+=" --set model.vocab_size=256"; TOKENS=512 MORE=640 ROUNDS=1 LAYERS=2 BIG="$BIG $TINY"
fi

step env 20 python -c 'import torch, deepspeed; print("torch", torch.__version__, "deepspeed", deepspeed.__version__, "cudnn", torch.backends.cudnn.version(), torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")'
step train_small 80 $TRAIN $SMALL --set run.name=a --set train.total_tokens=$TOKENS --profile steps=3:4
step triton_kernels 60 $PYTEST tests/ops/test_triton_kernels.py --deselect tests/ops/test_triton_kernels.py::test_every_kernel_compiles_for
step bench_3b_6layers 110 $STEP $BIG --set mtp.mode=none --set model.num_hidden_layers=$LAYERS --set train.micro_batch_size=2 --set train.activation_checkpointing=none --against transformers --rounds $ROUNDS --json "$OUT/3b_6layers.json"
step bench_3b_parts 90 $STEP $BIG --parts --rounds $ROUNDS --json "$OUT/3b_parts.json"
step bench_small 60 $STEP $SMALL --set mtp.mode=none --against transformers --rounds $ROUNDS --json "$OUT/small.json"
[ -n "$DRY" ] || step kernels 60 python bench/kernels.py $KERNELS
step resume_small 60 $TRAIN $SMALL --set run.name=a --set train.total_tokens=$MORE
[ -n "$DRY" ] || step transformer_engine 45 python bench/gpu_check.py --out "$OUT/gpu_check.md"
for backend in te torch emulate; do
  [ -n "$DRY" ] && [ $backend != emulate ] && continue
  [ -z "$DRY" ] && [ $backend = emulate ] && continue
  step fp8_$backend 60 $TRAIN $SMALL --set run.name=$backend --set train.total_tokens=$TOKENS --set fp8.enabled=true --set fp8.backend=$backend
done
[ -n "$DRY" ] || step gpu_tests 90 $PYTEST tests/gpu/test_model.py tests/gpu/test_precision.py tests/gpu/test_quantise.py
[ -n "$DRY" ] || step gpu_train_tests 120 $PYTEST tests/gpu/test_train.py
for run in "$RUNS"/*/; do
  cp "$run"/trace.rank0.json.gz "$OUT/$(basename "$run")_trace.json.gz" 2>/dev/null
  [ -f "$run/metrics.jsonl" ] && cp "$run/metrics.jsonl" "$OUT/$(basename "$run").jsonl"
done
cat "$S"
