"""What one pass of a micro-batch through the model is given."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moe_dist.data.batch import Batch
from moe_dist.models.context import ALONE, RoutingContext


def model_inputs(batch: Batch, context: RoutingContext = ALONE, *, document_mask: bool = True) -> dict[str, Any]:
    """Arguments of the model for one micro-batch. `context`: what is the same for all micro-batches of a step."""
    documents = batch.document_ids
    valid = documents >= 0 if documents is not None and batch.num_tokens < documents.numel() else None
    context = replace(context, valid_BS=valid, domain_ids_BS=batch.domain_ids)
    inputs: dict[str, Any] = {"x": batch.input_ids, "context": context}
    if document_mask:
        inputs |= {"position_ids": batch.position_ids, "document_ids": documents}
    return inputs
