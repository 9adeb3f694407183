"""Labels of rows: relevance, grades, and what is neither."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from negative_cache.workbench.data import DataError, DataOptions, RetrievalData, load_data


def loaded(folder: Path, rows: list[dict[str, Any]], **options: Any) -> RetrievalData:
    """The data of a folder "a" with a training split."""
    path = folder / "a" / "train.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_data(str(path.parent), DataOptions(**options))


def rows_of(name: str, *labels: Any) -> list[dict[str, Any]]:
    return [{"query": f"query {n}", "document": f"text {n}", name: label} for n, label in enumerate(labels)]


def graded(data: RetrievalData, split: str = "train") -> dict[str, float]:
    """Text of a document -> its grade for any query."""
    return {data.corpus[key]: grade for grades in data.graded(split).values() for key, grade in grades.items()}


@pytest.mark.parametrize("values", [(1, 0), (True, False), (1.0, 0.0), ("1", "0"), ("1.0", "0.0")])
@pytest.mark.parametrize("name", ["label", "score", "is_duplicate", "Relevant"])
def test_binary_labels_divide_pairs_into_relevant_documents_and_negatives(tmp_path: Path, values: Any, name: str):
    rows = [
        {"query": "q", "document": "c", name: values[1]},
        {"query": "q", "document": "a", name: values[0]},
        {"query": "r", "document": "a", name: values[1]},
        {"query": "q", "document": "b", name: None},
    ]
    data = loaded(tmp_path, rows)
    assert data.form == "labelled pairs"
    (query,) = data.judged("train")
    assert data.queries[query] == "q"
    assert graded(data) == {"a": 1.0}
    assert [data.corpus[key] for key in data.negatives[query]] == ["c"]
    assert f"a: {name!r} is 1 for a relevant document and 0 for a negative." in data.notes
    assert data.skipped == {"rows without a label": 1, "queries without a relevant document": 1}
    assert data.grades == {}


@pytest.mark.parametrize(
    ("name", "options"), [("relevance", {}), ("Grade", {}), ("label", {"label_column": "label"}), ("stars", None)]
)
def test_grades_above_0_are_relevant_and_kept(tmp_path: Path, name: str, options: dict[str, str] | None):
    rows = rows_of(name, 3, 0, 1, "0.5")
    rows.append({"query": "query 1", "document": "text 0", name: 1})
    data = loaded(tmp_path, rows, **({"label_column": name} if options is None else options))
    found = {
        (data.queries[query], data.corpus[key]): grade
        for query, grades in data.graded("train").items()
        for key, grade in grades.items()
    }
    assert found == {
        ("query 0", "text 0"): 3.0, ("query 1", "text 0"): 1.0, ("query 2", "text 2"): 1.0, ("query 3", "text 3"): 0.5,
    }  # fmt: skip
    assert [data.corpus[key] for keys in data.negatives.values() for key in keys] == ["text 1"]
    assert f"a: {name!r} is 0 for a negative, and a grade above 0 for a relevant document." in data.notes


def test_grades_of_a_split_of_its_own_are_kept(tmp_path: Path):
    (tmp_path / "dev.csv").write_text("query,document,relevance\nquery 0,text 0,2\nquery 0,new,1\nquery 0,other,0\n")
    data = loaded(tmp_path, rows_of("relevance", 3, 1), dev=str(tmp_path / "dev.csv"))
    assert graded(data, "dev") == {"text 0": 2.0, "new": 1.0}
    assert graded(data) == {"text 0": 3.0, "text 1": 1.0}


def test_grades_of_a_file_that_is_split_are_in_the_split_of_their_query(tmp_path: Path):
    rows = [{"query": f"query {n}", "document": f"text {n}", "relevance": n % 3} for n in range(300)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    data = load_data(str(tmp_path / "a.json"))
    assert all(data.qrels.values())
    assert graded(data, "all") == {f"text {n}": float(n % 3) for n in range(300) if n % 3}
    for split, grades in data.grades.items():
        assert set(grades) == {query for query in data.qrels[split] if int(data.queries[query].split()[1]) % 3 == 2}


def test_the_highest_of_several_grades_is_kept(tmp_path: Path):
    rows = [{"query": "q", "document": "a", "relevance": grade} for grade in (1, 0.5, 2, 1)]
    data = loaded(tmp_path, rows)
    assert graded(data) == {"a": 2.0}
    assert data.skipped == {"judgements of a document that has a higher grade in another row": 3}


def test_grades_without_0_are_warned_of(tmp_path: Path):
    data = loaded(tmp_path, rows_of("rating", 5, 2))
    (warning,) = (note for note in data.notes if note.startswith("Warning: "))
    assert "no 'rating' of the first 2 rows is 0" in warning
    assert "such as one with 5" in warning


def test_scores_are_not_used_with_a_warning(tmp_path: Path):
    data = loaded(tmp_path, rows_of("score", 0.3, 1))
    assert data.form == "pairs"
    assert graded(data) == {"text 0": 1.0, "text 1": 1.0}
    (warning,) = (note for note in data.notes if note.startswith("Warning: "))
    assert f"'score' has values other than 0 and 1, such as 0.3 ({tmp_path / 'a/train.jsonl'}, line 1)" in warning
    assert "every row counts as relevant" in warning


@pytest.mark.parametrize(
    ("name", "labels", "options", "message"),
    [
        ("label", (0, 1, 2), {}, "line 3: 'label' is 2; expected 1 for a relevant document, or 0 .*--label-column lab"),
        ("gold_label", ("entailment",), {}, "line 1: 'gold_label' is 'entailment'; expected 1 .* keep the rows"),
        ("is_relevant", ("yes", "no"), {}, "line 1: 'is_relevant' is 'yes'"),
        ("label", (1, -1), {}, "line 2: 'label' is -1"),
        ("score", (0.5, "high"), {}, "line 2: 'score' is 'high'"),
        ("relevance", (1, "high"), {}, "line 2: 'relevance' is 'high'; expected a grade: 0 for a negative"),
        ("relevance", (1, -1), {}, "line 2: 'relevance' is -1; expected a grade"),
        ("relevance", (1, "nan"), {}, "line 2: 'relevance' is 'nan'; expected a grade"),
        ("kind", ("a",), {"label_column": "kind"}, "line 1: 'kind' is 'a'; expected a grade"),
        ("kind", (1,), {"label_column": "Kind"}, "no column 'Kind'.* Did you mean --label-column kind"),
        (
            "label",
            [n % 2 for n in range(1400)] + [2],
            {},
            "line 1401: 'label' is 2, but the first 1,000 rows have only",
        ),
        ("grade", [n % 3 for n in range(1400)] + ["x"], {}, "line 1401: 'grade' is 'x'; expected a grade"),
    ],
)
def test_what_is_neither_relevance_nor_a_grade_is_refused(
    tmp_path: Path, name: str, labels: tuple[Any, ...], options: dict[str, str], message: str
):
    with pytest.raises(DataError, match=message):
        loaded(tmp_path, rows_of(name, *labels), **options)


def test_a_label_column_of_rows_with_negatives_is_refused(tmp_path: Path):
    rows = [{"query": "q", "positive": "a", "negative": "c", "label": 1}]
    with pytest.raises(DataError, match="line 1: --label-column is for rows of a query and a document"):
        loaded(tmp_path, rows, label_column="label")
    assert graded(loaded(tmp_path, rows)) == {"a": 1.0}
