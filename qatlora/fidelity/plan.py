"""Who is compared with whom, found out and checked before anything large is read.

Without a named reference a checkpoint that is to be stored as NF4 or Q4_0 is compared with its own
bf16 values; everything else (the base's storages, builds, GGUF files, adapters) with the base's.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from qatlora.adapters.saved import read_identity
from qatlora.base.from_gguf import config_from_gguf, require_fit
from qatlora.base.layout import Layout, find_layout, plain_config
from qatlora.base.load import load_tokenizer, require_storage
from qatlora.base.source import Source, find_source
from qatlora.base.teacher import has_bf16_values
from qatlora.config import BaseConfig, settle_base
from qatlora.data.templates import chosen_template
from qatlora.errors import FidelityError
from qatlora.llamacpp.gguf_read import read_gguf
from qatlora.model_spec import BASE, ModelSpec

_GRID_KIND = {"q4_0_reference": "q4_0"}
_STORED_AS = {"nf4": "NF4", "q4_0": "Q4_0 ours", "q4_0_reference": "Q4_0 reference"}


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face folder, its Q4_0 list, and the storage that is asked for (None: its own)."""

    source: Source
    layout: Layout
    storage: str | None


@dataclass(frozen=True)
class GgufModel:
    """A GGUF file of any tensor types.

    Attributes:
        path: the file.
        config: what it is loaded with here.
        bos: the token that llama.cpp puts in front of a window of it; None for none.
    """

    path: Path
    config: PreTrainedConfig
    bos: int | None = None


@dataclass(frozen=True)
class AdapterRun:
    """A saved adapter and the base it was trained on."""

    folder: Path
    base: Checkpoint


Place = Checkpoint | GgufModel | AdapterRun


@dataclass(frozen=True)
class Compared:
    """A model by the name it has in tables, as it was typed, and where it is.

    `title` says what it is beside its reference, as rows of public model cards do.
    """

    label: str
    text: str
    place: Place
    title: str = ""


@dataclass(frozen=True)
class Comparison:
    """A reference and the models that are compared with it."""

    reference: Compared
    models: list[Compared]


@dataclass(frozen=True)
class Planner:
    """Finds models by their specs.

    Attributes:
        base: the run's base as it is stored.
        base_name: what it is called in titles.
        tokenizer: the base's, whose ids all models are given.
    """

    base: Checkpoint
    base_name: str
    tokenizer: PreTrainedTokenizerBase

    def comparisons(
        self, models: Sequence[ModelSpec], reference: ModelSpec | None
    ) -> list[Comparison]:
        """Find all models and group them by their references, in the order given.

        Raises:
            CheckpointError: a model is missing, broken or of an unsupported kind.
            FidelityError: another vocabulary, or there is no bf16 checkpoint to compare with.
        """
        groups: dict[str, Comparison] = {}
        named = None if reference is None else self._find(reference, reference.label)
        counts = Counter(spec.label for spec in models)
        for spec in models:
            found = self._find(spec, spec.label if counts[spec.label] == 1 else spec.text)
            against = named or self._own_reference(found, spec)
            found = replace(found, title=self._title(found, spec, against))
            groups.setdefault(against.text, Comparison(against, [])).models.append(found)
        return list(groups.values())

    def _find(self, spec: ModelSpec, label: str) -> Compared:
        place = self._place(spec)
        if isinstance(place, Checkpoint):
            if spec.storage is not None:
                require_storage(place.source, _GRID_KIND.get(spec.storage, spec.storage))
            self._require_same_words(place.source)
        return Compared(label, spec.text, place)

    def _title(self, found: Compared, spec: ModelSpec, reference: Compared) -> str:
        if spec.storage not in _STORED_AS:
            return f"{reference.label} → {found.label}"
        origin = self.base_name if spec.kind == BASE else found.label.rpartition("@")[0]
        return f"{origin} → {_STORED_AS[spec.storage]}"

    def _place(self, spec: ModelSpec) -> Place:
        if spec.kind == BASE:
            return Checkpoint(self.base.source, self.base.layout, spec.storage)
        if spec.kind == "gguf":
            return self._gguf(Path(spec.place))
        if spec.kind == "adapter":
            read_identity(Path(spec.place))
            return AdapterRun(Path(spec.place), self.base)
        keys = {"folder": "path", "hub": "hub_id", "embedded": "embedded"}
        settings = BaseConfig(**{keys[spec.kind]: spec.place})
        settle_base(settings)  # an embedded base is unpacked with its template
        source = find_source(settings, chosen_template(settings.chat_template))
        return Checkpoint(source, find_layout(source, settings), spec.storage)

    def _gguf(self, path: Path) -> GgufModel:
        gguf = read_gguf(path)
        config = config_from_gguf(gguf, plain_config(self.base.source.folder))
        require_fit(gguf, config)
        words = {word: number for number, word in enumerate(gguf.require("tokenizer.ggml.tokens"))}
        self._compare_words(words, gguf.tensors["token_embd.weight"].shape[0], path)
        adds_bos = gguf.metadata.get("tokenizer.ggml.add_bos_token", False)
        bos = gguf.metadata.get("tokenizer.ggml.bos_token_id") if adds_bos else None
        return GgufModel(path, config, bos)

    def _own_reference(self, found: Compared, spec: ModelSpec) -> Compared:
        place = found.place
        rounded = isinstance(place, Checkpoint) and spec.kind != BASE and spec.storage is not None
        if rounded and has_bf16_values(place.source):
            own = Checkpoint(place.source, place.layout, "bf16")
            label, text = (f"{name.rpartition('@')[0]}@bf16" for name in (found.label, spec.text))
            return Compared(label, text, own)
        if not has_bf16_values(self.base.source):
            raise FidelityError(
                f"{self.base.source.folder} is a build that does not hold the bf16 values any more "
                f"with which {found.text} would be compared. Give the bf16 checkpoint as base.path "
                "and the build in fidelity.models, or name it in fidelity.reference."
            )
        return Compared("bf16", "bf16", Checkpoint(self.base.source, self.base.layout, "bf16"))

    def _require_same_words(self, source: Source) -> None:
        if source.folder == self.base.source.folder:
            return
        num_rows = _num_rows(source)
        self._compare_words(load_tokenizer(source.folder).get_vocab(), num_rows, source.folder)

    def _compare_words(self, words: Mapping[str, int], num_rows: int, where: Path) -> None:
        """The same id must be the same word, and the logits must be as many."""
        num_own = _num_rows(self.base.source)
        own = _by_id(self.tokenizer.get_vocab(), min(num_own, num_rows))
        others = _by_id(words, min(num_own, num_rows))
        differing = sorted(number for number in own if others.get(number) != own[number])
        if differing or num_rows != num_own:
            example = f"it has {num_rows} rows of logits and not {num_own}"
            if differing:
                first = differing[0]
                example = f"token {first} is {others.get(first)!r} and not {own[first]!r}"
            raise FidelityError(
                f"{where} has another vocabulary than the base {self.base.source.name}: {example}. "
                "Probabilities of different words cannot be compared: give models of one family, "
                "or the base that this one belongs to."
            )


def _num_rows(source: Source) -> int:
    return int(plain_config(source.folder).get_text_config().vocab_size)


def _by_id(words: Mapping[str, int], limit: int) -> dict[int, str]:
    """Words by id; a GGUF stores the space of user-defined tokens plainly."""
    return {number: word.replace("▁", " ") for word, number in words.items() if number < limit}
