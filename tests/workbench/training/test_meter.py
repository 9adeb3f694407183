"""What training costs: which documents are counted."""

from __future__ import annotations

import pytest
import torch
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from torch import nn

from negative_cache.workbench.training.meter import Meter


class Model(nn.Module):
    def forward(self, features: dict) -> None:
        pass


class Loss(nn.Module):
    """Encodes every column, as often as gradient caching or any other loss does."""

    def __init__(self, model: nn.Module, passes: int) -> None:
        nn.Module.__init__(self)
        self.model = model
        self.passes = passes

    def forward(self, columns: list[dict], labels: None) -> None:
        for column in columns * self.passes:
            self.model(column)


class GradientCaching(Loss, CachedMultipleNegativesRankingLoss):
    """Known by its class as a loss that encodes everything twice."""


@pytest.mark.parametrize(("kind", "passes"), [(Loss, 1), (GradientCaching, 2)])
def test_documents_count_every_time_they_are_encoded_while_the_meter_runs(kind: type[Loss], passes: int):
    model = Model()
    loss = kind(model, passes)
    meter = Meter(model, loss)
    columns = [{"input_ids": torch.zeros(4, 3)}, {"input_ids": torch.zeros(4, 3)}]
    loss(columns, None)
    assert meter.documents == 0
    meter.start()
    loss(columns, None)
    with meter.paused():
        model(columns[0])
    model(columns[0])  # cached documents that are re-encoded
    meter.stop()
    loss(columns, None)
    assert meter.documents == passes * 4 + 4
    meter.add(5.0, 7)  # a cost that was measured elsewhere
    assert meter.documents == passes * 4 + 4 + 7
    assert 5 < meter.seconds < 6


def test_a_restored_meter_continues():
    model = Model()
    loss = Loss(model, 1)
    meter = Meter(model, loss)
    meter.load_state({"seconds": 10.0, "inputs": 8, "queries": 4})
    meter.start()
    loss([{"offsets": torch.zeros(2)}, {"offsets": torch.zeros(2), "input_ids": torch.zeros(9)}], None)
    assert meter.documents == 4 + 2
    assert 10 < meter.seconds < 11
    assert meter.state()["inputs"] == 12
