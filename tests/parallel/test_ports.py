"""Ranks of one host meet where no other host can connect."""

import os
from pathlib import Path

import pytest

from tests.ranks import run_ranks

pytestmark = pytest.mark.dist


def listening() -> list[str]:
    """Addresses, in hexadecimal, on which this process listens (Linux)."""
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    own = {os.readlink(link) for link in links if os.path.islink(link)}
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:
                found.append(fields[1].rpartition(":")[0])
    return found


def join(folder: Path, alone: bool) -> None:
    import torch

    from dsv3_mtp.parallel.launch import on_all, start, starting

    rank = os.environ["RANK"]
    if alone:  # as plain python starts
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
    with starting(60):
        world = start(threads=1, timeout_s=60)
        on_all(world, lambda: None)
    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    assert total == world.size
    store = type(torch.distributed.distributed_c10d._get_default_store()).__name__
    (folder / f"rank{rank}").write_text(" ".join([store, *listening()]))


@pytest.mark.parametrize(("ranks", "alone"), [(1, True), (2, False)])
def test_only_this_host_can_connect_to_the_ranks_of_one_host(tmp_path, ranks, alone):
    codes = run_ranks(join, tmp_path, alone, world_size=ranks, log=tmp_path / "log")
    logs = "".join(path.read_text() for path in tmp_path.glob("log.rank*"))
    assert codes == [0] * ranks, logs
    for rank in range(ranks):
        _, *addresses = (tmp_path / f"rank{rank}").read_text().split()
        assert set(addresses) <= {"0100007F"}, addresses
