"""What lies beside a published GGUF: card, Modelfile and, where asked for, a step patch."""

import json
from pathlib import Path

import jsonschema
import pytest
from pipeline_cases import STAGES, settings

from qatlora import pipeline
from qatlora.config import AdapterKind, ExportConfig, PatchConfig, RootConfig, Storage
from qatlora.errors import ConfigError
from qatlora.report.json_report import load_schema


@pytest.mark.llama_cpp
def test_the_base_and_a_small_patch_make_the_published_file(
    tiny_llama_folder: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    cfg = settings(tiny_llama_folder, files, tmp_path / "run")
    cfg.storage.kind, cfg.adapter.kind = Storage.q4_0, AdapterKind.steps
    cfg.export, cfg.adapter.rank = ExportConfig(patch=True), 2
    report = pipeline.run(cfg)
    assert report.export is not None
    assert report.patch is not None
    assert report.patch.bytes < report.export.bytes / 4

    again = RootConfig(stages=["apply_patch", "report"], run_dir=str(tmp_path / "patched"))
    again.card.name = "apply_patch"
    again.patch = PatchConfig(report.patch.path, report.patch.base)
    patched = pipeline.run(again)
    assert patched.export is not None
    assert Path(patched.export.path).read_bytes() == Path(report.export.path).read_bytes()
    assert Path(patched.export.path).name == Path(report.export.path).name
    assert patched.export.tensor_types == report.export.tensor_types
    for folder in ("run", "patched"):
        written = json.loads((tmp_path / folder / "report.json").read_text(encoding="utf-8"))
        jsonschema.validate(written, load_schema())
    _check_beside(tmp_path / "run", report.export.path)
    for name in ("README.md", "Modelfile"):
        beside = [tmp_path / folder / name for folder in ("run", "patched")]
        assert beside[0].read_bytes() == beside[1].read_bytes()


def _check_beside(run_dir: Path, gguf: str) -> None:
    """The card tells the figures, the Modelfile how an answer ends; nothing hidden is left."""
    card = (run_dir / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: gguf\n")
    assert "perplexity" in card
    assert Path(gguf).name in (run_dir / "Modelfile").read_text(encoding="utf-8")
    assert 'PARAMETER stop "<|im_end|>"' in (run_dir / "Modelfile").read_text(encoding="utf-8")
    assert {path.name for path in run_dir.glob(".*")} == {".lock"}


@pytest.mark.parametrize("kind", [AdapterKind.lora, AdapterKind.both])
def test_a_patch_of_an_adapter_that_moves_levels_is_refused_at_the_start(
    kind: AdapterKind, tiny_llama_folder: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    cfg = settings(tiny_llama_folder, files, tmp_path)
    cfg.stages, cfg.adapter.kind, cfg.export.patch = STAGES, kind, True
    with pytest.raises(ConfigError, match=f"an adapter of kind {kind.name}.*Use adapter=steps"):
        pipeline.run(cfg)
