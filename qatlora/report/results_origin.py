"""Where a base comes from and under which terms."""

from dataclasses import dataclass


@dataclass(frozen=True)
class OriginResult:
    """What the card in the base's own folder says; None where it says nothing.

    Attributes:
        hub_id: id on the Hugging Face hub, where the base was fetched from there.
        licence: identifier of the hub, such as apache-2.0, gemma or other.
        licence_name: what `other` stands for.
        licence_link: where its text is.
        author: who made the base.
    """

    hub_id: str | None = None
    licence: str | None = None
    licence_name: str | None = None
    licence_link: str | None = None
    author: str | None = None
