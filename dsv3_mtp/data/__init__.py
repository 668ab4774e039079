"""Data: text to memory-mapped token shards, or generated tasks; windows of them in a resumable
order. numpy only.

opening.py    what a config names, opened: the training sampler and the validation source
sampler.py    windows of tokens, in an order that any number of ranks can resume
source.py     what windows are cut from: documents in files (shards.py, megatron.py)
prepare.py    text to such files: documents.py, records.py, stdlib.py and sitelib.py read it,
              tokenizer.py and tokenise.py encode it;  arguments.py what decides the result
ngrams.py     what tables of one to three tokens make of the same text
"""
