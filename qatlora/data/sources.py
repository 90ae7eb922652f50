"""From the settings to the conversations: which sets, how they are laid out, with which weights."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from qatlora import progress, registry
from qatlora.config import DataConfig, DataKind
from qatlora.data.chats import Chats, open_chats
from qatlora.data.chitchat import open_chitchat
from qatlora.data.messages import Conversation
from qatlora.data.records import Records, open_hub, open_records
from qatlora.data.templates import TurnRules
from qatlora.errors import ConfigError


@dataclass(frozen=True)
class ChatMixture:
    """Several sets as one (see `Chats`), one after the other; mostly there is one.

    What is held out is chosen over all of them, so that a copy in another set is no leak.

    Attributes:
        parts: the sets.
        weights: by which training rows come from each.
    """

    parts: Sequence[Chats]
    weights: Sequence[float]

    @property
    def name(self) -> str:
        """The names of all sets."""
        return " + ".join(part.name for part in self.parts)

    @property
    def licence(self) -> str:
        """The different licences of the sets."""
        return ", ".join(dict.fromkeys(part.licence for part in self.parts))

    @property
    def format(self) -> str:
        """The different formats of the sets."""
        return ", ".join(dict.fromkeys(part.format for part in self.parts))

    @cached_property
    def digests(self) -> list[int]:
        """Those of all conversations."""
        return [digest for part in self.parts for digest in part.digests]

    @property
    def dropped(self) -> dict[str, int]:
        """Reasons of all sets."""
        return dict(sum((Counter(part.dropped) for part in self.parts), Counter()))

    def __len__(self) -> int:
        """Number of conversations."""
        return sum(map(len, self.parts))

    def __getitem__(self, index: int) -> Conversation:
        """Conversation `index` of all."""
        for part in self.parts:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError(index)

    def by_part(self, indices: Sequence[int]) -> list[list[int]]:
        """`indices` parted by the set that they belong to, in their order."""
        groups, first = [], 0
        for part in self.parts:
            following = first + len(part)
            groups.append([index for index in indices if first <= index < following])
            first = following
        return groups


def open_conversations(settings: DataConfig, rules: TurnRules) -> ChatMixture:
    """Open and check the sets that the settings name, and say what was found.

    Raises:
        DataError: a file or a record will not do.
        ConfigError: the settings contradict each other or the chat template.
    """
    if settings.system_prompt is not None and not rules.system:
        raise ConfigError(
            "data.system_prompt is set, but the base's chat template cannot render a system "
            "message. Leave it out, or put its text at the head of the first user messages."
        )
    if settings.kind is DataKind.chitchat:
        return ChatMixture([open_chitchat(registry.locate("chitchat-dataset"))], [1.0])
    parts = []
    for records in _own_records(settings):
        part = open_chats(records, rules, settings.format)
        progress.say(f"{part.name}: {len(part):,} conversations, format {part.format}")
        parts.append(part)
    return ChatMixture(parts, settings.weights or [float(len(part)) for part in parts])


def _own_records(settings: DataConfig) -> list[Records]:
    if settings.kind is DataKind.hub:
        if settings.hub_id is None:
            raise ConfigError("data=hub without data.hub_id: give data.hub_id=OWNER/NAME.")
        return [open_hub(settings.hub_id, settings.hub_split)]
    paths = settings.paths or [settings.path]
    if paths == [None]:
        raise ConfigError(
            f"data={settings.kind.name} without data.path: give data.path=FILE, or several files "
            "as data.paths=[FILE,FILE]."
        )
    return [open_records(Path(str(path)).expanduser(), settings.kind) for path in paths]
