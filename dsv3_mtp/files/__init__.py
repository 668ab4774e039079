"""Files that are written wholly or not at all (atomic.py), and safetensors piece by piece
(tensorfile.py).
"""
