"""Documents in a batch: where each begins, from the ids alone."""

from dataclasses import replace

import torch

from truestep.batch import Batch


def with_positions(batch: Batch, end_of_document: int) -> Batch:
    """Return the batch with the position of each token in its document, as an input `positions`.

    The end of a document begins the next one, as it does where a model writes one: it is predicted
    from the document that it ends, and what follows it from it alone. A row's first document
    counts from the row.
    """
    places = torch.arange(batch.tokens.shape[1])
    begins = torch.where(batch.tokens == end_of_document, places, 0)  # (B, T)
    positions = places - begins.cummax(dim=1).values
    return replace(batch, inputs={**batch.inputs, "positions": positions})
