"""What is refused, and that the page of models says what the tables say."""

from pathlib import Path

import pytest

from zoo import document
from zoo.kinds import KINDS
from zoo.refusals import REFUSALS, Refusal

PAGE = Path(__file__).parent.parent / "docs" / "models.md"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return KINDS[0].save(1, tmp_path_factory.mktemp("good") / "model")


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.what)
def test_it_is_refused_with_a_reason(refusal: Refusal, good: Path, tmp_path: Path) -> None:
    code, message = refusal.message(good, tmp_path)
    assert code == refusal.code
    assert str(tmp_path) not in message and len(message.split()) > 5


def test_there_is_a_row_for_each_kind_that_must_be_there() -> None:
    assert len({kind.name for kind in KINDS}) == len(KINDS) >= 12


def test_the_page_is_what_the_tables_say() -> None:
    assert PAGE.read_text() == document.page(), "run `make docs-models`"
