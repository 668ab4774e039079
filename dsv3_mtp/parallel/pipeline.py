"""Pipeline parallelism with DeepSpeed's PipelineModule: stages of balanced cost; heads and losses
are on the last one.

Every rank holds the whole DeepseekV3MTP as a description, of which only its own stage has storage;
the rest lies on the meta device. Names, counts, initial weights and the order of the routers are
therefore those of the model without a pipeline, and a parameter is this rank's if it is not meta.

    stage 0       embedding, trunk layers
    stage s       trunk layers
    last stage    trunk layers, final norm, all MTP depths, output head, losses; and a tied copy of
                  the embedding where the MTP modules read it: the gradients of both copies are
                  summed before every update

Between stages travel the hidden states, the balance loss of every router so far (with gradient),
the routers' loads, and the tokens.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from deepspeed.pipe import PipelineModule, TiedLayerSpec
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe import schedule
from torch import Tensor, nn

from dsv3_mtp.config import Config
from dsv3_mtp.config.layout import uncut
from dsv3_mtp.model.causal_lm import DeepseekV3MTP, meta_model
from dsv3_mtp.model.moe import RouterStats
from dsv3_mtp.model.output import Batch, LossSettings, MTPOutput
from dsv3_mtp.model.size import layer_flops
from dsv3_mtp.model.states import HeadOutput, TrunkStates
from dsv3_mtp.model.trunk import run_layers
from dsv3_mtp.parallel import private
from dsv3_mtp.parallel.engine import Engine
from dsv3_mtp.parallel.launch import World


def balanced(costs: Sequence[float], parts: int) -> list[int]:
    """Bounds of `parts` contiguous, non-empty parts: `parts` + 1 numbers, part i is
    costs[bounds[i] : bounds[i+1]].

    The largest cost of a part is as small as possible. Among the cuts with that largest cost, this
    one has the smallest sum of squares.
    """
    sums = [0.0, *itertools.accumulate(costs)]

    def cut(
        weigh: Callable[[float], float], join: Callable[[float, float], float]
    ) -> tuple[float, list[int]]:
        best = {0: (0.0, [0])}  # end of the parts so far -> value, bounds
        for part in range(1, parts + 1):
            ends = range(part, len(costs) - (parts - part) + 1)
            best = {
                end: min(
                    (join(value, weigh(sums[end] - sums[start])), [*bounds, end])
                    for start, (value, bounds) in best.items()
                    if start < end
                )
                for end in ends
            }
        return best[len(costs)]

    dearest, _ = cut(lambda cost: cost, max)
    limit = dearest * (1 + 1e-9)
    return cut(lambda cost: cost**2 if cost <= limit else float("inf"), lambda a, b: a + b)[1]


def stage_layers(config: Config) -> list[range]:
    """The trunk layers of each stage: FLOPs balanced over the pieces that may be cut apart
    (config.layout.uncut), of which what follows the trunk is the last.
    """
    costs = layer_flops(meta_model(config.model, config.mtp), config.data.seq_len)
    layers, (head, tail) = len(costs) - 1, uncut(config)
    pieces = [sum(costs[:head]), *costs[head : layers + 1 - tail], sum(costs[layers + 1 - tail :])]
    bounds = balanced(pieces, config.parallel.pipeline_stages)
    bounds = [0, *(bound + head - 1 for bound in bounds[1:-1]), layers]
    return [range(start, stop) for start, stop in itertools.pairwise(bounds)]


def stage_parts(config: Config, model: DeepseekV3MTP, world: World) -> list[nn.Module]:
    """What of the model this rank's stage holds."""
    parts: list[nn.Module] = [
        model.model.layers[layer] for layer in stage_layers(config)[world.stage]
    ]
    last = world.stage == world.stages - 1
    if world.stage == 0 or (last and model.mtp_config.reads_tokens):
        parts.append(model.model.embed_tokens)
    if last:
        parts += [model.model.norm, model.lm_head, *([model.mtp] if model.depths else [])]
    return parts


class Stage(nn.Module):
    """Consecutive trunk layers. Takes and gives (x, balance, load, tokens[, documents]):

    x (B, T, C); balance (1+r,) and counts (1+r, E+1) int64, load and nodes, of nothing and of the r
    routers so far (an empty tensor cannot be sent); tokens and documents (B, T+1+A).
    """

    def __init__(self, model: DeepseekV3MTP, layers: range):
        super().__init__()
        self.layers = model.model.layers[layers.start : layers.stop]
        self.positions = model.positions

    def forward(self, carried: tuple[Tensor, ...]) -> Any:
        x, balance, counts, tokens, *documents = carried
        _, x, stats = run_layers(self.layers, x, *self.positions(tokens, *documents))
        balance = torch.cat([balance, *(s.balance.view(1) for s in stats)])
        counts = torch.stack(
            [*counts, *(torch.cat([s.load.long(), s.nodes.view(1)]) for s in stats)]
        )
        return x, balance, counts, tokens, *documents


class Final(NamedTuple):
    """What the last stage gives to the loss: the rows of all heads, the stats of every router of
    the model, and the micro-batch's tokens and documents (B, T+1+A).
    """

    output: HeadOutput
    tokens: Tensor
    documents: Tensor | None


@dataclass(frozen=True)
class Targets:
    """What the last stage is given of a micro-batch beside `Final`. DeepSpeed hands it from the
    data to the loss function as the micro-batch's labels.
    """

    scored: Tensor | None  # (B, T+1+A)
    settings: LossSettings


class LastStage(Stage):
    """The last trunk layers and the heads; takes embeddings (B, T-1+A, C) of tokens ahead."""

    def __init__(self, model: DeepseekV3MTP, layers: range):
        super().__init__(model, layers)
        self.norm, self.mtp, self.lm_head = model.model.norm, model.mtp, model.lm_head
        self.rows_from = model.rows_from  # of the model: it uses the heads above

    def forward(self, carried: tuple[Tensor, ...]) -> Final:
        x, balance, counts, tokens, *documents, ahead = carried
        angles, mask = self.positions(tokens, *documents)
        last_input, x, own = run_layers(self.layers, x, angles, mask)
        trunk = TrunkStates(last_input, x, self.norm(x))
        earlier = [
            RouterStats(c[:-1].float(), b, c[-1])
            for c, b in zip(counts[1:], balance[1:], strict=True)
        ]
        stats = earlier + own
        output = self.rows_from(trunk, stats, ahead, angles, mask, tokens, *documents)
        return Final(output, tokens, documents[0] if documents else None)


class SharedEmbedding(TiedLayerSpec):
    """The model's embedding as a layer of the first stage, and of the last if heads read it."""

    def __init__(self, model: DeepseekV3MTP, forward: Callable[[nn.Module, Any], Any]):
        super().__init__("embed_tokens", nn.Embedding, forward_fn=forward)
        self.module = model.model.embed_tokens

    def build(self, log: bool = False) -> nn.Module:
        return self.module


class PipelinedModel(PipelineModule):
    """The model as DeepSpeed's pipeline: `stage_layers` decides which layer is on which stage."""

    def __init__(
        self, model: DeepseekV3MTP, layers: list[range], loss: Callable[[Final, Targets], Tensor]
    ):
        following, experts = model.lookahead, model.config.n_routed_experts

        def embed(embedding: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            tokens, *documents = inputs
            x = embedding(tokens[:, :-following])
            return (
                x,
                x.new_zeros(1, dtype=torch.float32),
                tokens.new_zeros(1, experts + 1),
                tokens,
                *documents,
            )

        def look_ahead(embedding: nn.Module, carried: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return *carried, embedding(carried[3][:, 1:-1])

        def nothing_ahead(carried: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x, tokens = carried[0], carried[3]
            return *carried, x.new_zeros(()).expand(len(x), tokens.shape[1] - 2, x.shape[2])

        specs = [
            SharedEmbedding(model, embed),
            *(Stage(model, own) for own in layers[:-1]),
            SharedEmbedding(model, look_ahead) if model.mtp_config.reads_tokens else nothing_ahead,
            LastStage(model, layers[-1]),
        ]
        self.bounds = [0, *range(2, len(layers) + 1), len(specs)]
        # DeepSpeed copies the tied weights here. Under no_grad autograd does not record the copy.
        with contextlib.redirect_stdout(None), torch.no_grad():
            super().__init__(specs, num_stages=len(layers), loss_fn=loss)

    def _partition_layers(self, method: str = "") -> None:
        self.parts = self.bounds
        self._set_bounds(self.parts[self.stage_id], self.parts[self.stage_id + 1])


class AccumulationSchedule(schedule.TrainSchedule):
    """DeepSpeed's 1F1B schedule up to the update, which is a step of its own."""

    UPDATE = (schedule.ReduceTiedGrads, schedule.ReduceGrads, schedule.OptimizerStep)

    def steps(self) -> Iterator[list[Any]]:
        for commands in super().steps():
            yield [command for command in commands if not isinstance(command, self.UPDATE)]


def backward_pass(engine: Any, buffer_id: int) -> None:
    """DeepSpeed's instruction, except that

    - the loss, which is normalized over the whole optimizer step, is not divided by the number of
      micro-batches;
    - the outputs of a stage go backward together, not one after another through all of its layers;
    - an input on which nothing depends (the balance before the first router) gets zeros as its
      gradient, because the stage before waits for one.
    """
    if engine.using_bf16_optimizer:
        engine.optimizer.clear_lp_grads()
    if engine.is_last_stage():
        DeepSpeedEngine.backward(engine, engine.loss, scale_wrt_gas=False)
    else:
        outputs = [
            output
            for output in engine.pipe_buffers["outputs"][buffer_id]
            if output.is_floating_point()
        ]
        pairs = [
            pair for pair in zip(outputs, engine.grad_layer, strict=True) if pair[0].requires_grad
        ]
        with private.engine_backward(engine):
            torch.autograd.backward([output for output, _ in pairs], [grad for _, grad in pairs])
        if engine.using_bf16_optimizer:
            engine.optimizer.update_hp_grads(clear_lp_grads=False)
        engine.pipe_buffers["outputs"][buffer_id] = None
    for received in engine.pipe_buffers["inputs"][buffer_id]:
        if received.is_floating_point() and received.grad is None:
            received.grad = torch.zeros_like(received)


class PipelineEngine(Engine):
    """`Engine` for a stage of a pipeline. Sums of other ranks than the last stage's are zero."""

    def __init__(
        self,
        model: DeepseekV3MTP,
        optimizer: torch.optim.Optimizer,
        *,
        config: Config,
        **start: Any,
    ):
        self.stages = PipelinedModel(model, stage_layers(config), self.loss)
        super().__init__(model, optimizer, module=self.stages, **start)
        private.replace_instruction(self.engine, schedule.BackwardPass, backward_pass)
        self.total, self.counted = model.no_output(), 0

    def accumulate(self, batch: Batch, settings: LossSettings) -> MTPOutput:
        for weight, _ in self.stages.get_tied_weights_and_groups():
            # The last stage gives a detached embedding no gradient, but DeepSpeed sums the
            # gradients of both copies: the other stage waits for this one's.
            if weight.requires_grad and weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        return self.run(AccumulationSchedule, batch, settings)

    @torch.no_grad()
    def evaluate(self, batch: Batch, *, blanks: int) -> MTPOutput:
        self.module.eval()
        total = self.run(schedule.InferenceSchedule, batch, LossSettings(overlap=True), blanks)
        self.module.train()
        return total

    def run(
        self,
        kind: type[schedule.PipeSchedule],
        batch: Batch,
        settings: LossSettings,
        blanks: int = 0,
    ) -> MTPOutput:
        """All micro-batches through all stages, from tokens in the first to targets in the last."""
        self.total, self.counted = self.model.no_output(), len(batch) - blanks
        pieces = [
            ((tokens,) if documents is None else (tokens, documents), Targets(scored, settings))
            for tokens, documents, scored in self.own(batch)
        ]
        self.engine.set_dataiterator(iter(pieces))
        private.run_schedule(self.engine, kind(len(batch), self.world.stages, self.world.stage))
        return self.total

    def loss(self, final: Final, targets: Targets) -> Tensor:
        """The last stage's loss function."""
        out = self.model.loss(*final, targets.scored, targets.settings)
        if self.counted > 0:
            self.total += out.sums()
        self.counted -= 1
        return out.loss

    def reduce(self) -> None:
        private.reduce_gradients(self.engine)

    def update(self) -> None:
        private.optimizer_step(self.engine)
