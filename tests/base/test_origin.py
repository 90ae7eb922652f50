"""What a base's own folder says of its licence and maker."""

from pathlib import Path

import pytest

from qatlora.base.origin import origin_of, write_card
from qatlora.llamacpp.gguf_read import GgufFile
from qatlora.report.results_origin import OriginResult

NOTHING = OriginResult()


def test_the_card_of_the_folder_is_read(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(
        "---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\nauthor: Meta\n---\n"
    )
    found = origin_of(tmp_path, "meta/llama")
    assert found == OriginResult("meta/llama", "other", "llama3", "LICENSE", "Meta")


def test_of_several_licences_all_are_named(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: [mit, apache-2.0]\n---\n")
    assert origin_of(tmp_path, None).licence == "mit, apache-2.0"


@pytest.mark.parametrize(
    "card",
    [
        None,
        "",
        "# A model under the MIT licence",
        "---\nlicense: mit",
        "---\n[\n---\n",
        "---\n- license\n---\n",
        "---\nlicense: {}\n---\n",
        "---\nlicense: !!python/object/apply:os.getcwd []\n---\n",
    ],
)
def test_what_is_no_metadata_says_nothing(card: str | None, tmp_path: Path) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert origin_of(tmp_path, None) == NOTHING


def test_the_metadata_of_a_gguf_become_the_card_of_its_folder(tmp_path: Path) -> None:
    metadata = {"general.license": "apache-2.0", "general.organization": "A: B", "general.name": 1}
    write_card(GgufFile(Path("x.gguf"), metadata, {}), tmp_path)
    assert origin_of(tmp_path, None) == OriginResult(licence="apache-2.0", author="A: B")


def test_a_gguf_without_such_metadata_leaves_no_card(tmp_path: Path) -> None:
    write_card(GgufFile(Path("x.gguf"), {}, {}), tmp_path)
    assert not list(tmp_path.iterdir())
