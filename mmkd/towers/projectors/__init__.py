"""Projectors between vision encoder and language model. Modules of this folder register them by name.

LLaVA's layout has a place for two matrices and none for a change of the token count. So a projector with fewer tokens stands
within the vision encoder (`mmkd.towers.encoders.reduced`), and the matrices follow. What it trains belongs to the part
"projector".
"""

from mmkd.towers.projectors.projector import Matrices, Projector

__all__ = ["Matrices", "Projector"]
