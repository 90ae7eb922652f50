"""Where the training log and models may go: wandb, TensorBoard, the hub. Nothing is asked there."""

import importlib.util
import os
from collections.abc import Iterator

from huggingface_hub import get_token

from qatlora.doctor import Patient
from qatlora.report.results_doctor import MISSING, NOTE, OK, Finding
from qatlora.tracking.wandb_login import has_key

_AREA = "logins"


def findings(patient: Patient) -> Iterator[Finding]:
    """Which keys are stored (never shown), and which of the packages are there."""
    mode = os.environ.get("WANDB_MODE")
    if has_key():
        yield Finding(_AREA, "wandb", OK, "a key is stored" + (f", WANDB_MODE={mode}" * bool(mode)))
    else:
        yield Finding(_AREA, "wandb", NOTE, "no key: runs are kept offline", "wandb login")
    if importlib.util.find_spec("tensorboard") is not None:
        yield Finding(_AREA, "TensorBoard", OK, "installed")
    else:
        status = MISSING if patient.tracker == "tensorboard" else NOTE
        yield Finding(_AREA, "TensorBoard", status, "not installed", "pip install tensorboard")
    if get_token():
        yield Finding(_AREA, "Hugging Face hub", OK, "a token is stored")
    else:
        found = "no token: models with terms to accept cannot be fetched"
        yield Finding(_AREA, "Hugging Face hub", NOTE, found, "hf auth login")
