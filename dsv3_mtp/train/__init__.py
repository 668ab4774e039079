"""A training run: trainer.py and what it alone needs."""
