"""The training images that a protocol's `train_limit` leaves out, as the judge of what tests must not choose.

No run sees them. Fashion-MNIST leaves 44,000: one standard error is 0.15 points, and less between two networks.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from prunus.adapters.pytorch.array_images import ArrayBatches
from prunus.adapters.pytorch.datasets import SPLIT_SEED, ArraySource, open_data, stratified_subset
from prunus.adapters.pytorch.session import PyTorchSession


def judge_by_left_out(session: PyTorchSession) -> None:
    """Put them in the place of the session's test split. Exits where there are none."""
    settings, adapter = session.settings, session.adapter
    source = open_data(settings.data)
    if not isinstance(source, ArraySource) or settings.train_limit is None or adapter.data is None:
        raise SystemExit("the protocol must set train_limit, on a data set that is held in memory")
    labels = source.train.labels.numpy()
    rest = np.setdiff1d(np.arange(len(labels)), stratified_subset(labels, settings.train_limit, SPLIT_SEED))
    spec = adapter.origin.input
    batches = ArrayBatches(source.train.select(rest).fitted(spec), np.arange(len(rest)), spec, 256)
    adapter.data = replace(adapter.data, test=batches)
