"""Tiny models of every head type."""

from collections.abc import Callable

import pytest

from dsv3_mtp.decode.decoder import Decoder
from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from tests.decode.plain import HEADS, train_on_cycle
from tests.made_runs import randomise


@pytest.fixture(scope="session")
def made() -> dict:
    return {}


@pytest.fixture
def in_pieces(monkeypatch) -> None:
    """Steps go piece by piece, where they could be one call of C."""
    monkeypatch.setattr(Decoder, "whole_step", lambda self, drafter: None)


@pytest.fixture
def make_model(make_tiny_config, made: dict) -> Callable[..., DeepseekV3MTP]:
    """make_model(heads, trained=False, **overrides): random weights, or a few steps on a noisy
    cycle, cached.

    A trained one accepts some drafts and rejects others; a random one rejects nearly all.
    """

    def make(
        heads: str = "one_module", *, trained: bool = False, overrides: dict | None = None
    ) -> DeepseekV3MTP:
        key = (heads, trained, str(overrides))
        if key not in made:
            config = make_tiny_config(
                {"model.max_position_embeddings": 32, **HEADS[heads], **(overrides or {})}
            )
            model = randomise(DeepseekV3MTP(config.model, config.mtp))
            if trained:
                train_on_cycle(model)
            made[key] = model.requires_grad_(False).eval()
        return made[key]

    return make
