"""Operations of the model that have more than one implementation: torch, C on a CPU (c.py, csrc/),
Triton on a GPU (triton_kernels.py).

The model calls norm, swiglu, rotary, attention, experts, cross_entropy; choice.py decides what
runs, compute.py is what a model is given when it is built, cores.py are the attention kernels to
choose from.
"""
