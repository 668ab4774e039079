"""What a trained run knows, beyond its means: `dsv3 analyse` (docs/analyse.md).

slots.py reads a model along the validation windows, slot by slot. Each other file is one analysis
of these slots; analyse.py puts them together, words.py and picture.py show them.
"""
