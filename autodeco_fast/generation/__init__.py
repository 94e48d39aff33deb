"""Adaptive decoding in Hugging Face's `generate`.

attach.py     attach, detach: what users call
attachment.py the class of an attached model, and one call of its `generate`
settings.py   what a call of `generate` chose, what it merely inherits, what is refused
gate.py       the hooks that divide a model's logits by T, and when they act
lazy.py       logits whose product is made when something looks at them
loop.py       the fused sampler, and other people's callbacks inside the decoding loop
copies.py     copies and pickles of an attached model, which are plain models
"""

from autodeco_fast.generation.attach import attach, detach
from autodeco_fast.generation.attachment import Attachment

__all__ = ["Attachment", "attach", "detach"]
