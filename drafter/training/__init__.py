"""Training: a block drafter fitted to the very weights that are served; see `command` and `trainer`.

    prompts   what the user gives
    answers   stage one: the main model answers them in ar mode
    anchors   what a block sees at each of many places of an answer, and how wrong it is
    trainer   stage two: steps, checkpoints, resuming
    heldout   accepted length on answers that are never trained on
    result    the folder that a drafter is loaded from

It stands above everything that drafts and decodes; nothing of the package imports it.
"""
