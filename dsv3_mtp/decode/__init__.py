"""Decoding with caches: windows of slots -> drafters, verification -> the generation loop in
dsv3_mtp/decode/generate.py.

Shape letters beside those of dsv3_mtp/model: S slots of a cache, K drafts, m the index of a row's
last known token. The trunk has processed slots 0..m-1 of a row; slot i of depth k reads tokens up
to t_{i+k} and predicts t_{i+k+1}.
"""
