"""README.md of a built folder: what it is, how it was made, how to use it."""

import importlib.metadata

from qatlora import __version__
from qatlora.report.fidelity_text import card_table
from qatlora.report.formatting import format_bytes, format_share
from qatlora.report.results import BaseResult
from qatlora.report.results_build import BuildResult
from qatlora.report.results_fidelity import FidelityResult

CARD = "README.md"
_MADE_WITH = {"q4_0": ("torch",), "nf4": ("torch", "transformers", "bitsandbytes")}


def model_card(
    build: BuildResult,
    base: BaseResult,
    fidelity: FidelityResult | None = None,
    hub_id: str | None = None,
) -> str:
    """The text of the card.

    Args:
        build: the folder.
        base: the checkpoint it was made from, with figures of its grid.
        fidelity: the folder beside other builds of the checkpoint, once it has been measured.
        hub_id: of that checkpoint, for the metadata, where it has one.
    """
    what = _Q4_0 if build.storage == "q4_0" else _NF4
    sections = [_front_matter(build, hub_id), what.format(name=base.name), _figures(build, base)]
    if fidelity is not None:
        sections.append(_fidelity(fidelity))
    if build.continuation is not None:
        sections.append(
            "## A look at it\n\nLoaded by plain transformers, greedily, after "
            f"`{build.prompt}`:\n\n{_quoted(build.continuation)}"
        )
    return "\n\n".join(sections) + "\n"


def _front_matter(build: BuildResult, hub_id: str | None) -> str:
    lines = ["tags:", "- qatlora", f"- {build.storage}"]
    if build.storage == "nf4":
        lines = ["library_name: transformers", *lines, "- bitsandbytes"]
    if hub_id is not None:
        lines.append(f"base_model: {hub_id}")
    return "\n".join(["---", *lines, "---"])


def _figures(build: BuildResult, base: BaseResult) -> str:
    kinds = ", ".join(f"{count} {kind}" for kind, count in build.modules.items())
    versions = [f"{name} {importlib.metadata.version(name)}" for name in _MADE_WITH[build.storage]]
    rows = {
        "made from": f"{base.name}, {base.parameters:,} parameters, bf16",
        "made by": f"qatlora {__version__}, recipe {build.storage}_build; {', '.join(versions)}",
        "quantized": f"{sum(build.modules.values())} linears: {kinds}",
        "everything else": "bf16",
        "size": f"{format_bytes(build.bytes)}; the source has {format_bytes(build.source_bytes)}",
        "relative error of the quantized weights": format_share(build.relative_error),
        "share of their blocks on a Q4_0 grid in the source": format_share(base.on_grid_share),
        "SHA-256 of the source's tensors": f"`{build.source_digest}`",
        "digest as a base": f"`{base.digest}`",
    }
    table = "\n".join(f"| {label} | {value} |" for label, value in rows.items())
    return f"## How it was made\n\n| | |\n|---|---|\n{table}"


def _fidelity(result: FidelityResult) -> str:
    tokens = {name: text.tokens for name, text in result.models[0].texts.items()}
    counts = " and ".join(f"{count:,} scored tokens of {name}" for name, count in tokens.items())
    return (
        f"## Fidelity\n\n{card_table(result)}\n\nKL(bf16 || build) over the whole vocabulary in "
        "nats per token, each checkpoint against its own bf16 weights, on one forward in "
        f"{result.precision}; {counts}, windows of {result.window_tokens} tokens that begin with "
        "BOS where the tokenizer has one. `Q4_0 ours` are the steps that qatlora searches or "
        "recovers, `Q4_0 reference` is llama.cpp's rule."
    )


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}" for line in text.strip().splitlines() or [""])


_Q4_0 = """\
# {name}, packed Q4_0

The linears of the decoder as Q4_0 blocks (an fp16 step and 32 levels of 4 bits), exactly as a GGUF
holds them; a base for fine-tuning with qatlora, which deploys these very blocks:

```bash
python -m qatlora recipe=chat_sft base.path=THIS_FOLDER storage=q4_0
```

Plain transformers cannot load it and says so. `grid.json` records what the source's grid was; the
licence and terms of the source hold for this folder, too."""

_NF4 = """\
# {name}, NF4

bitsandbytes NF4 with double quantization, blocks of 64, bf16 compute and uint8 storage, for the
linears of the decoder. Embeddings, lm_head, norms and every linear named in `llm_int8_skip_modules`
of config.json stay in bf16. Plain transformers loads it:

```python
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER", device_map="auto")
```

Beside it lies `q4_0_steps.safetensors`, which transformers does not read: the Q4_0 step of every
block of 32 in the source. NF4 throws a Q4_0 grid away, and with these steps most levels come back;
qatlora uses them when it fine-tunes this folder for a Q4_0 GGUF:

```bash
python -m qatlora recipe=chat_sft base.path=THIS_FOLDER storage=nf4 teacher.path=BF16_FOLDER
```

The licence and terms of the source hold for this folder, too."""
