"""DeepSeek-V3 with 1+D prediction heads: trunk, heads, loss, init."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dsv3_mtp.config import ModelConfig, MTPConfig
from dsv3_mtp.heads.heads import HEADS, LMHead, TrunkStates
from dsv3_mtp.model.block import DecoderLayer
from dsv3_mtp.model.layers import RMSNorm, rotary_angles
from dsv3_mtp.model.moe import Experts, Gate, RouterStats
from dsv3_mtp.model.output import Batch, MTPOutput
from dsv3_mtp.model.overlap import row_overlap
from dsv3_mtp.model.targets import agreement, count_targets, document_starts, valid_targets
from dsv3_mtp.ops.compute import building, given
from dsv3_mtp.ops.ranges import named


class Trunk(nn.Module):
    """Embedding, decoder layers, final norm."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        # Not the constructor: it draws numbers, and on the meta device that imports torch's
        # compiler for seconds.
        weight = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(weight, freeze=False)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, angles: Tensor, mask: Tensor | None
    ) -> tuple[TrunkStates, list[RouterStats]]:
        """x: (B, T, C) embeddings."""
        last_input, x, stats = run_layers(self.layers, x, angles, mask)
        return TrunkStates(last_input, x, self.norm(x)), stats


def run_layers(
    layers: Iterable[nn.Module], x: Tensor, angles: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, list[RouterStats]]:
    """Trunk layers, one after another: input of the last of them, output, stats of their routers.
    x: (B, T, C).
    """
    stats, last_input = [], x
    for layer in layers:
        last_input = x
        x, routed = layer(x, angles, mask)
        if routed is not None:
            stats.append(routed)
    return last_input, x, stats


class DeepseekV3MTP(nn.Module):
    """The model of DeepSeek-V3 section 2. `mtp.mode: none` is the plain language model, bit for
    bit.
    """

    def __init__(self, config: ModelConfig, mtp: MTPConfig):
        super().__init__()
        self.config, self.mtp_config, self.shard = config, mtp, given().shard
        self.model = Trunk(config)
        self.lm_head = LMHead(config.hidden_size, config.vocab_size, bias=False)
        with building(given().heads or given()):
            self.mtp: Any = HEADS[mtp.mode](config, mtp) if mtp.mode in HEADS else None

    @property
    def depths(self) -> int:
        return self.mtp_config.depths

    @property
    def device(self) -> torch.device:
        """Of the weights that this process holds: a pipeline stage has the rest on the meta
        device.
        """
        return next((p.device for p in self.parameters() if not p.is_meta), torch.device("meta"))

    def forward(
        self, tokens: Tensor, documents: Tensor | None = None, **settings: Any
    ) -> MTPOutput:
        """Losses and metrics of all heads on one micro-batch; slices, never rolls (V3 Fig. 3).

        Args:
            tokens: (B, T+1+D) int64. Depth k reads tokens[:, k:k+T] and predicts tokens[:,
                k+1:k+1+T].
            documents: (B, T+1+D) document numbers: attention, targets and MTP inputs stay inside
                documents. None:
                packed without masks (V3 section 4.1).
            settings: keywords of `losses`.
        """
        return self.losses(*self.hidden_states(tokens, documents), tokens, documents, **settings)

    def losses(
        self,
        hiddens: list[Tensor],
        stats: list[RouterStats],
        tokens: Tensor,
        documents: Tensor | None = None,
        *,
        scored: Tensor | None = None,
        loss_weights: tuple[float, ...] | None = None,
        balance_loss_weight: float = 0.0,
        normalizer: Tensor | None = None,
        overlap: bool = False,
    ) -> MTPOutput:
        """`forward` from the normed hidden states of depth 0..D and the stats of every router on.

        Args:
            scored: (B, T+1+D) bool, the tokens that are targets, at every depth. None: all.
            loss_weights: D numbers lambda * w_k / D (eq. 25), default 1/D each.
            balance_loss_weight: alpha of eq. 17.
            normalizer: (2+D,) from `count_targets`, of the whole optimizer step if this is a part
                of it. Default: own.
            overlap: measure it too, without gradient: about twice the losses' logits again.
        """
        length = tokens.shape[1] - 1 - self.depths  # T
        if normalizer is None:
            normalizer = count_targets(tokens, documents, self.depths, scored)
        if loss_weights is None:
            loss_weights = (1.0 / max(self.depths, 1),) * self.depths
        valid = valid_targets(tokens, documents, self.depths, scored)  # (1+D, B, T)
        # (1+D, B, T)
        targets = torch.stack([tokens[:, k + 1 : k + 1 + length] for k in range(1 + self.depths)])
        # Not new_tensor: on CUDA the host would wait for that copy.
        weights = torch.cat([normalizer.new_full((1,), weight) for weight in (1.0, *loss_weights)])
        counts = normalizer[:-1]  # per rank: below 1 with fewer targets than ranks
        scale = weights / counts.masked_fill(counts == 0, 1)  # (1+D,)
        row_weight = scale[:, None, None] * valid  # (1+D, B, T)
        loss, nll, prediction = self._head_losses(hiddens, targets, row_weight)
        balance = sum(
            (routed.balance for routed in stats), start=tokens.new_zeros((), dtype=torch.float32)
        )
        main = self.shard.gather(prediction[0])[
            :, self.shard.number * length :
        ]  # from slot 0 here to the row's end
        agreed, compared = agreement(prediction, valid, main)
        return MTPOutput(
            loss=loss + balance_loss_weight * balance / normalizer[-1].to(balance),
            nll_sum=(nll * valid).sum((1, 2)),
            targets=valid.sum((1, 2)),
            correct=((prediction == targets) & valid).sum((1, 2)),
            agreed=agreed,
            compared=compared,
            overlap=row_overlap(
                self.head_logits, hiddens, valid, self.shard, self.config.vocab_size
            )
            if overlap
            else nll.new_zeros(4, self.depths, dtype=torch.float64),
            balance=balance.detach(),
            load=torch.stack([routed.load for routed in stats]) if stats else nll.new_zeros((0, 1)),
            nodes=torch.stack([routed.nodes for routed in stats])
            if stats
            else targets.new_zeros(0),
        )

    def hidden_states(
        self, tokens: Tensor, documents: Tensor | None = None
    ) -> tuple[list[Tensor], list[RouterStats]]:
        """tokens (B, T+1+D) -> normed hidden states of depth 0..D, each (B, T, C), and the stats of
        every router.
        """
        angles, mask = self.positions(tokens, documents)
        length = angles.shape[1]
        embedded = self.model.embed_tokens(tokens[:, :-1])  # (B, T+D, C), each token looked up once
        trunk, stats = self.model(embedded[:, :length], angles, mask)
        hiddens, more = self.head_states(trunk, embedded[:, 1:], angles, mask, documents)
        return hiddens, stats + more

    def positions(
        self, tokens: Tensor, documents: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """What every block reads of a micro-batch (B, T+1+D): rotary angles (2, T, P/2), and the
        document mask, which is that of whole rows.
        """
        length = tokens.shape[1] - 1 - self.depths
        slots = self.shard.number * length + torch.arange(length, device=tokens.device)
        mask = (
            None if documents is None else document_starts(self.shard.gather(documents[:, :length]))
        )
        return rotary_angles(self.config, slots), mask

    @named("heads")
    def head_states(
        self,
        trunk: TrunkStates,
        embedded: Tensor,
        angles: Tensor,
        mask: Tensor | None,
        documents: Tensor | None = None,
    ) -> tuple[list[Tensor], list[RouterStats]]:
        """From the trunk to the hidden states of depth 0..D, each (B, T, C), and the stats of the
        MTP routers.

        embedded: (B, T-1+D, C), the tokens ahead of slot 0: those of depth k are embedded[:, k-1 :
            k-1+T].
        """
        depths, length = self.depths, trunk.post_norm.shape[1]
        if not depths:
            return [trunk.post_norm], []
        detach = self.mtp_config.detach
        source = embedded.detach() if detach == "all" else embedded
        ahead = [source[:, k : k + length] for k in range(depths)]  # D times (B, T, C)
        if documents is not None:  # a token of another document is no input: its embedding is zero
            same = [
                documents[:, k : k + length] == documents[:, :length] for k in range(1, 1 + depths)
            ]
            ahead = [e * keep.unsqueeze(-1) for e, keep in zip(ahead, same, strict=True)]
        hiddens, more = self.mtp(trunk if detach == "none" else trunk.detach(), ahead, angles, mask)
        return [trunk.post_norm, *hiddens], [routed for routed in more if routed is not None]

    def logits(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        """(B, T+1+D) -> (1+D, B, T, V) logits of every head. For tests and analysis: training never
        holds them.
        """
        hiddens, _ = self.hidden_states(tokens, documents)
        return torch.stack([self.head(depth)(hidden) for depth, hidden in enumerate(hiddens)])

    def head(self, depth: int) -> LMHead:
        """The output head of a depth: one shared head, except in `parallel_linear`."""
        return (
            self.mtp.heads[depth - 1]
            if depth and self.mtp_config.mode == "parallel_linear"
            else self.lm_head
        )

    def head_logits(self, depth: int, hidden: Tensor) -> Tensor:
        """(B, n, C) hidden states of a depth -> (B, n, V), for model/overlap.py."""
        return self.head(depth)(hidden)

    @named("loss")
    def _head_losses(
        self, hiddens: list[Tensor], targets: Tensor, row_weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One fused call per distinct head weight: the main head and the depths that share it are
        concatenated.
        """
        if self.mtp_config.mode == "parallel_linear" or self.mtp_config.detach == "all":
            groups = [slice(k, k + 1) for k in range(len(hiddens))]
        else:
            groups = [slice(0, len(hiddens))]
        loss, nll, prediction = hiddens[0].new_zeros((), dtype=torch.float32), [], []
        for group in groups:
            rows = torch.cat([hidden.flatten(0, 1) for hidden in hiddens[group]])  # (M, C)
            detach = group.start > 0 and self.mtp_config.mode != "parallel_linear"
            part, *rest = self.head(group.start)(
                rows, targets[group].flatten(), row_weight[group].flatten(), detach
            )
            loss = loss + part
            nll.append(rest[0])
            prediction.append(rest[1])
        return loss, torch.cat(nll).view(targets.shape), torch.cat(prediction).view(targets.shape)

    @torch.no_grad()
    def evaluate(self, batch: Batch, *, blanks: int = 0) -> MTPOutput:
        """The sums of the outputs for some micro-batches, in evaluation mode; the last `blanks` do
        not count.
        """
        total, training = self.no_output(), self.training
        self.eval()
        for left, (tokens, documents, scored) in zip(range(len(batch), 0, -1), batch, strict=True):
            out = self(tokens, documents, scored=scored, overlap=True).sums()
            total = total + out if left > blanks else total
        self.train(training)
        return total

    def no_output(self) -> MTPOutput:
        """The sums over no micro-batch."""
        zeros = partial(torch.zeros, dtype=torch.float64, device=self.device)
        heads, routers = 1 + self.depths, len(self.gates())
        return MTPOutput(
            loss=zeros(()),
            nll_sum=zeros(heads),
            targets=zeros(heads),
            correct=zeros(heads),
            agreed=zeros(self.depths),
            compared=zeros(self.depths),
            overlap=zeros(4, self.depths),
            balance=zeros(()),
            load=zeros(routers, self.config.n_routed_experts if routers else 1),
            nodes=zeros(routers),
        )

    def gates(self) -> list[Gate]:
        """Every router, in the order of `MTPOutput.load`: the trunk's, then those of the MTP
        modules.
        """
        return [module for module in self.modules() if isinstance(module, Gate)]

    @torch.no_grad()
    def update_router_bias(self, load: Tensor, speed: float) -> None:
        """load: (routers, E) of the whole optimizer step over all ranks; MTP routers are routers
        like the others.

        A frozen router (`freeze_trunk`) keeps its bias.
        """
        for gate, gate_load in zip(self.gates(), load, strict=True):
            if gate.weight.requires_grad:
                gate.update_bias(gate_load, speed)

    def freeze_trunk(self) -> None:
        """Only the MTP heads go on learning: no gradient into embedding, trunk, its routers and the
        output head.
        """
        for part in (self.model, self.lm_head):
            part.requires_grad_(False)

    @torch.no_grad()
    def init_weights(
        self, seed: int, *, writable: Callable[[Tensor], AbstractContextManager[Any]] = nullcontext
    ) -> None:
        """All weights N(0, initializer_range), norms 1, router biases 0 (V3 section 4.2: 0.006 for
        everything).

        Trunk and head first: models of different `mtp` settings and the same seed start from the
        same trunk. A part of a layer's experts starts as in the whole layer, and low precision as
        float32 rounded.

        Args:
            writable: context in which a parameter can be written, for parameters that are kept in
                parts.
        """
        device = self.device
        generator = torch.Generator(device).manual_seed(seed)
        for module in self.modules():
            for parameter in module.parameters(recurse=False):
                with writable(parameter):
                    if isinstance(module, RMSNorm):
                        parameter.fill_(1.0)
                        continue
                    first, count = 0, len(parameter)
                    shape, wide = (
                        parameter.shape,
                        torch.promote_types(parameter.dtype, torch.float32),
                    )
                    if isinstance(module, Experts):
                        first, shape = (
                            module.first,
                            torch.Size([self.config.n_routed_experts, *shape[1:]]),
                        )
                    values = torch.empty(shape, dtype=wide, device=device)
                    values.normal_(0.0, self.config.initializer_range, generator=generator)
                    # of another pipeline stage: on meta, not kept
                    parameter.copy_(values[first : first + count])
        for gate in self.gates():
            gate.e_score_correction_bias.zero_()


def meta_model(config: ModelConfig, mtp: MTPConfig, *, freeze: str = "none") -> DeepseekV3MTP:
    """The model without storage, for its names, shapes and sizes. freeze: `train.freeze`."""
    with torch.device("meta"):
        model = DeepseekV3MTP(config, mtp)
    if freeze == "trunk":
        model.freeze_trunk()
    return model
