"""The training loop. `Trainer.run` is the run, `Trainer.optimizer_step` one step of it."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dsv3_mtp.config import Config, schedules
from dsv3_mtp.config.layout import describe
from dsv3_mtp.data.ngrams import early_training
from dsv3_mtp.data.opening import build_missing, open_sources
from dsv3_mtp.hf import load_weights
from dsv3_mtp.model.causal_lm import meta_model
from dsv3_mtp.model.output import Batch, LossSettings
from dsv3_mtp.model.size import model_size, require_memory
from dsv3_mtp.ops.ranges import named
from dsv3_mtp.parallel.average import WeightAverage
from dsv3_mtp.parallel.build import build_model, check_monitors, start_engine, writable
from dsv3_mtp.parallel.clip import clipped
from dsv3_mtp.parallel.engine import deepspeed_config
from dsv3_mtp.parallel.launch import StopRequest, on_all, on_main, start, starting
from dsv3_mtp.precision.convert import choose_compute
from dsv3_mtp.report.metrics import LEAK_RATIO, Clock, MetricsLog, mfu, read_metrics
from dsv3_mtp.report.progress import Progress, floors_line, quantity
from dsv3_mtp.runs.folder import (
    changed_code,
    changed_settings,
    find_checkpoints,
    run_folder,
    write_run_folder,
)
from dsv3_mtp.runs.loading import newest_checkpoint
from dsv3_mtp.train import checkpoint
from dsv3_mtp.train.evaluate import evaluate, metric_means, metric_sums, to_device
from dsv3_mtp.train.floors import text_floors
from dsv3_mtp.train.gradients import gradient_angle
from dsv3_mtp.train.optim import build_optimizer
from dsv3_mtp.train.profile import StepProfile


class NonFiniteError(RuntimeError):
    """A loss or gradient norm, of training or validation, is nan or infinite."""


class Trainer:
    """A run from its config to its results: builds or resumes everything, then `run()`.

    Args:
        command: what manifest.json says started it.
        stop: true once the run should save and stop; None: nothing stops it but an exception.
        notes: lines that `run` says first.
        profile: the steps, of those from 1, whose trace is written into the run folder.

    Raises:
        ValueError: the config does not fit these ranks, the data, or the checkpoint in the run
            folder.
    """

    def __init__(
        self,
        config: Config,
        *,
        command: list[str],
        stop: StopRequest | None = None,
        notes: Sequence[str] = (),
        profile: range = range(0),
    ):
        self.config = config
        self.folder = run_folder(config)
        self.stop = stop
        with starting(config.parallel.timeout_s):
            self.build(command, notes, profile)
        self.profile = StepProfile(profile, self.folder, self.world.rank)
        if self.world.device.type == "cuda":  # perf/peak_gib is of training, not of the start
            torch.cuda.reset_peak_memory_stats(self.world.device)

    def build(self, command: list[str], notes: Sequence[str], profile: range) -> None:
        """Everything that a run needs: ranks, data, model, engine, and what was saved."""
        config, parallel = self.config, self.config.parallel
        self.world = start(
            threads=config.train.threads,
            timeout_s=parallel.timeout_s,
            stages=parallel.pipeline_stages,
            slices=parallel.sequence_parallel_size,
        )
        if profile and profile.start > self.total_steps:
            raise ValueError(
                f"--profile steps={profile.start}:{profile.stop - 1}: the run has "
                f"{self.total_steps} steps"
            )
        check_monitors(config)
        ds_config = deepspeed_config(config, self.world.size, str(self.folder))
        on_main(self.world, lambda: build_missing(config))
        self.sampler, self.val = on_all(self.world, lambda: open_sources(config))
        complete, found = on_main(self.world, lambda: find_checkpoints(config))
        latest, damaged = checkpoint.first_sound(self.world, complete)
        saved = latest and checkpoint.read_state(latest)  # what is damaged is told at once
        self.notes = [*found, *damaged, *notes]

        whole = meta_model(config.model, config.mtp, freeze=config.train.freeze)
        # bfloat16 weights, float32 masters and two moments at the least
        require_memory(whole, bytes_per_value=12, ranks=self.world.size)
        self.size = model_size(whole, config.data.seq_len)
        compute, chosen = choose_compute(
            config, self.world.device, lambda: meta_model(config.model, config.mtp)
        )
        self.model = build_model(config, ds_config, self.world, compute)
        if config.train.init_from is not None and latest is None:
            self.notes += load_weights(self.model, Path(config.train.init_from), writable=writable)
        if config.train.freeze == "trunk":
            self.model.freeze_trunk()
        self.notes += chosen
        heads = self.model.mtp if config.clips_apart else None
        optimizer = build_optimizer(self.model, config.optim, apart=heads)
        self.engine = start_engine(self.model, optimizer, ds_config, self.world, config)

        decay = config.train.ema_decay
        self.average = None if decay is None else WeightAverage(self.engine, decay)

        self.step = self.tokens = 0
        self.lambda_state = schedules.first_state(config.mtp)
        self.clock = Clock()
        if latest and saved:
            self.notes += self.resume(latest, saved)
        self.log = MetricsLog(self.folder / "metrics.jsonl")
        on_main(self.world, lambda: self.log.truncate_after(self.step or -1))
        begin = self.step
        # What this start is; on resume not before its first step: until then the folder holds what
        # the settings there made.
        self.describe: Callable[[], None] | None = lambda: self.write_folder(
            ds_config, command, begin
        )
        if not latest:
            self.describe_once()

    def describe_once(self) -> None:
        if self.describe is not None:
            on_main(self.world, self.describe)
            self.describe = None

    def write_folder(self, ds_config: dict[str, Any], command: list[str], step: int) -> None:
        """The description of this start, which trains from `step` on."""
        sources = {f"train/{i}": source for i, source in enumerate(self.sampler.sources)} | {
            "val": self.val
        }
        write_run_folder(
            self.config,
            ds_config,
            world_size=self.world.size,
            command=command,
            sources=sources,
            step=step,
        )

    @property
    def total_steps(self) -> int:
        rows = self.config.train.micro_batch_size * self.world.data_size
        return schedules.total_steps(self.config.train, self.config.data.seq_len, rows)

    @property
    def progress(self) -> float:
        """Fraction of the training tokens consumed: what every schedule is a function of."""
        return min(self.tokens / self.config.train.total_tokens, 1.0)

    def run(self) -> Path:
        """Trains to the end, or until a signal asks to save and stop. Returns the run folder.

        Raises:
            NonFiniteError: a loss or gradient is nan or infinite, or after that step a validation
                loss; nothing of it is saved.
        """
        config, total = self.config, self.config.train.total_tokens
        with Progress(
            total, total_steps=self.total_steps, silent=not self.world.is_main
        ) as self.display:
            for note in [self.headline(), *self.notes]:
                self.display.say(note)
            self.clock.start(self.tokens)
            stopping = warned = False
            while self.tokens < total and not stopping:
                with self.profile.step(self.step + 1):
                    record, stopping = self.optimizer_step()
                self.describe_once()
                self.display.advance(step=self.step, tokens=self.tokens, eta_s=self.eta())
                done = self.tokens >= total
                if self.is_logged(self.step, self.tokens):
                    self.report(record)
                warned = warned or self.warn_of_leak(record)
                with self.clock.paused():
                    if done or (config.eval.every and self.step % config.eval.every == 0):
                        self.validate()
                    if done or stopping or self.step % config.checkpoint.every == 0:
                        self.save()
            self.profile.close()
            return self.finish()

    def is_logged(self, step: int, tokens: int) -> bool:
        """Whether the step that ends there has a line in metrics.jsonl."""
        done = tokens >= self.config.train.total_tokens
        return step % self.config.log.every == 0 or step == 1 or done

    def optimizer_step(self) -> tuple[dict[str, Any], bool]:
        """One step on the next global batch: its metrics, and whether some rank was asked to
        stop.
        """
        config, world, depths = self.config, self.world, self.config.mtp.depths
        alpha, micro = config.train.balance_loss_weight, config.train.micro_batch_size
        step = schedules.coming_step(
            config, self.tokens, micro * world.data_size, self.lambda_state
        )
        share = {"rank": world.data_rank, "world_size": world.data_size, "micro_batch_size": micro}
        batch = self.next_batch(step.batch_size, share)
        # Valid targets of the whole step, per rank over which DeepSpeed averages gradients,
        # world.replicas. (Pipeline stages and slices of rows count the same batch once on each of
        # their ranks.)
        counts = torch.stack(
            [self.model.counts(t, documents, scored) for t, documents, scored in batch]
        ).sum(0)
        normalizer = self.engine.all_reduce(counts) / world.size / world.slices

        settings = LossSettings(step.loss_weights, alpha, normalizer)
        self.model.draw = config.run.seed, self.step
        out = self.engine.accumulate(batch, settings)
        # A GPU is still computing. What follows waits for it, once here and once for the norm of
        # the gradient.
        coming = schedules.coming_step(config, step.tokens, micro * world.data_size)
        self.sampler.prepare(coming.batch_size, **share)
        stop = out.loss.new_full((), bool(self.stop))
        totals = torch.cat(
            [torch.stack([out.loss, out.balance, out.nodes.sum(), stop]), metric_sums(out)]
        )
        reduced = self.engine.all_reduce(torch.cat([totals, out.load.flatten()]))
        load, on_host = reduced[len(totals) :].view_as(out.load), reduced.cpu()
        total_loss, balance, node_count, stopping, *sums = on_host[: len(totals)].tolist()
        record = {"train/loss": total_loss / world.replicas}
        means = metric_means(sums, depths, config.mtp.term_names)
        record |= {f"train/{name}": value for name, value in means.items()}
        self.require_finite(record)
        if config.log.gradients and (self.step + 1) % config.log.gradients == 0:
            record |= gradient_angle(self.engine, batch, step.loss_weights)
        logged = self.is_logged(self.step + 1, step.tokens)
        norm, sides = self.engine.step(step.lr, sides=logged)
        record["optim/grad_norm"] = norm
        record |= {f"optim/grad_norm/{side}": value for side, value in sides.items()}
        self.require_finite(record)
        bounded = sides if config.clips_apart else {"": norm}
        for side, value in bounded.items():
            key = f"optim/clipped/{side}" if side else "optim/clipped"
            record[key] = float(clipped(value, config.optim.grad_clip))
        self.model.update_router_bias(load, step.bias_speed)
        if self.average is not None:
            self.average.update()

        record["train/balance_loss"] = alpha * balance / step.batch_size
        if depths:
            record["train/mtp_weight"] = step.loss_weight
            record |= {f"train/mtp_weight/{k}": w for k, w in enumerate(step.loss_weights, 1)}
        record |= {
            "optim/lr": step.lr,
            "moe/bias_update_speed": step.bias_speed,
            "train/batch_size": step.batch_size,
        }
        record |= self.load_metrics(on_host[len(totals) :].view_as(out.load), node_count)
        if self.lambda_state is not None:  # rank 0's, so that no rank can have another
            state = self.lambda_state
            self.lambda_state = on_main(
                world, lambda: schedules.next_state(config.mtp, state, record)
            )
        self.step += 1
        self.tokens = step.tokens
        return record, stopping > 0

    @named("data")
    def next_batch(self, rows: int, share: dict[str, int]) -> Batch:
        """This rank's micro-batches of the next global batch, on its device."""
        pieces = self.sampler.next_batch(rows, **share)
        return [to_device(*piece, config=self.config, device=self.world.device) for piece in pieces]

    def load_metrics(self, load: torch.Tensor, nodes: float) -> dict[str, float]:
        """MaxVio = (max load - mean) / mean (arXiv 2408.15664): mean over the trunk's routers, then
        each MTP router.

        And how many expert groups, which are nodes, a token is sent to: mean over all routers.
        """
        if not len(load):
            return {}
        # of all routers together
        tokens = load.sum().item() / self.config.model.num_experts_per_tok
        violation = (load.amax(1) / load.mean(1) - 1).tolist()
        trunk = self.config.model.num_hidden_layers - self.config.model.first_k_dense_replace
        record = {"moe/max_violation": sum(violation[:trunk]) / trunk} if trunk else {}
        record |= {
            f"moe/mtp_max_violation/{k}": v for k, v in enumerate(violation[trunk:], start=1)
        }
        return record | {"moe/nodes_per_token": nodes / tokens}

    def require_finite(self, record: dict[str, Any]) -> None:
        bad = [f"{name} = {value}" for name, value in record.items() if not math.isfinite(value)]
        if bad:
            last = newest_checkpoint(self.folder / "checkpoints")
            remedy = f"the last checkpoint is {last}" if last else "there is no checkpoint yet"
            raise NonFiniteError(
                f"step {record.get('step', self.step + 1)} "
                f"({self.tokens:,} tokens): {', '.join(bad)}; {remedy}. "
                "Lower optim.lr or optim.grad_clip, or look at the data of this step."
            )

    def report(self, record: dict[str, Any]) -> None:
        """Progress line, metrics.jsonl, monitor."""
        speed = self.clock.lap(self.tokens)
        device = torch.cuda.get_device_name() if self.world.device.type == "cuda" else "cpu"
        utilisation = mfu(speed, self.size.flops_per_token, device, self.world.size)
        record = self.stamp() | record | {"perf/tokens_per_s": speed}
        if utilisation is not None:
            record["perf/mfu"] = utilisation
        if self.world.device.type == "cuda":
            record["perf/peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.display.train(record, eta_s=self.eta())
        self.write(record)

    def validate(self) -> None:
        record = self.stamp() | evaluate(self.engine, self.val, self.config)
        # the last update of a run has no step behind it that would show it
        self.require_finite(record)
        notes = []
        text, readable = self.val.text, all(source.text for source in self.sampler.sources)
        if self.progress >= 1 and self.world.is_main and text is not None and readable:
            batches = self.config.eval.batches
            floors, why = text_floors(self.sampler, text, self.config, batches=batches)
            record |= floors
            notes = [floors_line(record) if floors else why, early_training(record)]
        self.display.validation(record)
        for note in filter(None, notes):
            self.display.say(note)
        self.write(record)

    def eta(self) -> float | None:
        return self.clock.eta(max(self.config.train.total_tokens - self.tokens, 0))

    def stamp(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "tokens": self.tokens,
            "progress": self.progress,
            "time_s": self.clock.seconds,
        }

    def write(self, record: dict[str, Any]) -> None:
        if self.world.is_main:
            self.log.append(record)
            self.engine.write_events({k: v for k, v in record.items() if "/" in k}, self.tokens)

    def warn_of_leak(self, record: dict[str, Any]) -> bool:
        main = record["train/main_loss"]
        low = {
            k: v
            for k, v in record.items()
            if k.startswith("train/mtp_loss/") and v < LEAK_RATIO * main
        }
        # On a task a head may well solve what the main head has not solved yet: no leak.
        if (
            not low
            or self.progress < self.config.optim.schedule.warmup
            or self.val.task is not None
        ):
            return False
        self.display.say(
            f"WARNING step {self.step}: {low} below {LEAK_RATIO} "
            f"x main loss {main:.3f}: is a target leaking?"
        )
        return True

    def save(self) -> None:
        state = {"step": self.step, "tokens": self.tokens, "config": self.config.to_dict()}
        state |= {"sampler": self.sampler.state_dict(), "clock": self.clock.state_dict()}
        state |= {"layout": describe(self.config, self.world.size)}
        state |= {"loss_weight": self.lambda_state}
        on_main(self.world, self.log.sync)
        root = self.folder / "checkpoints"
        keep = self.config.checkpoint.keep
        checkpoint.save(
            self.engine, root, step=self.step, state=state, keep=keep, average=self.average
        )

    def resume(self, folder: Path, saved: checkpoint.State) -> list[str]:
        """Restores the state `saved` in `folder`, by any layout of ranks; returns what to tell the
        user.
        """
        here = describe(self.config, self.world.size)
        finished = saved["tokens"] >= self.config.train.total_tokens
        notes = changed_settings(saved["config"], self.config, folder, finished=finished)
        notes += self.warmed_again(saved)
        notes += changed_code(self.config)
        self.sampler.load_state_dict(saved["sampler"])
        moments = getattr(torch, self.config.optim.moments)
        notes += checkpoint.load(self.engine, folder, moments=moments, average=self.average)
        self.step, self.tokens = saved["step"], saved["tokens"]
        self.clock.load_state_dict({"seconds": saved["clock"]["seconds"]})
        notes += self.resume_lambda(saved)
        moved = f", a checkpoint of {saved['layout']}, on {here}" if saved["layout"] != here else ""
        return [f"resumed at step {self.step} from {folder}{moved}", *notes]

    def resume_lambda(self, saved: Mapping[str, Any]) -> list[str]:
        """The state of lambda's schedule; a schedule of another type begins with its first state."""
        if self.lambda_state is None:
            return []
        before = saved["config"]["mtp"]["loss_weight"]["type"]
        if saved.get("loss_weight") is None or before != self.config.mtp.loss_weight.type:
            return ["mtp.loss_weight: of another type than before, begins with its first state"]
        self.lambda_state = saved["loss_weight"]
        return []

    def warmed_again(self, saved: Mapping[str, Any]) -> list[str]:
        """A longer train.total_tokens moves the progress back, and with it the schedules."""
        before, total = saved["config"]["train"]["total_tokens"], self.config.train.total_tokens
        if total == before:
            return []
        tokens = saved["tokens"]
        old, new = (min(tokens / length, 1.0) for length in (before, total))
        rates = [schedules.learning_rate(self.config.optim, progress) for progress in (old, new)]
        text = f"progress goes from {old:.0%} to {new:.0%}, the learning rate from {rates[0]:.2e}"
        again = ": it is warmed again" if rates[1] > 1.01 * rates[0] else ""
        return [f"train.total_tokens: {text} to {rates[1]:.2e}{again}"]

    def finish(self) -> Path:
        """Plots, and says in one line how the run ended."""
        if self.world.is_main:
            from dsv3_mtp.report.plots import (
                plot_run,  # here, because matplotlib would make every start wait for it
            )

            plot_run(
                read_metrics(self.folder / "metrics.jsonl"),
                self.folder / "curves.png",
                title=self.config.run.name,
            )
        if self.progress < 1:
            end = (
                f"stopped at step {self.step} by "
                f"{(self.stop and self.stop.reason) or 'another rank'}; the same command continues"
            )
        else:
            end = (
                f"finished: {self.step} steps, {self.tokens:,} "
                f"tokens, {self.clock.seconds:.0f} s of training"
            )
        self.display.say(f"{end}\nresults: {self.folder} (curves.png, metrics.jsonl, checkpoints/)")
        return self.folder

    def headline(self) -> str:
        config, size = self.config, self.size
        heads = (
            config.mtp.mode
            if config.mtp.mode == "none"
            else f"{config.mtp.mode} D={config.mtp.depths}"
        )
        tokens = [source.tokens for source in self.sampler.sources if source.tokens is not None]
        data = quantity(sum(tokens)) if tokens else self.val.path
        experts = (
            f", EP {config.parallel.expert_parallel_size}"
            if config.parallel.expert_parallel_size > 1
            else ""
        )
        stages = f", {self.world.stages} pipeline stages" if self.world.stages > 1 else ""
        stages += f", rows over {self.world.slices} ranks" if self.world.slices > 1 else ""
        return (
            f"{config.run.name}: {quantity(size.total)} parameters "
            f"({quantity(size.active)} active) + MTP {heads} "
            f"({quantity(size.mtp_total)}), "
            f"{quantity(config.train.total_tokens)} tokens of {data}, "
            f"{self.world.size} x {self.world.device.type}{stages}, "
            f"ZeRO-{config.parallel.zero_stage}{experts}, "
            f"{config.train.dtype}"
        )
