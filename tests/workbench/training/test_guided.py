"""GIST losses: the guide is the model before training and stays as it is; models without a usable guide are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

from negative_cache.workbench.compare.comparison import Comparison
from negative_cache.workbench.data import RetrievalData
from negative_cache.workbench.models import load_model
from negative_cache.workbench.training.config import GUIDED, RunConfig, RunError
from negative_cache.workbench.training.driver import run
from negative_cache.workbench.training.losses import make_loss

CORPUS = {f"d{number}": f"document {number} says {number * number}" for number in range(8)}
QUERIES = {f"q{number}": f"what says {number}" for number in range(8)}
QRELS = {f"q{number}": [f"d{number}"] for number in range(8)}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("guided") / "model")
    load_model("tiny", [*CORPUS.values(), *QUERIES.values()], 0).save_pretrained(folder)
    return folder


def configuration(model: str, loss: str, **options: object) -> RunConfig:
    return RunConfig(data="d", model=model, loss=loss, output="o", batch_size=8, **options)  # type: ignore[arg-type]


def expected(config: RunConfig, model: SentenceTransformer, guide: SentenceTransformer) -> float:
    """The loss of the whole data, computed with loops: each anchor against all texts that the guide does not hide."""
    texts = [*QUERIES.values()], [*CORPUS.values()]
    own, guides = (
        [m.encode(t, convert_to_tensor=True, normalize_embeddings=True) for t in texts] for m in (model, guide)
    )
    total = 0.0
    for row in range(8):
        limit = guides[0][row] @ guides[1][row]
        if config.relative_margin is not None:
            limit = limit - abs(limit) * config.relative_margin
        pairs = [(0, row, 1), (0, row, 0), (1, row, 1)]  # anchor-document, anchor-anchor, document-document
        scores = [own[0][row] @ own[1][row]]
        for left, at, right in pairs:
            for other in range(8):
                is_own = (left, right) == (0, 1) and other == row
                if not is_own and guides[left][at] @ guides[right][other] <= limit:
                    scores.append(own[left][at] @ own[right][other])
        total -= float((config.scale * torch.stack(scores)).log_softmax(0)[0]) / 8
    return total


@pytest.mark.parametrize("loss", GUIDED)
@pytest.mark.parametrize("options", [{}, {"relative_margin": 0.05}])
def test_negatives_that_the_guide_ranks_above_the_positive_are_hidden(loss: str, options: dict, path: str):
    model, guide = SentenceTransformer(path), SentenceTransformer(path)
    config = configuration(path, loss, **options)
    made = make_loss(config, model)
    with torch.no_grad():
        for parameter in model.parameters():  # the model changes in training, its guide does not
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    model.eval()
    columns = [model.preprocess(list(texts.values())) for texts in (QUERIES, CORPUS)]
    with torch.no_grad():
        found = float(made(columns, torch.zeros(8)))
    assert found == pytest.approx(expected(config, model, guide), rel=1e-4)
    assert found != pytest.approx(expected(config, model, model), rel=1e-3)
    assert not any(parameter.requires_grad for parameter in made.guide.parameters())
    assert not made.guide.training


def test_the_guide_that_is_named_is_used(path: str, tmp_path: Path):
    other = load_model("tiny", [*CORPUS.values(), *QUERIES.values()], 3)
    other.save_pretrained(str(tmp_path / "guide"))
    made = make_loss(configuration(path, "gist", guide=str(tmp_path / "guide")), SentenceTransformer(path))
    assert made.guide.encode("a text") == pytest.approx(other.encode("a text"), abs=1e-6)


def test_a_model_with_random_weights_is_no_guide(path: str, tmp_path: Path):
    data = RetrievalData("set", CORPUS, QUERIES, {"train": QRELS})
    with pytest.raises(RunError, match="--loss gist needs a trained model as its guide, and tiny starts with random"):
        run(configuration("tiny", "gist"), data)
    with pytest.raises(RunError, match="Name one with --guide"):
        Comparison("d", "tiny", ("in-batch", "cached-gist"), "out")
    named = Comparison("d", "tiny", (f"gist:guide={path}",), str(tmp_path))
    assert named.run_config(named.losses[0], 0.1, 0).guide == path
    assert Path(named.run_config(named.losses[0], 0.1, 0).output).parent == tmp_path / "runs"


def test_static_models_are_refused(path: str):
    static = SentenceTransformer(
        modules=[StaticEmbedding(SentenceTransformer(path).tokenizer._tokenizer, embedding_dim=8)]
    )
    with pytest.raises(RunError, match="and folder is a static model"):
        make_loss(configuration("folder", "gist"), static)
    for name in ("static", f"static:{path}"):
        with pytest.raises(RunError, match=f"and {name} is a static model"):
            Comparison("d", name, (f"gist:guide={Path(path).name}",), "out")


def test_the_batch_of_cached_gist_is_multiplied_in_a_comparison(path: str):
    comparison = Comparison("d", path, ("gist", "cached-gist"), "out")
    assert comparison.config("cached-gist").batch_size == 16 * comparison.config("gist").batch_size
