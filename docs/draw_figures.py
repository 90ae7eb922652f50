r"""Draw docs/figures/*.png: `python -m docs.draw_figures BASE ADAPTER_RUN CHAT_RUN`.

Everything shown is computed from the weights and reports of three runs, on a CPU in some minutes:

    python -m qatlora recipe=qat_distill base=smollm2_135m train.max_steps=110 run_dir=DISTILL
    python -m qatlora recipe=chat_sft base.path=DISTILL/base storage=q4_0 adapter=both \
        teacher=none train.rows_per_step=2 train.micro_batch_rows=2 data.max_length_tokens=128 \
        'stages=[preflight,load_data,load_base,attach,train,save_adapter]' run_dir=ADAPTER_RUN
    python -m qatlora recipe=chat_sft run_dir=CHAT_RUN      # with llama.cpp's tools built

BASE is DISTILL/base: SmolLM2-135M-Instruct (Apache-2.0), every block on its grid.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.ticker import PercentFormatter
from safetensors.torch import load_file
from torch import Tensor

from qatlora.adapters.deployed import changed_steps, low_rank
from qatlora.adapters.saved import read_identity
from qatlora.base.source import Source, read_source
from qatlora.base.stores import reciprocal
from qatlora.files import replacing
from qatlora.grid import (
    BLOCK_SIZE,
    LEVEL_MAX,
    LEVEL_MIN,
    Q4Blocks,
    decode,
    digest,
    dither,
    encode_reference,
    nearest_levels,
    recover,
)
from qatlora.report.axes import BLACK, BLUE, GREEN, GREY, VERMILION, new_panels
from qatlora.report.formatting import format_share

FIGURES = Path(__file__).parent / "figures"
_SHOWN = "model.layers.10.mlp.up_proj"  # a block of whose weights is drawn,
_SHOWN_PEAK = 5  # the first one whose largest level is this
_EVERY = 9  # of the trained linears one in nine: all seven kinds, in all depths
_HALF_CELL = 0.5
_DOTS_PER_INCH = 110  # files of less than 100 kB


@dataclass(frozen=True)
class TrainedLayer:
    """One linear of the base and what its adapter has learned; [out, in] or [out, in / 32].

    Attributes:
        levels: the base's, int8; on the grid they are the latents, too.
        in_steps: the delta B A measured in steps, float32.
        dither: u of each weight, float32.
        step_change: relative change of each step, float32.
    """

    levels: Tensor
    in_steps: Tensor
    dither: Tensor
    step_change: Tensor


def trained_layers(source: Source, adapter: Path) -> Iterator[TrainedLayer]:
    """Every trained linear; what is computed here is what the adapter deploys, by its digest."""
    identity = read_identity(adapter)
    factors = load_file(adapter / "adapter_model.safetensors")
    for name in identity.trained[::_EVERY]:
        down, up, steps_down, steps_up = (
            factors[f"base_model.model.{name}.{part}.weight"]
            for part in ("lora_A", "lora_B", "lora_steps_A", "lora_steps_B")
        )
        base = recover(source.tensor(f"{name}.weight")).blocks
        delta = low_rank(up, down, identity.rule.scale).unflatten(-1, (-1, BLOCK_SIZE))
        in_steps = (delta * reciprocal(base.steps).unsqueeze(-1)).flatten(-2)
        noise = dither(identity.rule.seed, name, base.levels.shape)
        moved = nearest_levels(base.levels + in_steps + noise)
        change = low_rank(steps_up, steps_down, 1.0)
        assert identity.deployed[name] == digest(Q4Blocks(changed_steps(base.steps, change), moved))
        yield TrainedLayer(base.levels, in_steps, noise, change)


def block_figure(weight: Tensor) -> Figure:
    """One block on its grid, and the same block by llama.cpp's rule."""
    recovered, reference = recover(weight).blocks, encode_reference(weight)
    peaks = recovered.levels.unflatten(-1, (-1, BLOCK_SIZE)).abs().amax(-1)
    row, block = (peaks == _SHOWN_PEAK).nonzero()[0].tolist()
    part = slice(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)
    figure, axes = new_panels(2, share_axes=True)
    rules = {"The step it was trained with": recovered, "llama.cpp's step, peak / 8": reference}
    for axis, (rule, blocks) in zip(axes, rules.items(), strict=True):
        step = float(blocks.steps[row, block])
        _draw_block(axis, weight[row, part].float(), step, blocks.levels[row, part])
        equal = (decode(blocks, weight.dtype) == weight).unflatten(-1, (-1, BLOCK_SIZE)).all(-1)
        exact = format_share(float(equal.float().mean()))
        axis.set_title(f"{rule}: {abs(step):.5f}\n{exact} of the matrix's blocks are kept exactly")
    axes[0].set_ylabel("weight")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _draw_block(axis: Axes, stored: Tensor, step: float, levels: Tensor) -> None:
    """The 16 values that a step allows as lines, weights as dots, their rounded values as rings."""
    places, rounded = range(len(stored)), step * levels.float()
    axis.grid(visible=False)
    axis.hlines(
        [step * level for level in range(LEVEL_MIN, LEVEL_MAX + 1)], -1, 32, color="#CCCCCC", lw=0.8
    )
    axis.vlines(places, stored, rounded, color=VERMILION, linewidth=2)
    axis.plot(places, rounded, "o", mfc="none", color=VERMILION, ms=7, label="what Q4_0 stores")
    axis.plot(places, stored, "o", color=BLUE, ms=3.2, label="weight of the checkpoint")
    axis.set(xlabel="place in the block", xlim=(-1, 32))
    labels = axis.secondary_yaxis("right", functions=(lambda w: w / step, lambda t: t * step))
    labels.set_yticks(range(-8, 8, 2))
    labels.set_ylabel("level")


def dead_zone_figure(layers: list[TrainedLayer]) -> Figure:
    """How large trained deltas are, and what rounding makes of a delta with and without dither."""
    figure, (sizes, kept) = new_panels(2)
    deltas = torch.cat([layer.in_steps.flatten() for layer in layers]).abs()
    edges = torch.logspace(-5, 0.5, 80)
    shares = torch.histogram(deltas.clamp_min(1e-5), edges).hist / len(deltas)
    sizes.stairs(shares, edges, fill=True, color=BLUE, alpha=0.5)
    sizes.axvspan(_HALF_CELL, 10**0.5, color=VERMILION, alpha=0.15, lw=0)
    sizes.set(xscale="log", xlim=(1e-5, 10**0.5), xlabel="trained delta, in steps (absolute)")
    sizes.text(0.62, shares.max(), "changes\na level", color=VERMILION, va="top")
    mean, largest = format_share(float(deltas.mean())), float(deltas.max())
    sizes.set_title(
        f"Trained deltas: {mean} of a step on average,\nthe largest {largest:.2f} steps"
    )
    sizes.set_ylabel("share of weights")
    sizes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _draw_kept(kept, layers[0])
    return figure


def _draw_kept(axis: Axes, layer: TrainedLayer) -> None:
    """Mean change of a matrix's levels when every weight gets the same delta."""
    deltas = torch.linspace(-1, 1, 201).tolist()
    for label, noise, color in (
        ("without dither", torch.zeros(()), VERMILION),
        ("with dither", layer.dither, BLUE),
    ):
        means = [
            float((nearest_levels(layer.levels + noise + delta) - layer.levels).float().mean())
            for delta in deltas
        ]
        axis.plot(deltas, means, color=color, linewidth=2, label=label)
    axis.plot([-1, 1], [-1, 1], ":", color=GREY, label="the delta itself")
    axis.set(xlabel="delta of every weight, in steps", ylabel="mean change of the levels")
    axis.set_title("What rounding leaves of a delta\n(one matrix on its grid)")
    axis.legend(frameon=False, loc="upper left")


def dither_figure(layers: list[TrainedLayer]) -> Figure:
    """Where weights lie in their cells and what trained deltas do there; a sample of one matrix."""
    figure, axes = new_panels(2, share_axes=True)
    layer = layers[len(layers) // 2]
    deltas, noise = (part.flatten()[::151] for part in (layer.in_steps, layer.dither))
    height = float(deltas.abs().max()) * 1.1
    for axis, place, title in zip(
        axes,
        (torch.zeros_like(noise), noise),
        ("without dither: in the middle of its cell", "with dither: anywhere in its cell"),
        strict=True,
    ):
        crosses = (place + deltas).abs() > _HALF_CELL
        axis.plot(place[~crosses], deltas[~crosses], ".", ms=2, color=GREY, alpha=0.5)
        axis.plot(place[crosses], deltas[crosses], ".", ms=5, color=VERMILION)
        for border in (-_HALF_CELL, _HALF_CELL):
            axis.axline((border, 0), slope=-1, color=BLUE, linewidth=1)
        axis.set(xlim=(-0.55, 0.55), ylim=(-height, height), xlabel="weight in its cell, in steps")
        share = format_share(float(crosses.float().mean()))
        axis.set_title(f"{title}\n{share} of the weights change level")
    axes[0].set_ylabel("trained delta, in steps")
    return figure


def steps_figure(layers: list[TrainedLayer]) -> Figure:
    """What the step adapter has learned: relative changes of all steps."""
    figure, (axis,) = new_panels(1)
    figure.set_figheight(3)
    changes = torch.cat([layer.step_change.flatten() for layer in layers])
    shown = float(changes.abs().quantile(0.999))
    axis.hist(
        changes.numpy(), bins=120, range=(-shown, shown), color=GREEN, alpha=0.7,
        weights=torch.full_like(changes, 1 / len(changes)).numpy(),
    )  # fmt: skip
    mean = format_share(float(changes.abs().mean()))
    axis.set_title(f"Trained steps change by {mean} on average")
    axis.set(xlabel="relative change of a step", ylabel="share of steps")
    axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    return figure


def deployed_figure() -> Figure:
    """Who computes a weight, and who asks for it."""
    figure = Figure(figsize=(9.6, 3.4), layout="constrained", facecolor="white")
    axis = figure.subplots()
    axis.set(xlim=(0, 10), ylim=(0, 4))
    axis.axis("off")
    _box(axis, (3.9, 1.35, 2.2, 1.3), "deployed_weight\nfp16 steps, levels −8 .. 7", BLUE)
    sources = (
        "base\nsteps, latent levels t0",
        "dither u\nof seed, tensor, index",
        "adapter\nB A for levels or steps",
    )
    users = (
        "training\nmultiplies by step × level",
        "evaluation\nperplexity, KLD, answers",
        "guard\nSHA-256 of every tensor",
        "GGUF\nblocks copied as they are",
    )
    for index, text in enumerate(sources):
        y = 2.95 - index * 1.35
        _box(axis, (0.1, y, 2.7, 0.95), text, GREY)
        _arrow(axis, (2.85, y + 0.475), (3.85, 2.4 - index * 0.4))
    for index, text in enumerate(users):
        y = 3.1 - index * 1.0
        _box(axis, (7.2, y, 2.7, 0.8), text, GREEN)
        _arrow(axis, (6.15, 2.45 - index * 0.3), (7.15, y + 0.4))
    return figure


def _box(axis: Axes, place: tuple[float, float, float, float], text: str, color: str) -> None:
    x, y, width, height = place
    outline = FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0.02,rounding_size=0.1", ec=color, lw=1.6,
        fc=f"{color}18",
    )  # fmt: skip
    axis.add_patch(outline)
    head, _, rest = text.partition("\n")
    middle = x + width / 2, y + height / 2
    axis.text(*middle, head, ha="center", va="bottom", weight="bold")
    axis.text(*middle, f"\n{rest}", ha="center", va="center", size="small", linespacing=1.4)


def _arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axis.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=14, color=GREY))


def guard_figure(runtime: dict[str, Any], limit_nats: float) -> Figure:
    """What llama.cpp computes from the file, beside llama-quantize of the same model."""
    rows = [row for row in runtime["rows"] if row["to_trained"]]
    names = ("the file, decoded to F32", "the file", "llama-quantize of the merged model")
    figure, (axis,) = new_panels(1)
    figure.set_figheight(2.6)
    for place, (row, color) in enumerate(zip(rows, (BLUE, BLUE, VERMILION), strict=True)):
        mean, error = row["to_trained"]["mean"], row["to_trained"]["stderr"]
        axis.barh(-place, mean, height=0.55, color=color, alpha=0.75, xerr=error)
        axis.text(
            mean + error + 5e-4, -place, f"{mean:.2g} ± {error:.1g}", va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )  # fmt: skip
    axis.axvline(limit_nats, color=BLACK, linestyle="--", linewidth=1)
    axis.text(limit_nats + 3e-4, 0, "the gate's limit for the file", va="center", size="small")
    axis.set_yticks([0, -1, -2], names)
    axis.grid(visible=False, axis="y")
    axis.set(xlim=(0, 0.04), ylim=(-2.5, 0.5))
    axis.set_xlabel("mean KLD from the trained model in llama.cpp, nats per token")
    return figure


def main() -> None:
    """Draw every figure."""
    base, adapter_run, chat_run = (Path(argument) for argument in sys.argv[1:])
    source = read_source(base, "smollm2")
    layers = [*trained_layers(source, adapter_run / "adapter")]
    report = json.loads((chat_run / "report.json").read_text("utf-8"))
    limit_nats = report["settings"]["guard"]["llama_cpp_kld_max_nats"]
    figures = {
        "block": block_figure(source.tensor(f"{_SHOWN}.weight")),
        "dead_zone": dead_zone_figure(layers),
        "dither": dither_figure(layers),
        "steps": steps_figure(layers),
        "deployed": deployed_figure(),
        "guard": guard_figure(report["runtime"], limit_nats),
    }
    for name, figure in figures.items():
        with replacing(FIGURES / f"{name}.png") as partial:
            FigureCanvasAgg(figure)
            figure.savefig(partial, format="png", dpi=_DOTS_PER_INCH)


if __name__ == "__main__":
    main()
