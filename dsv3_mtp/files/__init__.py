"""Files that are written wholly or not at all (atomic.py), JSON that is read with its shape checked
(checked.py), digests (digest.py), and safetensors piece by piece (tensorfile.py).
"""
