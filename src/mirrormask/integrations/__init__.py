"""Callbacks for the trainers that people use: :mod:`.transformers` (Hugging Face) and :mod:`.lightning`.

Nothing here is imported before it is asked for: ``mirrormask`` needs neither of them.
"""
