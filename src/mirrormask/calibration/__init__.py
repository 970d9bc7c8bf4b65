"""What a network's layers see of data: batches, a layer as a matrix, its second moment, one layer at a time."""

from mirrormask.calibration.batches import Forward, feed, held
from mirrormask.calibration.layers import Layer, layers_of
from mirrormask.calibration.modes import evaluating
from mirrormask.calibration.moments import Moment, moment_of, survey

__all__ = ["Forward", "Layer", "Moment", "evaluating", "feed", "held", "layers_of", "moment_of", "survey"]
