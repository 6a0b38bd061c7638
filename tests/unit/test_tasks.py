"""What the example workflows stand on: the data file, and the stand-ins of the outside world."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path

import pytest

from tasks import imports, services


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "journal.tsv"
    monkeypatch.setenv("SHOP_JOURNAL", str(path))
    return path


def test_the_data_is_the_file_that_its_readme_names() -> None:
    readme = (imports.AIRPORTS_CSV.parent / "README.md").read_text(encoding="utf-8")
    assert hashlib.sha256(imports.AIRPORTS_CSV.read_bytes()).hexdigest() in readme


def test_batches_together_are_the_file() -> None:
    with imports.AIRPORTS_CSV.open(encoding="utf-8", newline="") as file:
        codes = [row["iata"] for row in csv.DictReader(file)]
    batches = [imports.read_batch(str(imports.AIRPORTS_CSV), batch, 200) for batch in range(18)]
    assert [row["iata"] for batch in batches for row in batch] == codes
    assert [len(batch) for batch in batches] == [200] * 16 + [176, 0]


def test_a_card_is_charged_once_for_each_key(journal: Path) -> None:
    with pytest.raises(services.CardNetworkBusy):
        services.charge("o-1", 100, idempotency_key="k")
    first = services.charge("o-1", 100, idempotency_key="k")
    assert services.charge("o-1", 100, idempotency_key="k") == first
    assert journal.read_text(encoding="utf-8").splitlines() == [
        "charge\to-1",
        "charge\to-1",
        "money taken\tk",
        "charge\to-1",
    ]


def test_without_a_journal_the_card_network_is_never_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHOP_JOURNAL", raising=False)
    assert services.charge("o-1", 12_840, idempotency_key="k").endswith("over 128.40")
