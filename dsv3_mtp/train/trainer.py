"""The training loop. `Trainer.run` is the run, `Trainer.optimizer_step` one step of it."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dsv3_mtp.config import Config, code, schedules
from dsv3_mtp.config.layout import describe
from dsv3_mtp.data.opening import build_missing, open_sources
from dsv3_mtp.hf import load_weights
from dsv3_mtp.hf.frozen import stays_fp8
from dsv3_mtp.model.causal_lm import meta_model
from dsv3_mtp.model.output import Batch, LossSettings
from dsv3_mtp.model.size import model_size, require_memory
from dsv3_mtp.ops.compute import Compute, building
from dsv3_mtp.ops.ranges import named
from dsv3_mtp.parallel.average import WeightAverage
from dsv3_mtp.parallel.build import build_model, check_monitors, start_engine, writable
from dsv3_mtp.parallel.engine import deepspeed_config
from dsv3_mtp.parallel.launch import StopRequest, on_all, on_main, start, starting
from dsv3_mtp.precision.convert import choose_compute
from dsv3_mtp.precision.stored import stored
from dsv3_mtp.report.metrics import Clock, MetricsLog, read_metrics
from dsv3_mtp.report.monitors import Monitor, open_monitors
from dsv3_mtp.report.progress import Progress
from dsv3_mtp.runs.folder import find_checkpoints, lock_folder, run_folder, write_run_folder
from dsv3_mtp.train import checkpoint, words
from dsv3_mtp.train.floors import text_floors
from dsv3_mtp.train.gradients import gradient_angle
from dsv3_mtp.train.optim import build_optimizer
from dsv3_mtp.train.profile import StepProfile, require_within
from dsv3_mtp.train.record import (
    Clipped,
    NonFiniteError,
    non_finite,
    norm_metrics,
    router_metrics,
    schedule_metrics,
    speed_metrics,
)
from dsv3_mtp.train.resume import resume_notes, resumed_lambda
from dsv3_mtp.train.validation import evaluate, metric_means, metric_sums, to_device


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
        self.held: int | None = None  # descriptor of the folder's lock, on rank 0
        try:
            with starting(config.parallel.timeout_s):
                self.build(command, notes, profile)
        except BaseException:
            self.release()
            raise
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
        require_within(profile, self.steps)
        check_monitors(config)
        ds_config = deepspeed_config(config, self.world.size)
        on_main(self.world, lambda: build_missing(config))
        self.sampler, self.val = on_all(self.world, lambda: open_sources(config))
        on_main(self.world, self.claim)
        complete, found = on_main(self.world, lambda: find_checkpoints(config))
        latest, damaged = checkpoint.first_sound(self.world, complete)
        saved = latest and checkpoint.read_state(latest)  # what is damaged is told at once
        self.notes = [*found, *damaged, *notes]

        self.build_engine(ds_config, latest)
        self.step = self.tokens = 0
        self.monitors: list[Monitor] = []
        self.table: dict[str, float] = {}  # of the last validation
        self.lambda_state = schedules.first_state(config.mtp)
        self.clock, self.clipped = Clock(), Clipped()
        if latest and saved:
            self.notes += self.resume(latest, saved)
        path = self.folder / "metrics.jsonl"
        self.log = on_main(self.world, lambda: MetricsLog.after(path, self.step or -1))
        on_main(self.world, self.open_monitors)
        # What this start is. A resumed run writes it after its first step: until then the folder
        # holds what the settings there made.
        sources = {f"train/{i}": source for i, source in enumerate(self.sampler.sources)}
        self.describe: Callable[[], None] | None = partial(
            write_run_folder,
            *(config, ds_config),
            world_size=self.world.size,
            command=command,
            sources=sources | {"val": self.val},
            step=self.step,
        )
        if not latest:
            self.describe_once()

    def build_engine(self, ds_config: dict[str, Any], latest: Path | None) -> None:
        """Model, optimizer and DeepSpeed's engine. latest: the checkpoint that is read next."""
        config = self.config
        fp8, notes = stays_fp8(config, latest)
        with building(stored(Compute()) if fp8 else Compute()):
            whole = meta_model(config.model, config.mtp, freeze=config.train.freeze)
        # bfloat16 weights, float32 masters and two moments at the least; of a frozen trunk weights
        frozen = getattr(torch, config.train.dtype).itemsize
        require_memory(whole, bytes_per_value=12, frozen=frozen, ranks=self.world.size)
        self.size = model_size(whole, config.data.seq_len)
        compute, chosen = choose_compute(
            config, self.world.device, lambda: meta_model(config.model, config.mtp)
        )
        compute = stored(compute) if fp8 else compute
        self.model = build_model(config, ds_config, self.world, compute)
        if config.train.init_from is not None and latest is None:
            self.notes += load_weights(self.model, Path(config.train.init_from), writable=writable)
        if config.train.freeze == "trunk":
            self.model.freeze_trunk()
        self.notes += [*notes, *chosen]
        heads = self.model.mtp if config.clips_apart else None
        optimizer = build_optimizer(self.model, config.optim, apart=heads)
        self.engine = start_engine(self.model, optimizer, ds_config, self.world, config)

        decay = config.train.ema_decay
        self.average = None if decay is None else WeightAverage(self.engine, decay)

    def claim(self) -> None:
        """Holds the run folder for this process until it ends, or `release`."""
        self.held = lock_folder(self.folder)

    def release(self) -> None:
        """Another trainer, of this process too, may go on with the run."""
        if self.held is not None:
            os.close(self.held)
            self.held = None

    def open_monitors(self) -> None:
        self.monitors = open_monitors(self.config, self.folder, self.tokens)

    def describe_once(self) -> None:
        if self.describe is not None:
            on_main(self.world, self.describe)
            self.describe = None

    @property
    def steps(self) -> int:
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
        with Progress(total, total_steps=self.steps, silent=not self.world.is_main) as self.display:
            lines = words.header(config, self.size, self.world, self.sampler)
            lines += [*words.weightless(config, self.size), *words.busy(self.world)]
            for note in [*lines, *self.notes]:
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
                if not warned and self.progress >= config.optim.schedule.warmup:
                    warned = self.warn(words.leak(self.step, record, self.val))
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
        """A step on the next global batch: its metrics, and whether a rank was asked to stop."""
        config, world, depths = self.config, self.world, self.config.mtp.depths
        alpha, micro = config.train.balance_loss_weight, config.train.micro_batch_size
        step = schedules.coming_step(
            config, self.tokens, micro * world.data_size, self.lambda_state
        )
        share = {"rank": world.data_rank, "world_size": world.data_size, "micro_batch_size": micro}
        batch = self.next_batch(step.batch_size, share)
        settings = LossSettings(step.loss_weights, alpha, self.normalizer(batch))
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
        record |= norm_metrics(config, norm, sides)
        self.clipped.add(record)
        self.require_finite(record)
        self.model.update_router_bias(load, step.bias_speed)
        if self.average is not None:
            self.average.update()

        record["train/balance_loss"] = alpha * balance / step.batch_size
        record |= schedule_metrics(config, step)
        record |= router_metrics(config, on_host[len(totals) :].view_as(out.load), node_count)
        self.advance_lambda(record)
        self.step += 1
        self.tokens = step.tokens
        return record, stopping > 0

    def normalizer(self, batch: Batch) -> torch.Tensor:
        """What `MTPLoss.counts` gives for the whole step, per rank over which DeepSpeed averages
        gradients, `World.replicas`: pipeline stages and the ranks that share rows count the same
        batch once each.
        """
        counts = torch.stack([self.model.loss.counts(*piece) for piece in batch]).sum(0)
        return self.engine.all_reduce(counts) / self.world.size / self.world.slices

    def advance_lambda(self, record: dict[str, Any]) -> None:
        """The next state of lambda's schedule: rank 0's, so that no rank can have another."""
        if (state := self.lambda_state) is not None:
            self.lambda_state = on_main(
                self.world, lambda: schedules.next_state(self.config.mtp, state, record)
            )

    def require_finite(self, record: dict[str, Any]) -> None:
        """Raises NonFiniteError."""
        if bad := non_finite(record):
            where = f"step {record.get('step', self.step + 1)} ({self.tokens:,} tokens)"
            own = code.named(self.config.to_dict())
            raise NonFiniteError(words.non_finite(where, bad, self.folder, own))

    @named("data")
    def next_batch(self, rows: int, share: dict[str, int]) -> Batch:
        """This rank's micro-batches of the next global batch, on its device."""
        pieces = self.sampler.next_batch(rows, **share)
        return [to_device(*piece, config=self.config, device=self.world.device) for piece in pieces]

    def report(self, record: dict[str, Any]) -> None:
        """Progress line, metrics.jsonl, monitor."""
        speed = self.clock.lap(self.tokens)
        record = self.stamp() | record | self.clipped.take()
        record |= speed_metrics(speed, self.size.flops_per_token, self.world)
        self.display.train(record, eta_s=self.eta())
        self.write(record)

    def validate(self) -> None:
        record = self.stamp() | evaluate(self.engine, self.val, self.config)
        # the last update of a run has no step behind it that would show it
        self.require_finite(record)
        notes: list[str] = []
        if self.progress >= 1 and self.world.is_main:
            floors, why = text_floors(
                self.sampler, self.val, self.config, batches=self.config.eval.batches
            )
            record |= floors
            notes = words.floors(record, why)
        self.table = {key: value for key, value in record.items() if "/" in key}
        self.display.validation(record)
        for note in notes:
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
            metrics = {key: value for key, value in record.items() if "/" in key}
            for monitor in self.monitors:
                monitor.log(metrics, self.tokens)

    def warn(self, text: str | None) -> bool:
        """Whether there was a warning."""
        if text is not None:
            self.display.say(text)
        return text is not None

    def save(self) -> None:
        state = {"step": self.step, "tokens": self.tokens, "config": self.config.to_dict()}
        state |= {"sampler": self.sampler.state_dict(), "clock": self.clock.state_dict()}
        state |= {"layout": describe(self.config, self.world.size)}
        state |= {"loss_weight": self.lambda_state, "clipped": self.clipped.counts}
        on_main(self.world, self.log.sync)
        root = self.folder / "checkpoints"
        keep = self.config.checkpoint.keep
        checkpoint.save(
            self.engine, root, step=self.step, state=state, keep=keep, average=self.average
        )

    def resume(self, folder: Path, saved: checkpoint.SavedState) -> list[str]:
        """Restores the state `saved` in `folder`, of any layout; returns what to tell the user."""
        here = describe(self.config, self.world.size)
        first, *notes = resume_notes(self.config, saved, folder, here)
        self.sampler.load_state_dict(saved["sampler"])
        moments = getattr(torch, self.config.optim.moments)
        notes += checkpoint.load(self.engine, folder, moments=moments, average=self.average)
        self.step, self.tokens = saved["step"], saved["tokens"]
        self.clock.load_state_dict({"seconds": saved["clock"]["seconds"]})
        self.clipped.counts = dict(saved.get("clipped", {}))  # a checkpoint of before has none
        self.lambda_state, more = resumed_lambda(self.config, saved, self.lambda_state)
        return [first, *notes, *more]

    def finish(self) -> Path:
        """Plots, and says in one line how the run ended."""
        if self.world.is_main:
            for monitor in self.monitors:
                monitor.finish(self.table)
            from dsv3_mtp.report.plots import (
                plot_run,  # here, because matplotlib would make every start wait for it
            )

            plot_run(
                read_metrics(self.folder / "metrics.jsonl"),
                self.folder / "curves.png",
                config=self.config,
            )
        stopped = self.progress < 1
        by = (self.stop and self.stop.reason) or "another rank"
        end = words.ending(self.step, self.tokens, self.clock.seconds, by if stopped else None)
        self.display.say(f"{end}\nresults: {self.folder} (curves.png, metrics.jsonl, checkpoints/)")
        return self.folder
