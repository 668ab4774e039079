"""A run folder: what it holds (folder.py), its checkpoints (loading.py, fragments.py), its model
(model.py).
"""
