"""What a kernel is told at run time of the tokens in a buffer: how many there are, and of which sequences.

A plan over sequences has buffers of some tokens each. Short sequences share one; a long one takes several, one after
the other. Then what works on single rows runs on each buffer by itself, and attention on all of a sequence's.
"""

from __future__ import annotations

__all__ = ["FACTS", "SLOT", "STEPS"]

#: Behind the addresses of the tensors outside, that of the facts.
SLOT = 16
#: 64-bit integers: rows of this buffer; then of all buffers that are at hand: how many, tokens of each sequence, how
#: many sequences, the number of the first; numbers from one buffer's start to the next; where the masks' steps are.
FACTS = ("rows", "buffers", "length", "sequences", "sequence", "pitch", "masks")
#: From one sequence, head, query and key of a mask to the next, 0 where it repeats itself.
STEPS = ("mask 0", "mask 1", "mask 2", "mask 3")
