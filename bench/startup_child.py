"""One start of a training process for bench/startup.py: CPU seconds at the end of each phase."""

import sys
import time

marks = [("python", time.process_time())]


def mark(name: str) -> None:
    marks.append((name, time.process_time()))


def start(spec: dict) -> tuple[list, dict]:
    from dsv3_mtp.config import load_config

    config = load_config(spec["config"], spec["sets"])
    mark("read the config")
    import torch  # noqa: F401

    mark("import torch")
    import dsv3_mtp.parallel.launch

    mark("import deepspeed")
    import dsv3_mtp.train.process

    mark("import the rest")
    trainer = dsv3_mtp.train.process.own_process(config, command=["bench"])
    mark("process group, data, model, engine")
    trainer.optimizer_step()
    mark("first step")
    trainer.optimizer_step()
    mark("second step")
    return marks, {}


if __name__ == "__main__":
    from child import serve

    serve(start)
    sys.stdout.flush()
