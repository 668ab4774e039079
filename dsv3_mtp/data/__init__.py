"""Data: text to memory-mapped token shards, or generated tasks; windows of them in a resumable
order. numpy only.

opening.py    what a config names, opened: the training sampler and the validation source
sampler.py    windows of tokens, in an order that any number of ranks can resume
source.py     what windows are cut from: documents in files (shards.py, megatron.py);  tasks.py makes examples instead
markov.py     what can be known about one of the tasks
prepare.py    text to such files: documents.py and stdlib.py read, tokenizer.py and tokenise.py encode
"""
