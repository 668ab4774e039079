# dsv3_mtp on one or more Hopper GPUs: CUDA 13, torch, DeepSpeed, Transformer Engine, flash-attn 4.
#
#   docker build -t dsv3_mtp . && docker run --gpus all --ipc=host -it -v "$PWD/runs:/dsv3_mtp/runs" dsv3_mtp
#   deepspeed tools/train.py --config configs/v3_small.yaml
#
# CI builds it without a GPU's packages: --build-arg BASE=ubuntu:24.04 --build-arg EXTRAS=hf. The whole has not been built
# yet: it is written against the published packages (docs/fp8.md says which parts have run on a GPU).
ARG BASE=nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04
FROM ${BASE}

RUN apt-get update && apt-get install -y --no-install-recommends git make g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH NVTE_FRAMEWORK=pytorch NVTE_CUDA_ARCHS=90 MAX_JOBS=8
ARG TORCH=torch==2.11.*
RUN python3 -m venv $VIRTUAL_ENV && pip install --no-cache-dir "$TORCH" ninja packaging setuptools wheel pybind11 hatchling
WORKDIR /dsv3_mtp
COPY pyproject.toml README.md LICENSE ./
COPY dsv3_mtp dsv3_mtp
COPY configs configs
# Transformer Engine compiles its torch extension against the torch above.
ARG EXTRAS=te,fa4
RUN pip install --no-cache-dir --no-build-isolation -e ".[$EXTRAS]"
COPY . .
