"""Checkpoints that transformers, vLLM and SGLang read: DeepSeek-V3's layout, both ways, one tensor
in memory at a time.

keys.py says which tensors a checkpoint has, settings.py what its config.json says, files.py reads
and writes safetensors; load.py fills a model, export.py and importer.py are
the two tools.
"""

from dsv3_mtp.hf.export import export_hf
from dsv3_mtp.hf.importer import import_hf
from dsv3_mtp.hf.load import load_hf, load_weights

__all__ = ["export_hf", "import_hf", "load_hf", "load_weights"]
