"""The stage of recipe=teacher_cache: run a bf16 teacher once over the rows of a run.

The teacher writes and leaves memory; then the base is loaded as training would start from it, and
held-out text shows what a cache of k words keeps of the divergence between the two.
"""

import time
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from pathlib import Path

from torch import nn

from qatlora.base.digests import digest_of_tensors
from qatlora.base.load import load_base, load_plain
from qatlora.base.others import deploy_others
from qatlora.base.teacher import teacher_source
from qatlora.data.rows import IGNORED, Row, first_rows, text_key
from qatlora.distill import (
    CacheKey,
    CacheWriter,
    LmHead,
    TeacherCache,
    TeacherStates,
    divergence_by_top_k,
    top_words,
)
from qatlora.distill.cache import bytes_per_token
from qatlora.errors import ConfigError
from qatlora.evaluate import reference_states
from qatlora.report.results_cache import CachePoint, CacheResult
from qatlora.run_folder import claimed_cache
from qatlora.stages.teacher import course_settings, rows_with_teacher, words_digests
from qatlora.state import Run
from qatlora.train.objective import divergence_of
from qatlora.train.teachers import RunningTeacher
from qatlora.train.trainer import RowCollator, training_record

_MEASURED_TOP_K = (8, 16, 32, 64, 128, 256)
_MEASURED_TOKENS = 1024  # of each held-out text: two products with the head per token


def check_teacher_cache(state: Run) -> None:
    """Refuse what cannot be kept.

    Raises:
        ConfigError: more words than the teacher has besides the rest.
    """
    top_k, vocab_size = state.cfg.teacher.cache_top_k, state.source.vocab_size
    if top_k >= vocab_size:
        raise ConfigError(
            f"teacher.cache_top_k={top_k}: the teacher has {vocab_size} words, and at least one "
            "must be left for the rest. Lower teacher.cache_top_k; 64 is usual."
        )


def teacher_cache(state: Run) -> None:
    """Write what is missing, then measure what was kept.

    Raises:
        CacheError: the folder holds a cache made from something else, or a damaged one.
        RunFolderError: another run writes to the cache.
    """
    cfg, start = state.cfg, time.monotonic()
    folder = Path(cfg.teacher.cache_path or state.run_dir / "teacher_cache")
    rows = {row.key: row for row in rows_with_teacher(state.batches.train, cfg.teacher)}
    with claimed_cache(folder):
        added = _add_missing(state, folder, rows)
    seconds = time.monotonic() - start
    cache = TeacherCache(folder)
    state.cache_result = CacheResult(
        path=str(folder),
        teacher=cache.index.teacher_name,
        top_k=cache.index.key.top_k,
        temperature=cache.index.key.temperature,
        divergence=cfg.teacher.divergence.name,
        rows=len(rows),
        tokens=cache.num_tokens(rows),
        added_rows=len(added),
        added_tokens=cache.num_tokens(added),
        seconds=seconds,
        bytes=sum((folder / name).stat().st_size for name in cache.index.shards),
        held_out_bytes=sum(
            path.stat().st_size for name in ("text-*", "head*") for path in folder.glob(name)
        ),
        points=_measure(state, cache),
    )


def _add_missing(state: Run, folder: Path, rows: dict[bytes, Row]) -> list[bytes]:
    """Run the teacher over rows and texts that the cache lacks; returns the keys added."""
    cfg, texts = state.cfg, state.evaluation.texts
    source = teacher_source(state.source, cfg.teacher.path)
    key = CacheKey(
        teacher=digest_of_tensors(source),
        is_base=source is state.source,
        vocab_size=source.vocab_size,
        temperature=cfg.teacher.temperature,
        top_k=cfg.teacher.cache_top_k,
        **words_digests(state.tokenizer),
    )
    writer = CacheWriter(folder, key, source.name, course_settings(cfg))
    cache = TeacherCache(folder)
    missing = cache.missing(rows)
    new_texts = [text for text in texts if text_key(text.rows) not in cache.index.texts]
    if not missing and not new_texts:
        return []
    model = load_plain(source.folder, state.device, state.dtype)
    settings = state.evaluation.settings
    total = sum(row.num_scored_tokens for text in new_texts for row in text.rows)
    total += sum(rows[key].num_scored_tokens for key in missing)
    with state.bar("run teacher", total, "tokens") as advance:
        writer.add_head(LmHead.of(model))
        for text in new_texts:
            kept = reference_states(model, text.rows, settings, advance)
            writer.add_text(text_key(text.rows), kept.hidden.bfloat16(), kept.targets)
        _write_rows(state, model, [rows[key] for key in missing], writer, advance)
    return missing


def _write_rows(
    state: Run,
    model: nn.Module,
    rows: Sequence[Row],
    writer: CacheWriter,
    on_tokens: Callable[[int], None],
) -> None:
    """Run the teacher on micro-batches as the trainer would make them."""
    collate, run = RowCollator(pad_token_id=0), RunningTeacher(model)
    for first in range(0, len(rows), state.cfg.train.micro_batch_rows):
        group = rows[first : first + state.cfg.train.micro_batch_rows]
        batch = collate([training_record(row) for row in group])
        batch = {name: tensor.to(state.device) for name, tensor in batch.items()}
        scored = (batch["labels"][:, 1:] != IGNORED).flatten()
        with state.autocast():
            states = run(batch, scored)
        found = top_words(
            states.hidden[scored], states.head, writer.key.top_k, writer.key.temperature
        )
        ends = list(accumulate(row.num_scored_tokens for row in group))
        parts = [found.part(slice(*span)) for span in pairwise([0, *ends])]
        writer.add(dict(zip((row.key for row in group), parts, strict=True)))
        on_tokens(ends[-1])
    writer.flush()


def _measure(state: Run, cache: TeacherCache) -> list[CachePoint]:
    """What the words kept are worth to the base that training would start from."""
    cfg, key = state.cfg, cache.index.key
    state.base = load_base(state.source, state.layout, cfg.storage, state.device, state.tokenizer)
    deploy_others(state.base.model, state.base.grid, cfg.export.other_type.name)
    head = cache.head(state.device)
    top_ks = sorted(k for k in {*_MEASURED_TOP_K, key.top_k} if k < key.vocab_size)
    points = []
    for text in state.evaluation.texts:
        rows = first_rows(text.rows, _MEASURED_TOKENS)
        student = reference_states(state.base.model, rows, state.evaluation.settings)
        hidden, _ = cache.text(text_key(text.rows))
        num_tokens = len(student.targets)
        full, kept = divergence_by_top_k(
            TeacherStates(student.hidden, student.head),
            TeacherStates(hidden[:num_tokens], head),
            top_ks,
            divergence_of(cfg.teacher),
        )
        points += [
            CachePoint(
                text=text.name,
                top_k=each.top_k,
                full=full / num_tokens,
                kept=each.kept / num_tokens,
                rest_mass=each.rest_mass / num_tokens,
                bytes_per_million_tokens=1_000_000 * bytes_per_token(each.top_k, key.vocab_size),
            )
            for each in kept
        ]
    return points
