"""Generation: plain and self-speculative, greedy and sampled, one prompt or a batch of different
lengths.

    tokens = generate(model, [prompt_ids], Settings(max_new_tokens=64, draft_depth=2)).tokens[0]

One speculative step (any heads): K drafts -> one trunk forward on the last token and the drafts ->
the longest prefix that stands, plus one token of the main model. Plain decoding is the same step
with K = 0. The output is what the main model says: greedy is equal token for token, samples have
the same distribution. Rejected drafts need no clean-up, the next step writes over their slots.
"""

from collections.abc import Iterator, Sequence

import torch

from dsv3_mtp.decode.cache import CacheSlots, span
from dsv3_mtp.decode.decoder import Decoder
from dsv3_mtp.decode.draft import Drafter, draft_limit, no_drafter
from dsv3_mtp.decode.generation import Acceptance, Generation, Settings, Step
from dsv3_mtp.decode.sample import DraftSampler, TokenSampler, agreeing, largest
from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from dsv3_mtp.ops import c, c_decode, choice
from dsv3_mtp.ops.c_step import Rows


def generate(
    model: DeepseekV3MTP, prompts: Sequence[Sequence[int]], settings: Settings | None = None
) -> Generation:
    """New tokens of each prompt. Raises what `stream` raises."""
    result = Generation([[] for _ in prompts], Acceptance())
    for step in stream(model, prompts, settings):
        result.add(step)
    return result


def stream(
    model: DeepseekV3MTP, prompts: Sequence[Sequence[int]], settings: Settings | None = None
) -> Iterator[Step]:
    """Yields each row's new tokens as they are decided; rows end at a stop token, max_new_tokens or
    the context limit.

    Args:
        prompts: token ids, B prompts of any lengths >= 1.

    Raises:
        ValueError: a setting or prompt that cannot be used, one sentence for each.
    """
    settings = settings or Settings()
    problems = [*settings.problems(), *prompt_problems(model, prompts)]
    vocab = model.config.vocab_size
    if unknown := [token for token in settings.draft_vocab if not 0 <= token < vocab]:
        problems.append(f"draft_vocab has ids outside the vocabulary of {vocab}: {unknown[:5]}")
    if settings.draft_depth and (why := no_drafter(model.mtp_config)):
        problems.append(f"{why}; decode without speculation")
    elif settings.recycle and draft_limit(model, settings.draft_depth) <= model.mtp_config.drafts:
        problems.append(
            f"recycle {settings.recycle} has no effect: {settings.draft_depth} drafts per step of "
            f"{model.mtp_config.mode} heads use no module twice"
        )
    if settings.draft_dtype and (settings.compile or choice.kernels(model.lm_head.weight) is not c):
        problems.append(
            f"draft_dtype {settings.draft_dtype} is for the C kernels, which decode float32 and "
            "bfloat16 on a CPU and are not compiled by torch"
        )
    if problems:
        raise ValueError("; ".join(problems))
    return _stream(model, [list(prompt) for prompt in prompts], settings)


def prompt_problems(model: DeepseekV3MTP, prompts: Sequence[Sequence[int]]) -> Iterator[str]:
    """What is wrong with prompts, one sentence each."""
    limit, vocab = model.config.max_position_embeddings, model.config.vocab_size
    if not prompts:
        yield "no prompt was given"
    for number, prompt in enumerate(prompts, start=1):
        name = "the prompt" if len(prompts) == 1 else f"prompt {number}"
        if not prompt:
            yield f"{name} is empty: at least one token is needed to predict the next one"
        elif len(prompt) >= limit:
            room = (
                f"max_position_embeddings = {limit} leaves "
                f"room for at most {limit - 1} and one new token"
            )
            yield f"{name} has {len(prompt)} tokens, but {room}"
        if unknown := sorted({token for token in prompt if not 0 <= token < vocab}):
            yield (
                f"{name} has token ids outside the vocabulary "
                f"of {vocab}: {', '.join(map(str, unknown[:5]))}"
            )


class DecodingRows:
    """Rows in decoding: their tokens, the trunk's cache, the drafter. Grows by `join`, shrinks by
    `keep`.
    """

    def __init__(
        self, decoder: Decoder, slots: CacheSlots, prompts: list[list[int]], settings: Settings
    ):
        """prompts: of one length."""
        self.decoder, self.slots, model = decoder, slots, decoder.model
        self.threshold = settings.draft_threshold
        depth = draft_limit(model, settings.draft_depth)
        # drafters take shorter forwards for decoding steps
        self.chunk = max(settings.prefill_chunk, depth + 2)
        self.drafter: Drafter | None = None
        if depth:
            kind = model.mtp.drafter(model.mtp_config)
            self.drafter = kind(
                decoder,
                slots,
                rows=len(prompts),
                depth=depth,
                chunk=self.chunk,
                recycle=settings.recycle or "last",
            )
        self.whole = None if self.threshold and depth else decoder.whole_step(self.drafter)
        self.rows: Rows | None = None  # what `whole` has the addresses of
        # (B, S, R+P) per layer
        self.caches = slots.caches(model.config.num_hidden_layers, len(prompts))
        self.ids = torch.zeros(
            len(prompts), slots.slots + 2 * (depth + 1), dtype=torch.long, device=slots.device
        )
        self.ids[:, : len(prompts[0])] = torch.tensor(prompts)
        self.last = [len(prompts[0]) - 1] * len(prompts)  # m: index of each row's last known token

    def prefill(self, sampler: TokenSampler) -> list[int]:
        """Runs the prompts, chunk by chunk; the first new token of each row."""
        rows, length = len(self.last), self.last[0] + 1
        for start in range(0, length, self.chunk):
            states = self.forward([start] * rows, min(self.chunk, length - start))
            if self.drafter is not None:
                self.drafter.observe(states, [start] * rows, self.ids, length)
        final = states.post_norm.unflatten(0, (rows, -1))[:, -1]  # (B, C)
        tokens = sampler.draw(self.decoder.logits(final))[0].tolist()
        self._append([[token] for token in tokens])
        return tokens

    def step(
        self, count: int, sampler: TokenSampler
    ) -> tuple[list[int], list[int], list[list[int]]]:
        """Drafts and verifies. Of each row: how many drafts, at most `count`, were put to the test,
        how many of them stand, and these plus the next token, all of which become known.
        """
        if self._is_whole(count, sampler):
            return self._whole(count, sampler)
        found = self._step(count, sampler)
        self._append(found[2])
        return found

    def _is_whole(self, count: int, sampler: TokenSampler) -> bool:
        """Whether a step is one call of C."""
        if self.whole is None or sampler.truncates:
            return False
        return len(self.last) * (1 + count) <= c_decode.ROWS

    def _whole(
        self, count: int, sampler: TokenSampler
    ) -> tuple[list[int], list[int], list[list[int]]]:
        assert self.whole is not None
        drafter, coins, filled = self.drafter, None, list[int]()
        if self.rows is None:
            of_drafter = () if drafter is None else (drafter.rings[0].states, drafter.caches)
            tensors = self.ids, self.caches, self.slots.rotation
            self.rows = Rows(self.whole, *tensors, *of_drafter)
        if drafter is not None:
            filled = drafter.filled[0]
        if not sampler.greedy:
            shape = len(self.last), 2 * count + 1
            coins = torch.rand(shape, generator=sampler.generator, dtype=torch.float64)
        accepted, new = self.whole(self.rows, self.last, filled, count, sampler.temperature, coins)
        self.last = [m + len(tokens) for m, tokens in zip(self.last, new, strict=True)]
        return [count] * len(new), accepted, new

    def _step(
        self, count: int, sampler: TokenSampler
    ) -> tuple[list[int], list[int], list[list[int]]]:
        """`step` in pieces, for every kind of head, sampling and device."""
        drafts, lengths = self.ids[:, :0], None
        probability: torch.Tensor | None = None
        if count and self.drafter is not None:
            among, vocab = self.decoder.draft_ids, self.decoder.model.config.vocab_size
            draws = DraftSampler(sampler, threshold=self.threshold, among=among, vocab=vocab)
            drafts, probability = self.drafter.draft(self.ids, self.last, count, draws)
            if (lengths := draws.lengths) is not None:
                drafts = drafts[:, : int(lengths.max())]
                probability = None if probability is None else probability[:, : drafts.shape[1]]
        count = drafts.shape[1]
        states = self.forward(self.last, 1 + count)
        if self.drafter is not None:
            self.drafter.observe(states, self.last, self.ids)
        logits = self.decoder.logits(states.post_norm)  # (B*(K+1), V)
        if not count:
            none = [0] * len(self.last)
            return none, none, [[token] for token in sampler.draw(logits)[0].tolist()]
        if sampler.greedy:
            known = [drafts, largest(logits).view(-1, 1 + count)]
        else:
            logits = logits.view(-1, 1 + count, logits.shape[-1])
            accepted, following = sampler.verify(logits, drafts, probability, lengths)
            known = [drafts, accepted[:, None], following[:, None]]
        # one transfer per step
        rows = torch.cat(known if lengths is None else [*known, lengths[:, None]], 1).tolist()
        drafted = [count] * len(rows) if lengths is None else [row.pop() for row in rows]
        if sampler.greedy:
            stand = [agreeing(row[count:], row[:n]) for row, n in zip(rows, drafted, strict=True)]
            return (
                drafted,
                stand,
                [r[count : count + n + 1] for r, n in zip(rows, stand, strict=True)],
            )
        return drafted, [row[-2] for row in rows], [row[: row[-2]] + [row[-1]] for row in rows]

    def _append(self, new: list[list[int]]) -> None:
        """Makes the given tokens of each row known. All but the last are drafts, which stand in
        `ids`.

        Raises:
            ValueError: a row has none (`largest`).
        """
        if any(tokens[-1] < 0 for tokens in new):
            raise ValueError(c_decode.NOT_FINITE)
        for row, tokens in enumerate(new):
            self.last[row] += len(tokens)
            self.ids[row, self.last[row]] = tokens[-1]

    def join(self, others: "list[DecodingRows]") -> None:
        if not others:
            return
        self.rows = None
        self.caches = [
            torch.cat(same)
            for same in zip(self.caches, *(other.caches for other in others), strict=True)
        ]
        self.ids = torch.cat([self.ids, *(other.ids for other in others)])
        self.last += [m for other in others for m in other.last]
        if self.drafter is not None:
            self.drafter.join([other.drafter for other in others if other.drafter is not None])

    def keep(self, rows: list[int]) -> None:
        if len(rows) == len(self.last):
            return
        self.rows = None
        self.caches = [cache[rows] for cache in self.caches]
        self.ids, self.last = self.ids[rows], [self.last[row] for row in rows]
        if self.drafter is not None:
            self.drafter.keep(rows)

    def forward(self, starts: list[int], length: int):
        """The trunk on slots starts[b]..starts[b]+length-1 of each row."""
        window = self.decoder.window(self.slots, starts, length)
        return self.decoder.trunk(span(self.ids, starts, length), self.caches, window)


def _cut(
    row: int, tokens: list[int], *, accepted: int, drafted: int, room: int, stops: frozenset[int]
) -> Step:
    """A row's step: its tokens up to a stop token and to the `room` that is left, and the counts
    that this leaves.
    """
    tokens, drafted = tokens[:room], min(drafted, room - 1)
    stop = next((number for number, token in enumerate(tokens, start=1) if token in stops), None)
    if stop is not None:
        tokens, drafted = tokens[:stop], min(drafted, stop)
    done = stop is not None or len(tokens) == room
    return Step(row, tokens, min(accepted, drafted, len(tokens)), drafted, done)


@torch.inference_mode()
def _stream(model: DeepseekV3MTP, prompts: list[list[int]], settings: Settings) -> Iterator[Step]:
    limit = min(
        model.config.max_position_embeddings, max(map(len, prompts)) + settings.max_new_tokens
    )
    depth = draft_limit(model, settings.draft_depth)
    # windows of ragged rows reach past the last slot that is used
    slots = CacheSlots(model, limit + 2 * (depth + 1) + Drafter.LAG)
    decoder = Decoder(
        model,
        compile_up_to=depth + 1 if settings.compile else 0,
        draft_vocab=settings.draft_vocab if depth else (),
        draft_int8=bool(depth and settings.draft_dtype),
    )
    generator = torch.Generator(slots.device).manual_seed(settings.seed)
    sampler = TokenSampler(settings.temperature, settings.top_k, settings.top_p, generator)
    ends = [
        min(model.config.max_position_embeddings, len(prompt) + settings.max_new_tokens)
        for prompt in prompts
    ]
    stops = frozenset(settings.stop_tokens)
    by_length: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(row)
    batches, rows = [], []  # rows: the prompt's number of each row that goes on
    for numbers in by_length.values():
        batch = DecodingRows(decoder, slots, [prompts[row] for row in numbers], settings)
        first = batch.prefill(sampler)
        steps = [
            _cut(
                row, [token], accepted=0, drafted=0, room=ends[row] - len(prompts[row]), stops=stops
            )
            for row, token in zip(numbers, first, strict=True)
        ]
        yield from steps
        if going := [i for i, step in enumerate(steps) if not step.done]:
            batch.keep(going)
            batches.append(batch)
            rows += [numbers[i] for i in going]
    if not rows:
        return
    batch = batches[0]
    batch.join(batches[1:])
    del batches
    while rows:
        # tokens that still fit, >= 1
        room = [ends[row] - 1 - m for row, m in zip(rows, batch.last, strict=True)]
        count = min(depth, max(room) - 1)
        drafted, accepted, new = batch.step(count, sampler)
        steps = [
            _cut(row, new[i], accepted=accepted[i], drafted=drafted[i], room=room[i], stops=stops)
            for i, row in enumerate(rows)
        ]
        going = [i for i, step in enumerate(steps) if not step.done]
        rows = [rows[i] for i in going]
        if rows:
            batch.keep(going)
        yield from steps
