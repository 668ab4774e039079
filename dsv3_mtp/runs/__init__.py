"""What is done with a run folder: its writing (folder.py), its model (model.py), its digests
(verify.py). files/run_folder.py reads it.
"""
