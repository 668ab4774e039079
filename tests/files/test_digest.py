"""A digest tells each damage of a few bytes; it is zlib's CRC-32 of the whole file."""

import zlib

import pytest
import torch
from safetensors.torch import load_file

from dsv3_mtp.files.digest import BLOCK, difference, file_digest
from dsv3_mtp.files.tensorfile import Entry, write_file


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1])
def test_the_digest_of_a_file_is_zlibs(tmp_path, size):
    content = bytes(range(256)) * (size // 256 + 1)
    (tmp_path / "x").write_bytes(content[:size])
    assert file_digest(tmp_path / "x") == f"crc32:{zlib.crc32(content[:size]):08x}"


def test_what_the_writer_returns_is_the_digest_of_what_it_wrote(tmp_path):
    tensors = [torch.randn(3, 5), torch.randn(7, dtype=torch.bfloat16), torch.empty(0)]
    entries = [Entry(f"t{n}", x.dtype, tuple(x.shape)) for n, x in enumerate(tensors)]
    digest = write_file(tmp_path / "x", entries, iter(tensors))
    assert digest == file_digest(tmp_path / "x")
    assert torch.equal(load_file(tmp_path / "x")["t0"], tensors[0])


def test_every_flipped_bit_and_a_blank_page_are_told(tmp_path):
    content = bytearray(torch.arange(256, dtype=torch.uint8).numpy().tobytes() * 40)
    path = tmp_path / "x"
    path.write_bytes(content)
    recorded = file_digest(path)
    assert difference(path, recorded) is None
    for place in range(0, len(content), 511):
        for bit in (1, 128):
            content[place] ^= bit
            path.write_bytes(content)
            assert "is not what was written" in str(difference(path, recorded))
            content[place] ^= bit
    content[4096:8192] = bytes(4096)
    path.write_bytes(content)
    assert "is not what was written" in str(difference(path, recorded))
    path.unlink()
    assert "cannot be read (No such file" in str(difference(path, recorded))
