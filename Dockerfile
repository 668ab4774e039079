# dsv3_mtp on one or more Hopper GPUs: CUDA 13, torch, DeepSpeed, Transformer Engine, flash-attn 4.
#
#   docker build -t dsv3_mtp . && docker run --gpus all --ipc=host -it -v "$PWD/runs:/dsv3_mtp/runs" dsv3_mtp
#   deepspeed tools/train.py --config configs/v3_small.yaml
#
# Not built here: written against the published packages (docs/fp8.md says which parts have run on a GPU).
FROM nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04

RUN apt-get update && apt-get install -y --no-install-recommends git make g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH NVTE_FRAMEWORK=pytorch NVTE_CUDA_ARCHS=90 MAX_JOBS=8
RUN python3 -m venv $VIRTUAL_ENV && pip install --no-cache-dir "torch==2.11.*" ninja packaging setuptools wheel pybind11
WORKDIR /dsv3_mtp
COPY pyproject.toml README.md LICENSE ./
COPY dsv3_mtp dsv3_mtp
COPY configs configs
# Transformer Engine compiles its torch extension against the torch above.
RUN pip install --no-cache-dir --no-build-isolation -e '.[te,fa4]'
COPY . .
