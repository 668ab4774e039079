"""One YAML file is one run: pydantic sections, `--set` overrides, every problem in one report. No
torch here.

    config = load_config("configs/v3_tiny.yaml", ["mtp.mode=parallel", "optim.lr=1e-3"])
    config.model.hidden_size, config.mtp.depths, config.optim.schedule.warmup

run.py holds the whole and the small sections, model.py and mtp.py what is trained, training.py how,
data.py on what, precision.py in which numbers, layout.py how ranks may share the work, load.py and
reader.py files and reports, deepspeed.py the keys that a run may hand to DeepSpeed.
"""

from dsv3_mtp.config.data import DataConfig, DataEntry
from dsv3_mtp.config.load import load_config
from dsv3_mtp.config.loss_weights import AdaptiveSchedule, LambdaSchedule, LossWeight
from dsv3_mtp.config.loss_weights.step import StepWeight
from dsv3_mtp.config.model import ModelConfig, RopeScaling
from dsv3_mtp.config.mtp import MTPConfig
from dsv3_mtp.config.precision import AttentionConfig, FP8Config
from dsv3_mtp.config.reader import ConfigError
from dsv3_mtp.config.run import Config
from dsv3_mtp.config.source import SOURCES, SourceSection
from dsv3_mtp.config.task import TASKS, Task
from dsv3_mtp.config.training import BatchSizeRamp, OptimConfig, ScheduleConfig, TrainConfig
