"""Operations of the model that have more than one implementation: torch, C on a CPU (csrc/), Triton
on a GPU.
"""
