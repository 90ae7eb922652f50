"""What is installed, stored and logged in on this machine, and what is missing for a run.

The doctor must work where the pipeline cannot even be imported: nothing here imports torch, except
`qatlora.doctor.probe`, which is a process of its own. It never uses the network.
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Patient:
    """What the doctor needs to know of the settings.

    Attributes:
        run_dir: where runs will be written.
        tracker: where the training log will go: none, wandb or tensorboard.
    """

    run_dir: Path
    tracker: str
