"""Acceptance without decoding: one teacher-forced pass over the model's own greedy text."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv3_mtp.model.causal_lm import DeepseekV3MTP


@torch.no_grad()
def accepted_prefixes(model: DeepseekV3MTP, tokens: Sequence[int], *, prompt_length: int) -> Tensor:
    """How many of depths 1..D a real draft would have got right at every place of greedy text.

    On text that the model chose itself, drafts count only as long as they equal the text; up to
    there each module sees what the training forward shows it. So the training forward alone gives
    what drafting and verifying would, for D heads of any kind. On other text this is not acceptance
    but `agreement` with the labels.

    Args:
        tokens: prompt and the greedy continuation, L tokens.
    Returns:
        (L - 1 - prompt_length, D) bool, row r for m = prompt_length + r the last known token: [r, k-1] says that drafts
        1..k would all stand. Drafts behind the end of the text count as wrong.
    """
    length, depths = len(tokens), model.depths
    device = model.lm_head.weight.device
    # T = L - 1 slots need L + D tokens
    text = torch.tensor([[*tokens, *[0] * depths]], device=device)
    hiddens, _ = model.hidden_states(text)
    # by m; slot m-1 drafts t_{m+k}
    right = torch.zeros(length, depths, dtype=torch.bool, device=device)
    for depth in range(1, 1 + depths):
        anchors = torch.arange(prompt_length, length - depth, device=device)  # m with m + depth < L
        guess = model.head(depth)(hiddens[depth][0, anchors - 1]).argmax(-1)
        right[anchors, depth - 1] = guess == text[0, anchors + depth]
    return right[prompt_length : length - 1].cumprod(1).bool()


def offline_acceptance(
    model: DeepseekV3MTP, tokens: Sequence[int], *, prompt_length: int
) -> list[float]:
    """P(drafts 1..k all accepted) for k = 1..D, over every place of the greedy text where k drafts
    fit.

    Real decoding visits some of these places only (it jumps over what it accepted), so that its
    counts differ a little.
    """
    prefixes = accepted_prefixes(model, tokens, prompt_length=prompt_length)
    return [prefixes[: len(prefixes) - k, k].double().mean().item() for k in range(model.depths)]
