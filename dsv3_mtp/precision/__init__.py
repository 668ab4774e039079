"""Where numbers lose bits on purpose: FP8 linear layers (V3 section 3.3).

quantise.py is the quantiser, triton_quantise.py the same as one kernel for GPUs, linear.py the
three products of a layer; emulate.py, hopper.py (its experts by triton_grouped.py) and te.py
compute them, convert.py says which layers a run builds in FP8. te.py alone imports Transformer
Engine here (ops/te_library.py loads it), the two files triton_*.py alone Triton.
"""
