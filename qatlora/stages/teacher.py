"""The teacher of a run: where it comes from, what must fit, and what is kept of it.

    bf16     a checkpoint in memory while the student trains: the base's own, or another one
    self     the loaded base with adapters and grid off: no second model
    cache    its likeliest words on disk (recipe=teacher_cache): not in memory at all
    none

Held-out text is scored against the teacher's final hidden states and head, which are kept in all
three cases, so that a KLD in the report is always that of the full distributions.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from qatlora.adapters.attach import AdaptedModel
from qatlora.base.digests import digest_of_tensors
from qatlora.base.load import load_plain
from qatlora.base.teacher import require_own_values, require_same_words, teacher_source
from qatlora.config import RootConfig, TeacherConfig, TeacherKind
from qatlora.data.rows import Row, text_key
from qatlora.data.templates import renders_alike, training_template
from qatlora.distill import CacheKey, TeacherCache
from qatlora.distill.cache_index import read_index, require_same
from qatlora.errors import CacheError, ConfigError
from qatlora.evaluate import ReferenceStates
from qatlora.report.json_report import plain
from qatlora.state import Run
from qatlora.train.teachers import BatchTeacher, CachedTeacher, RunningTeacher


def check_teacher(state: Run) -> None:
    """Refuse a teacher that does not fit the base, before any weight is loaded.

    Raises:
        ConfigError: it holds no bf16 values, or has other words or another chat template.
        CacheError: the cache was made from something else.
    """
    settings = state.cfg.teacher
    if settings.kind is TeacherKind.cache:
        folder = Path(settings.path)
        found = read_index(folder).key
        require_same(folder, found, _key_of_this_run(state, found))
    if settings.kind is not TeacherKind.bf16:
        return
    source = teacher_source(state.source, settings.path)
    if source is state.source:
        return
    tokenizer = require_same_words(source, state.source, state.tokenizer)
    its_template, template = tokenizer.chat_template, state.tokenizer.chat_template
    if settings.kl_weight > 0 and its_template and template:
        _require_same_chats(state.tokenizer, tokenizer.get_chat_template(), str(source.folder))


def _require_same_chats(
    tokenizer: PreTrainedTokenizerBase, its_template: str, teacher: str
) -> None:
    if not renders_alike(tokenizer, tokenizer.get_chat_template(), its_template):
        raise ConfigError(
            f"The teacher in {teacher} renders conversations by another chat template than the "
            "base, so on chats its probabilities would answer a prompt that it was not made for. "
            "Take a teacher of the same family, give its template as base.chat_template=FILE, or "
            "set teacher.kl_weight=0 (the teacher on general text alone)."
        )


def open_cache(state: Run) -> None:
    """Find every row and held-out text of the run in the cache, for teacher=cache.

    Raises:
        CacheError: some are missing; the message says which settings differ.
    """
    cfg = state.cfg
    if cfg.teacher.kind is not TeacherKind.cache:
        return
    cache = TeacherCache(Path(cfg.teacher.path))
    rows = rows_with_teacher(state.batches.train, cfg.teacher) if "train" in cfg.stages else []
    missing = cache.missing(row.key for row in rows)
    texts = [t.name for t in state.batches.texts if text_key(t.rows) not in cache.index.texts]
    if missing or texts:
        lacking = [f"{len(missing)} of the {len(rows)} rows to train"] if missing else []
        lacking += [f"the held-out text {name!r}" for name in texts]
        raise CacheError(
            f"The teacher cache in {cache.folder} lacks {' and '.join(lacking)}. "
            f"{_why_lacking(cache.index.made_for, course_settings(cfg))} Add what is missing: run "
            "recipe=teacher_cache with the settings of this run and "
            f"teacher.cache_path={cache.folder}."
        )
    state.cache = cache


def _why_lacking(made_for: dict[str, Any], here: dict[str, Any]) -> str:
    differing = [
        f"{key}={made_for.get(key)!r} there, {value!r} here"
        for key, value in here.items()
        if made_for.get(key) != value
    ]
    if differing:
        return f"It was last written for other settings: {'; '.join(differing)}."
    return "Its writing was cut off, or the data have changed."


def load_teacher(state: Run) -> None:
    """Load the model of teacher=bf16; of teacher=self check the base that was just loaded."""
    settings = state.cfg.teacher
    if settings.kind is TeacherKind.bf16:
        folder = teacher_source(state.source, settings.path).folder
        state.teacher = load_plain(folder, state.device, state.dtype)
    if settings.kind is TeacherKind.self:
        require_own_values(state.base)


def keep_teacher_states(state: Run) -> None:
    """Keep the teacher's final hidden states of the held-out texts, to score models by."""
    evaluation = state.evaluation
    if state.cache is not None:
        head = state.cache.head(state.device)
        for text in evaluation.texts:
            hidden, targets = state.cache.text(text_key(text.rows))
            hidden = hidden.to(evaluation.settings.compute_dtype)
            evaluation.teacher[text.name] = ReferenceStates(hidden, targets, head)
        return
    with _running(state) as model:
        if model is not None:
            with state.bar("evaluate teacher", evaluation.num_tokens, "tokens") as advance:
                evaluation.teacher = evaluation.states_of(model, advance)


@contextlib.contextmanager
def _running(state: Run) -> Iterator[Any]:
    """The teacher as a model, None where it is none."""
    if state.cfg.teacher.kind is TeacherKind.self:
        assert isinstance(state.adapted, AdaptedModel)
        with state.adapted.as_checkpoint():
            yield state.adapted.model
    else:
        yield state.teacher


def batch_teacher(state: Run) -> BatchTeacher | None:
    """What the trainer asks for a micro-batch's probabilities."""
    if state.cache is not None:
        return CachedTeacher(state.cache)
    if state.cfg.teacher.kind is TeacherKind.self:
        assert isinstance(state.adapted, AdaptedModel)
        return RunningTeacher(state.adapted.model, state.adapted.as_checkpoint)
    return None if state.teacher is None else RunningTeacher(state.teacher)


def rows_with_teacher(rows: Sequence[Row], settings: TeacherConfig) -> list[Row]:
    """The rows whose loss asks for the teacher."""
    weights = {"chat": settings.kl_weight, "general": settings.general_kl_weight}
    return [row for row in rows if weights[row.source] > 0 and row.num_scored_tokens]


def course_settings(cfg: RootConfig) -> dict[str, Any]:
    """The settings that decide which rows a run draws and which texts it holds out."""
    data = {f"data.{key}": value for key, value in dataclasses.asdict(cfg.data).items()}
    del data["data.num_prompts"]
    steps = {"train.max_steps": cfg.train.max_steps, "train.rows_per_step": cfg.train.rows_per_step}
    return plain({"base": cfg.base.name, "seed": cfg.seed} | steps | data)


def words_digests(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Digests of the vocabulary and of the chat template in force."""
    words = json.dumps(sorted(tokenizer.get_vocab().items()))
    parts = {"tokenizer": words, "template": training_template(tokenizer)}
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in parts.items()}


def _key_of_this_run(state: Run, found: CacheKey) -> CacheKey:
    """The key that a cache for this run would have, made as `found` was."""
    source, teacher = state.source, found.teacher
    # A public NF4 build does not know its source: there the words alone can be compared.
    if found.is_base and not (source.nf4_modules and source.record is None):
        teacher = digest_of_tensors(source)
    return dataclasses.replace(
        found,
        teacher=teacher,
        vocab_size=source.vocab_size,
        temperature=state.cfg.teacher.temperature,
        **words_digests(state.tokenizer),
    )
