"""Data: text to memory-mapped token shards, or generated tasks; windows of them in a resumable order. numpy only."""

from dsv3_mtp.data.corpus import build_corpus
from dsv3_mtp.data.prepare import Arguments, prepare
from dsv3_mtp.data.sampler import Batch, Sampler, sequential_windows
from dsv3_mtp.data.shards import read_folder_index, verify_folder
from dsv3_mtp.data.source import Source, check_vocab, open_source
from dsv3_mtp.data.tasks import TaskSource

__all__ = [
    "Arguments",
    "Batch",
    "Sampler",
    "Source",
    "TaskSource",
    "build_corpus",
    "check_vocab",
    "open_source",
    "prepare",
    "read_folder_index",
    "sequential_windows",
    "verify_folder",
]
