"""Training of drafts on text that the target writes itself: text, losses, loop, publishing.

``scripts/generate_text.py`` writes the text; ``scripts/train_eagle.py``, ``scripts/train_block_head.py`` and
``scripts/distill_draft.py`` train on it.
"""
