"""SparseOptimizer: any torch optimizer, training a model to exactly the sparsity asked for."""

from mirrormask.optimizer.mistaken import refuse_by_name
from mirrormask.optimizer.sparse_optimizer import SparseOptimizer
from mirrormask.optimizer.sparsify import sparsify
from mirrormask.optimizer.zeros import apply_masks, keep_zeros

__all__ = ["SparseOptimizer", "apply_masks", "keep_zeros", "sparsify"]

refuse_by_name()
