"""The bf16 teacher of a base: its own checkpoint, another one of the same words, or the base."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qatlora.base.grids import ON_GRID_SHARE
from qatlora.base.load import LoadedBase, load_tokenizer
from qatlora.base.source import Source, read_source
from qatlora.errors import ConfigError


def teacher_source(base: Source, path: str | None) -> Source:
    """The checkpoint in `path`, or the base's own where that still holds bf16 values.

    Raises:
        ConfigError: it holds none.
        CheckpointError: it is broken or of an unsupported kind.
    """
    source = base if path is None else read_source(Path(path), Path(path).name)
    require_bf16_values(source)
    return source


def has_bf16_values(source: Source) -> bool:
    """Whether the folder still holds, or decodes to, the bf16 values of its checkpoint."""
    record = source.record
    rounded = record is not None and record.on_grid_share < ON_GRID_SHARE
    return not source.nf4_modules and not (source.packed_modules and rounded)


def require_bf16_values(source: Source) -> None:
    """A packed build of weights on a grid decodes to its source's; any other build does not.

    Raises:
        ConfigError: the source has no bf16 values (any more).
    """
    if source.nf4_modules:
        raise ConfigError(
            f"{source.folder} is an NF4 build, so it holds no bf16 teacher. Give "
            "teacher.path=FOLDER of the bf16 checkpoint, or train without one (teacher=none)."
        )
    record = source.record
    if record is not None and not has_bf16_values(source):
        raise ConfigError(
            f"{source.folder} is a packed Q4_0 build, and of its source's weights only "
            f"{record.on_grid_share:.2%} lay on a grid: their bf16 values are gone, and the base "
            "would be its own teacher. Give teacher.path=FOLDER of the bf16 checkpoint, or train "
            "without one (teacher=none)."
        )


def require_same_words(
    teacher: Source, base: Source, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedTokenizerBase:
    """Check, without loading a model, that teacher and base give probabilities of the same words.

    Args:
        teacher: another checkpoint than the base.
        base: the base.
        tokenizer: the base's.

    Returns:
        The teacher's tokenizer.

    Raises:
        ConfigError: the vocabularies differ.
        CheckpointError: the teacher has no tokenizer.
    """
    its_tokenizer = load_tokenizer(teacher.folder)
    its_words, words = its_tokenizer.get_vocab(), tokenizer.get_vocab()
    if its_words != words:
        differing = sorted(word for word, _ in its_words.items() ^ words.items())
        raise ConfigError(
            f"The teacher in {teacher.folder} has another vocabulary than the base "
            f"({len(its_words)} and {len(words)} words, the first that differs is "
            f"{differing[0]!r}), and probabilities of different tokens cannot be compared. Take a "
            "teacher of the same family."
        )
    if teacher.vocab_size != base.vocab_size:
        raise ConfigError(
            f"The teacher in {teacher.folder} has the words of the base, but {teacher.vocab_size} "
            f"rows in its output layer where the base has {base.vocab_size}: the vocabularies are "
            "padded differently. Take a teacher of the same family and size of vocabulary."
        )
    return its_tokenizer


def require_own_values(base: LoadedBase) -> None:
    """Check that a loaded base can be its own teacher (teacher=self).

    Raises:
        ConfigError: it is packed Q4_0 and its checkpoint lies on no grid.
    """
    if base.storage == "q4_0" and not base.on_grid:
        raise ConfigError(
            f"teacher=self with storage=q4_0, and only {base.on_grid_share:.2%} of the blocks of "
            f"{base.name} lie on a grid: packing has rounded the others, so the base in memory is "
            "no bf16 teacher. Use storage=bf16, or teacher=bf16 or cache."
        )
