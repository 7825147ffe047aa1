"""A scheduled batch as the arrays that executors take."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from mlcgen.runtime.executor import AdaptedStepInput, Int32, StepInput
from mlcgen.runtime.kv_cache import BlockTable
from mlcgen.runtime.scheduler import Sequence as ScheduledSequence

__all__ = ["step_input"]

S = TypeVar("S", bound=ScheduledSequence)


def step_input(batch: Sequence[S], rows: Mapping[S, int], page_size: int) -> tuple[StepInput, Int32 | None, list[int]]:
    """(the batch, sampled_rows as in SamplingExecutor.start, the first row of logits of each sequence that has some).

    rows: of the sequences whose last token is still being sampled, in the iteration under way.
    """
    # Lists: a dozen operations on arrays of a few tokens take several times as long.
    input_ids: list[int] = []
    sampled_rows: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    masks: dict[int, int] = {}  # by row
    logit_rows: list[int] = []
    first_rows: list[int] = []
    query_start = [0]
    for sequence in batch:
        draft = sequence.draft
        span = range(sequence.num_computed, sequence.num_computed + sequence.num_scheduled)
        known = sequence.tokens[span.start : span.stop] + draft.tokens
        input_ids += known
        if rows:
            sampled_rows += [-1] * len(known)
            if len(known) < len(span):  # one is not known yet
                input_ids.append(0)
                sampled_rows.append(rows[sequence])
        if draft.is_chain:
            positions += span
        else:
            num_known = len(span) - len(draft)
            masks.update(enumerate(draft.masks(num_known), len(positions)))
            positions += span[:num_known]
            positions += [sequence.num_tokens - 1 + depth for depth in draft.depths]
        slots += sequence.table.slots(span, page_size)
        query_start.append(len(positions))
        if sequence.reaches_end:
            first_rows.append(len(logit_rows))
            logit_rows += range(len(positions) - 1 - len(draft), len(positions))
    batch_input = StepInput(
        input_ids=np.array(input_ids, np.int32),
        positions=np.array(positions, np.int32),
        slot_mapping=np.array(slots, np.int32),
        block_table=BlockTable.stack([sequence.table for sequence in batch]),
        seq_lens=np.array([sequence.num_computed + sequence.num_scheduled for sequence in batch], np.int32),
        query_start=np.array(query_start, np.int32),
        logit_rows=np.array(logit_rows, np.int32),
        tree_masks=_tree_masks(masks, len(positions)) if masks else None,
    )
    if any(sequence.adapter_slot >= 0 for sequence in batch):
        slots_of = [sequence.adapter_slot for sequence in batch]
        adapter_slots = np.repeat(np.array(slots_of, np.int32), np.diff(batch_input.query_start))
        batch_input = AdaptedStepInput(**vars(batch_input), adapter_slots=adapter_slots)
    return batch_input, np.array(sampled_rows, np.int32) if rows else None, first_rows


def _tree_masks(masks: Mapping[int, int], num_tokens: int) -> Int32:
    """(tokens,), 0 for rows that have none."""
    words = np.zeros(num_tokens, np.uint32)
    words[list(masks)] = list(masks.values())
    return words.view(np.int32)
