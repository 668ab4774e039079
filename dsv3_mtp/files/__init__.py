"""Files that are written wholly or not at all (atomic.py), JSON that is read with its shape checked
(checked.py), digests (digest.py), safetensors piece by piece (tensorfile.py), and what a run folder
holds: run_folder.py, and of its checkpoints fragments.py.
"""
