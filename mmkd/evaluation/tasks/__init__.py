"""What each benchmark scores by: its parser, metric, further numbers and its server's file stand together in one module.

A card names them (`parser: pope`, `metric: pope`). All modules here are imported when a name is first asked for; a user's own
are named by a card's `imports` or by `mmkd evaluate --imports`. See `mmkd.evaluation.metric` for what to write.

Where an official scorer has a quirk it is kept, and named in the docstring: a published number contains it.
"""
