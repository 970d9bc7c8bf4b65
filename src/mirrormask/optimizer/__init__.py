"""SparseOptimizer: any torch optimizer, training a model to exactly the sparsity asked for."""

from mirrormask.optimizer.sparse_optimizer import SparseOptimizer, sparsify

__all__ = ["SparseOptimizer", "sparsify"]
