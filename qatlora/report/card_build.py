"""Sections of the card of a built folder: what it is, how it was made, how to use it."""

from collections.abc import Iterator

from qatlora.report.escape import code_span, inline
from qatlora.report.fidelity_text import card_table
from qatlora.report.formatting import format_bytes, format_share
from qatlora.report.results import RunReport
from qatlora.report.results_fidelity import FidelityResult

_MADE_WITH = {"q4_0": ("torch",), "nf4": ("torch", "transformers", "bitsandbytes")}


def build_sections(report: RunReport) -> Iterator[str]:
    """Paragraphs of Markdown."""
    build, base = report.build, report.base
    assert build is not None
    assert base is not None
    what = _Q4_0 if build.storage == "q4_0" else _NF4
    yield what.format(name=inline(base.name))
    yield "## How it was made"
    yield _figures(report)
    if report.fidelity is not None:
        yield "## Fidelity"
        yield from _fidelity(report.fidelity)
    if build.continuation is not None:
        yield "## A look at it"
        yield f"Loaded by plain transformers, greedily, after {code_span(build.prompt or '')}:"
        yield _quoted(build.continuation)


def _figures(report: RunReport) -> str:
    build, base = report.build, report.base
    assert build is not None
    assert base is not None
    kinds = ", ".join(f"{count} {kind}" for kind, count in build.modules.items())
    versions = [f"{name} {report.versions[name]}" for name in _MADE_WITH[build.storage]]
    rows = {
        "made from": f"{inline(base.name)}, {base.parameters:,} parameters, bf16",
        "made by": f"qatlora {report.versions['qatlora']}, recipe {build.storage}_build; "
        f"{', '.join(versions)}",
        "quantized": f"{sum(build.modules.values())} linears: {inline(kinds)}",
        "everything else": "bf16",
        "size": f"{format_bytes(build.bytes)}; the source has {format_bytes(build.source_bytes)}",
        "relative error of the quantized weights": format_share(build.relative_error),
        "share of their blocks on a Q4_0 grid in the source": format_share(base.on_grid_share),
        "SHA-256 of the source's tensors": f"`{build.source_digest}`",
        "digest as a base": f"`{base.digest}`",
    }
    table = "\n".join(f"| {label} | {value} |" for label, value in rows.items())
    return f"| | |\n|---|---|\n{table}"


def _fidelity(result: FidelityResult) -> Iterator[str]:
    tokens = {name: text.tokens for name, text in result.models[0].texts.items()}
    counts = " and ".join(f"{count:,} of {inline(name)}" for name, count in tokens.items())
    yield card_table(result)
    yield (
        "KL(bf16 || build) over the whole vocabulary in nats per token, each checkpoint against "
        f"its own bf16 weights, on one forward in {result.precision}; scored tokens: {counts}, in "
        f"windows of {result.window_tokens} that begin with BOS where the tokenizer has one. "
        "`Q4_0 ours` are the steps that qatlora searches or recovers, `Q4_0 reference` is "
        "llama.cpp's rule."
    )


def _quoted(text: str) -> str:
    return "\n".join(f"> {inline(line)}" for line in text.strip().splitlines() or [""])


_Q4_0 = """\
# {name}, packed Q4_0

The linears of the decoder as Q4_0 blocks (an fp16 step and 32 levels of 4 bits), exactly as a GGUF
holds them; a base for fine-tuning with qatlora, which deploys these very blocks:

```bash
python -m qatlora recipe=chat_sft base.path=THIS_FOLDER storage=q4_0
```

Plain transformers cannot load it and says so. `grid.json` records what the source's grid was."""

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
```"""
