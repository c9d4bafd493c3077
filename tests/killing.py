"""A callback that kills every process that its own one has started."""

import os
import signal
from pathlib import Path

from lightning.pytorch import Callback


class KillChildren(Callback):
    """Kills W&B's service, the only child of a run without loader workers, before the second step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 1:
            children = [p for file in Path("/proc/self/task").glob("*/children") for p in file.read_text().split()]
            assert children
            for process in children:
                os.kill(int(process), signal.SIGKILL)
