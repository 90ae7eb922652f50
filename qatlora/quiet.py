"""The one place that silences other libraries; each process of ours calls it first."""

import logging
import os
import warnings

_QUIET = {
    "BITSANDBYTES_NOWELCOME": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",  # else it warns whenever a tool is started
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
}
_CHATTY_LOGGERS = (
    "bitsandbytes.backends.cpu.ops",  # offers a kernel from the hub at the first CPU forward
    "filelock",
    "httpx",
    "torch.distributed.elastic.multiprocessing.redirects",
)


def quiet_libraries() -> None:
    """Silence what a person who trains cannot act on; warnings still come through."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    # Renamed arguments inside other libraries.
    libraries = r"(accelerate|peft|transformers|trl)\."
    warnings.filterwarnings("ignore", category=FutureWarning, module=libraries)
    # A launcher's own schema checks our file of the same name: deprecated, and welcome.
    warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/", category=UserWarning)
    for name in _CHATTY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
