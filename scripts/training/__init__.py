"""Drafts trained on text that the target writes itself: the text, the losses, the loop, and what is shipped.

``scripts/generate_text.py`` writes the text, ``scripts/train_eagle.py`` and ``scripts/distill_draft.py`` train on it,
``scripts/draft_acceptance.py`` measures what the drafts are for: tokens per verification pass.
"""
