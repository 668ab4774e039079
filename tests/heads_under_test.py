"""Every kind of head that the property tests run: the package's, the example's, and the tests' own.

A kind that registers itself is here without an edit; one of a file elsewhere is one line.
"""

from typing import Any

from dsv3_mtp.heads import registry

OTHERS = [
    "examples.bag_head:BagHead",
    "tests.example_heads:ConfidenceHead",
    "tests.example_heads:BiasedHead",
    "tests.example_heads:InnerHead",
]
# Options of the package's heads that are another computation.
ABLATIONS: dict[str, dict[str, Any]] = {
    "shared": {"mtp.share_weights": True},
    "chain_trunk": {"mtp.chain": "trunk"},
    "no_embedding": {"mtp.embed": False},
    "pre_norm": {"mtp.trunk_hidden": "pre_norm"},
    "dense": {"mtp.block": "dense"},
    "hydra++": {"mtp.mode": "hydra", "mtp.num_layers": 2, "mtp.prefix": True},
}
MODES = [*registry(), *OTHERS]
KINDS: dict[str, dict[str, Any]] = {mode.rpartition(":")[2]: {"mtp.mode": mode} for mode in MODES}
# name -> keys of a config, the number of depths not among them
HEADS = KINDS | ABLATIONS
