"""Codecs: how a worker's tensor is packed for the wire; a file for each codec.

Owns the arithmetic of compression and the layout of payloads. Imports nothing of Lightning and nothing else of this
package. ``DilocoStrategy(codec=)`` uses them; ``comm/channel.py`` calls them, inside a mean.

============================  ==============================  =========================================
codec                         bytes for n elements (float32)  source
============================  ==============================  =========================================
:class:`Identity`             4n                              the dense exchange
:class:`Cast`                 2n                              bfloat16 or float16
:class:`Int8`                 n + 8                           INTELLECT-1, arXiv 2412.01152
:class:`FP4`                  ⌈n/2⌉ + 2                       Streaming DiLoCo, arXiv 2501.18512
:class:`Uniform`              n·bits/8 + 8                    MuLoCo ("linear"), arXiv 2505.23725
:class:`Statistical`          n·bits/8 + 4·2^bits             MuLoCo, arXiv 2505.23725
:class:`TopK`                 n·k/chunk·(4 + index bits/8)    SparseLoCo, arXiv 2508.15706
:class:`DCT`                  k·(4 + index bits/8) per block  DeMo, arXiv 2411.19870
:class:`RandomK`              4·fraction·n + 8                Streaming DiLoCo's random dropping
:class:`ErrorFeedback`        those of the codec inside       Seide et al. 2014; arXiv 1901.09847
============================  ==============================  =========================================
"""

from lightning_diloco.codecs.base import Codec, Payload, payload_bytes
from lightning_diloco.codecs.cast import Cast
from lightning_diloco.codecs.dct import DCT
from lightning_diloco.codecs.error_feedback import ErrorFeedback
from lightning_diloco.codecs.fp4 import FP4
from lightning_diloco.codecs.identity import Identity
from lightning_diloco.codecs.int8 import Int8
from lightning_diloco.codecs.randomk import RandomK
from lightning_diloco.codecs.statistical import Statistical
from lightning_diloco.codecs.topk import TopK
from lightning_diloco.codecs.uniform import Uniform

__all__ = [
    "DCT",
    "FP4",
    "Cast",
    "Codec",
    "ErrorFeedback",
    "Identity",
    "Int8",
    "Payload",
    "RandomK",
    "Statistical",
    "TopK",
    "Uniform",
    "payload_bytes",
]
