"""A run as TensorBoard event files in RUN/tensorboard."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.image import imread
from torch.utils.tensorboard import SummaryWriter

from qatlora.report.results import RunReport, TrainPoint
from qatlora.report.results_curve import CurvePoint
from qatlora.report.run_sections import gate_table, score_table
from qatlora.tracking.figures import scalars

FOLDER = "tensorboard"


class TensorBoardTracker:
    """Scalars per step; tables and plots at the end."""

    def __init__(self, run_dir: Path, last_step: int) -> None:
        """Hide what an earlier start has logged after `last_step`, or all of it where that is 0."""
        first = last_step + 1 if last_step else 0
        self._writer = SummaryWriter(str(run_dir / FOLDER), purge_step=first)
        self._step = last_step

    def log(self, point: TrainPoint | CurvePoint) -> None:
        """Write the step's scalars."""
        self._step = point.step
        for name, value in scalars(point).items():
            self._writer.add_scalar(name, value, point.step)

    def report(self, report: RunReport, written: Sequence[Path]) -> None:
        """Write the tables as Markdown, mean KLDs as scalars too, and the plots as images."""
        for text, results in report.texts.items():
            for model, result in results.items():
                if result.kld is not None:
                    self._writer.add_scalar(f"kld_mean/{text}/{model}", result.kld.mean, self._step)
        self._writer.add_text("scores", "\n\n".join(score_table(report)), self._step)
        if report.guard:
            self._writer.add_text("gates", gate_table(report.guard), self._step)
        for path in written:
            if path.suffix == ".png":
                image = imread(path)[..., :3]
                self._writer.add_image(path.stem, image, self._step, dataformats="HWC")

    def close(self, *, failed: bool) -> None:
        """Write what is still held."""
        self._writer.close()
